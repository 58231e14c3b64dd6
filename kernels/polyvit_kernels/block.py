"""The pre-norm block of a Vision Transformer (arXiv 2010.11929, eq. 2 and 3), of the parts of anybody's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from polyvit_kernels.layers import norm_residual
from polyvit_kernels.ops.dtypes import matmul_dtype
from polyvit_kernels.ops.gradients import keep_factors

Tokens = Float[Tensor, "batch tokens dim"]
Factors = Float[Tensor, " batch"]
"""What each example of a branch is multiplied by: drop path's 0 and 1, say."""

Branch = Callable[[Tokens, Tokens, Factors | None], Tokens]
"""(y, x, factors) -> x + factors * branch(y), with which an attention or an MLP ends its last matrix product."""


def pre_norm_block(
    x: Tokens,
    norm1: Any,
    attn: Branch,
    norm2: Any,
    mlp: Branch,
    attn_factors: Factors | None = None,
    mlp_factors: Factors | None = None,
) -> Tokens:
    """The tokens after both branches; each example of a branch is multiplied by its factor if there are any. Norms: see `norm_residual`."""
    x = add_normed(x, norm1, attn, attn_factors)  # x + attn(norm1(x))
    return add_normed(x, norm2, mlp, mlp_factors)  # x + mlp(norm2(x))


def add_normed(x: Tokens, norm: Any, branch: Branch, factors: Factors | None) -> Tokens:
    """x + factors * branch(norm(x)), the sum being the epilogue of the branch's last product and its backward part of the norm's."""
    x, y = norm_residual(norm, x, matmul_dtype(x))
    # The norm that comes next finds the factors, by which its backward multiplies the gradient that goes into this branch.
    return keep_factors(branch(y, x, factors), factors)
