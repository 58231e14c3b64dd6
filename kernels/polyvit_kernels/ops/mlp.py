"""Linear layers with what follows them: GELU, residual."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Gelu = Literal["tanh", "erf"]
"""tanh: the approximation of arXiv 1606.08415, section 2; erf: exact."""

_APPROXIMATE = {"tanh": "tanh", "erf": "none"}


def linear_gelu(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "hidden dim"], bias: Float[Tensor, " hidden"], gelu: Gelu
) -> Float[Tensor, "*batch hidden"]:
    """GELU of a linear layer."""
    return functional.gelu(functional.linear(x, weight, bias), approximate=_APPROXIMATE[gelu])


def mlp(
    x: Float[Tensor, "*batch dim"],
    fc1_weight: Float[Tensor, "hidden dim"],
    fc1_bias: Float[Tensor, " hidden"],
    fc2_weight: Float[Tensor, "dim hidden"],
    fc2_bias: Float[Tensor, " dim"],
    gelu: Gelu,
) -> Float[Tensor, "*batch dim"]:
    """Two linear layers with a GELU between them."""
    return functional.linear(linear_gelu(x, fc1_weight, fc1_bias, gelu), fc2_weight, fc2_bias)
