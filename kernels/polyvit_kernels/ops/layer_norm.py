"""Layer normalisation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def layer_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], bias: Float[Tensor, " dim"], eps: float = 1e-6
) -> Float[Tensor, "*batch dim"]:
    """Each vector shifted and scaled to mean 0 and variance 1, then an affine map (arXiv 1607.06450); `eps` adds to the variance."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)
