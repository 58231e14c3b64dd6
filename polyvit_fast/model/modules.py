"""Parts of the trunk, with timm's parameter names: `LayerNorm`, `Attention`, `Mlp`, and the pre-norm `Block` made of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from polyvit_fast.config import Model
from polyvit_kernels import ops

Tokens = Float[Tensor, "batch tokens dim"]


class LayerNorm(nn.LayerNorm):
    """Normalisation of each token, with the eps of JAX's Flax."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The normalised tokens."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention; `qkv` gives the queries of all heads, then their keys, then their values."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.num_heads, self.dropout = model.num_heads, model.dropout
        self.qkv = nn.Linear(model.dim, 3 * model.dim)
        self.proj = nn.Linear(model.dim, model.dim)

    def forward(self, x: Tokens) -> Tokens:
        """Every token's weighted mean over all tokens' values, projected."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return functional.dropout(self.proj(ops.attention(qkv).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gelu: ops.Gelu = model.gelu
        self.dropout = model.dropout
        self.fc1 = nn.Linear(model.dim, model.mlp_dim)
        self.fc2 = nn.Linear(model.mlp_dim, model.dim)

    def forward(self, x: Tokens) -> Tokens:
        """Each token by itself through both layers."""
        if not (self.training and self.dropout):
            return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.gelu)
        hidden = functional.dropout(ops.linear_gelu(x, self.fc1.weight, self.fc1.bias, self.gelu), self.dropout)
        return functional.dropout(self.fc2(hidden), self.dropout)


class Block(nn.Module):
    """A pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)) (arXiv 2010.11929, eq. 2 and 3)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.rescale = model.rescale_drop_path
        self.norm1, self.attn = LayerNorm(model.dim), Attention(model)
        self.norm2, self.mlp = LayerNorm(model.dim), Mlp(model)

    def forward(self, x: Tokens, drop_path_rate: float = 0.0) -> Tokens:
        """The tokens after both branches; in training each branch is left out of an example with the chance `drop_path_rate`."""
        rate = drop_path_rate if self.training else 0.0
        x = add_branch(x, self.attn(self.norm1(x)), rate, self.rescale)
        return add_branch(x, self.mlp(self.norm2(x)), rate, self.rescale)


def add_branch(x: Tokens, branch: Tokens, drop_path_rate: float, rescale: bool) -> Tokens:
    """`x + branch`, for each example with the chance `1 - drop_path_rate` and else `x` (arXiv 1603.09382, eq. 2).

    With `rescale` a kept branch is divided by that chance.
    """
    if not drop_path_rate:
        return x + branch
    kept = torch.empty(len(x), 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - drop_path_rate)
    return torch.addcmul(x, branch, kept / (1 - drop_path_rate) if rescale else kept)


def drop_path_ramp(num_blocks: int, drop_path_rate: float) -> list[float]:
    """A chance per block: from 0 in the first, linearly to `drop_path_rate` in the last."""
    return [drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
