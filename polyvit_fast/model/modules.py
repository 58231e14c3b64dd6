"""A Vision Transformer's modules with timm's parameter names: `LayerNorm`, `Attention`, `Mlp`, and the pre-norm `Block` made of them.

Each of `Attention` and `Mlp` adds to a residual on request, so that the sum needs no pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from polyvit_fast.config import Model
from polyvit_kernels import ops
from polyvit_kernels.block import pre_norm_block
from polyvit_kernels.layers import add_linear, is_plain, project
from polyvit_kernels.ops.mlp import apply_gelu

Tokens = Float[Tensor, "batch tokens dim"]
ClassToken = Float[Tensor, "batch 1 dim"]
Factors = Float[Tensor, " batch"]
"""What each example of a branch is multiplied by."""

GELU = {kind: partial(apply_gelu, gelu=kind) for kind in get_args(ops.Gelu)}


class LayerNorm(nn.LayerNorm):
    """Normalisation of each token, with the eps of JAX's Flax and timm."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, input: Float[Tensor, "*batch dim"], out_dtype: torch.dtype | None = None) -> Float[Tensor, "*batch dim"]:
        """The normalised tokens, in `out_dtype` where it is given: what a matrix product that follows would cast them to."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps, out_dtype)


class Attention(nn.Module):
    """Multi-head self-attention; `qkv` gives the queries of all heads, then their keys, then their values."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads = {num_heads}, but attention takes one head or more")
        if dim % num_heads:
            raise ValueError(f"dim = {dim} does not divide by num_heads = {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.backend: ops.AttentionBackend = "auto"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens, residual: Tokens | None = None, factors: Factors | None = None) -> Tokens:
        """Every token's weighted mean over all tokens' values, projected, in training with dropout.

        Added to `residual` if there is one, each example multiplied by its one of `factors` if there are any.
        """
        mixed = ops.attention(project(self.qkv, x, (3, self.num_heads, -1)), self.backend).flatten(2)
        return add_linear(self.proj, mixed, residual, factors, self.dropout * self.training)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, mlp_dim: int, *, gelu: ops.Gelu = "erf", dropout: float = 0.0) -> None:
        super().__init__()
        if gelu not in GELU:
            raise ValueError(f"gelu = {gelu!r} is none of {', '.join(map(repr, GELU))}")
        self.gelu: ops.Gelu = gelu
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(
        self, x: Float[Tensor, "*batch dim"], residual: Float[Tensor, "*batch dim"] | None = None, factors: Factors | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """Each token by itself through both layers, in training with dropout after each.

        Added to `residual` if there is one, each example multiplied by its one of `factors` if there are any.
        """
        fc1, fc2, dropout = self.fc1, self.fc2, self.dropout * self.training
        if is_plain(fc1) and is_plain(fc2) and not dropout:
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.gelu, residual, factors)
        hidden = ops.linear_gelu(x, fc1.weight, fc1.bias, self.gelu) if is_plain(fc1) else GELU[self.gelu](fc1(x))
        return add_linear(fc2, functional.dropout(hidden, dropout), residual, factors, dropout)


class Block(nn.Module):
    """A pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)) (arXiv 2010.11929, eq. 2 and 3).

    With `rescale_drop_path` a branch that is kept in training is divided by the probability of keeping it, as in timm.
    """

    attention = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        gelu: ops.Gelu = "erf",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        rescale_drop_path: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.rescale = rescale_drop_path
        self.norm1, self.attn = LayerNorm(dim, norm_eps), self.attention(dim, num_heads, qkv_bias=qkv_bias, dropout=dropout)
        self.norm2, self.mlp = LayerNorm(dim, norm_eps), Mlp(dim, mlp_dim, gelu=gelu, dropout=dropout)

    @classmethod
    def from_config(cls, model: Model) -> Block:
        """A block of the model that the record describes."""
        options = {"gelu": model.gelu, "dropout": model.dropout, "rescale_drop_path": model.rescale_drop_path, "norm_eps": model.norm_eps}
        return cls(model.dim, model.num_heads, model.mlp_dim, **options)

    def forward(self, x: Tokens, drop_path_rate: float = 0.0, recompute: bool = False) -> Tokens | ClassToken:
        """The tokens after both branches; in training each branch is left out of an example with the probability `drop_path_rate`.

        `recompute`: keep `x` alone for the backward pass, which computes the rest again. With dropout that reads the state of the random
        numbers, and cannot be captured in a CUDA graph.
        """
        return self.compute(self.add_branches, x, drop_path_rate, recompute)

    def compute(
        self, add_branches: Callable[..., Tokens | ClassToken], x: Tokens, drop_path_rate: float, recompute: bool
    ) -> Tokens | ClassToken:
        """What `add_branches` gives of x and the factors of drop path."""
        dropped = self.training and drop_path_rate > 0
        factors = drop_path_factors(x, drop_path_rate, self.rescale) if dropped else (None, None)
        if recompute and torch.is_grad_enabled():
            random = self.training and bool(self.attn.dropout or self.mlp.dropout)
            return checkpoint(add_branches, x, *factors, use_reentrant=False, preserve_rng_state=random)
        return add_branches(x, *factors)

    def add_branches(self, x: Tokens, attn_factors: Factors | None, mlp_factors: Factors | None) -> Tokens:
        """The tokens after both branches, each example of a branch multiplied by its factor if there are any."""
        return pre_norm_block(x, self.norm1, self.attn, self.norm2, self.mlp, attn_factors, mlp_factors)


def drop_path_factors(x: Tokens, drop_path_rate: float, rescale: bool) -> Float[Tensor, "2 batch"]:
    """What a block's two branches are multiplied by in each example (arXiv 1603.09382, eq. 2).

    0 with the probability `drop_path_rate`, else 1, which `rescale` divides by its probability.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = torch.empty(2, len(x), dtype=dtype, device=x.device).bernoulli_(1 - drop_path_rate)
    return kept.div_(1 - drop_path_rate) if rescale else kept


def drop_path_ramp(num_blocks: int, drop_path_rate: float) -> list[float]:
    """A rate per block: from 0 in the first, linearly to `drop_path_rate` in the last."""
    return [drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
