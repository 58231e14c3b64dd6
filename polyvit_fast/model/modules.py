"""Parts of a Vision Transformer with timm's parameter names: `LayerNorm`, `Attention`, `Mlp`, and the pre-norm `Block` made of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as all_modules
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from polyvit_fast.config import Model
from polyvit_fast.model.class_token import attend_first
from polyvit_kernels import ops
from polyvit_kernels.ops.dtypes import check_factors, matmul_dtype, without_autocast
from polyvit_kernels.ops.gradients import as_broad, find_factors, keep_factors

Tokens = Float[Tensor, "batch tokens dim"]
OneToken = Float[Tensor, "batch 1 dim"]
Factors = Float[Tensor, " batch"]
"""What each example of a branch is multiplied by."""

GELU = {"tanh": partial(functional.gelu, approximate="tanh"), "erf": functional.gelu}


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
        return _linear_add(mixed, self.proj, self.dropout * self.training, residual, factors)

    def class_token(self, x: Tokens, out_dtype: torch.dtype) -> OneToken:
        """What `forward` gives for the first token, computed in the dtype of x, fp32 at least."""
        with without_autocast(x):
            mixed = attend_first(x, self.qkv.weight.to(x.dtype), self.qkv.bias.to(x.dtype), self.num_heads)
        return _linear_add(mixed[:, None].to(out_dtype), self.proj, self.dropout * self.training)


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
        dropout, plain = self.dropout * self.training, is_plain(self.fc1)
        if plain and is_plain(self.fc2) and not dropout:
            return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.gelu, residual, factors)
        hidden = ops.linear_gelu(x, self.fc1.weight, self.fc1.bias, self.gelu) if plain else GELU[self.gelu](self.fc1(x))
        return _linear_add(functional.dropout(hidden, dropout), self.fc2, dropout, residual, factors)


class Block(nn.Module):
    """A pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)) (arXiv 2010.11929, eq. 2 and 3).

    With `rescale_drop_path` a branch that is kept in training is divided by its chance to be kept, as in timm.
    """

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
    ) -> None:
        super().__init__()
        self.rescale = rescale_drop_path
        self.norm1, self.attn = LayerNorm(dim), Attention(dim, num_heads, qkv_bias=qkv_bias, dropout=dropout)
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, mlp_dim, gelu=gelu, dropout=dropout)

    @classmethod
    def from_config(cls, model: Model) -> Block:
        """A block of the model that the record describes."""
        options = {"gelu": model.gelu, "dropout": model.dropout, "rescale_drop_path": model.rescale_drop_path}
        return cls(model.dim, model.num_heads, model.mlp_dim, **options)

    def forward(self, x: Tokens, drop_path_rate: float = 0.0, class_token: bool = False, recompute: bool = False) -> Tokens | OneToken:
        """The tokens after both branches; in training each branch is left out of an example with the chance `drop_path_rate`.

        `class_token`: the first token alone, `[batch, 1, dim]`, for less than a tenth of the work, unless a part of the block has hooks.
        `recompute`: keep `x` alone for the backward pass, which computes the rest again. With dropout that reads the state of the random
        numbers, and cannot be captured in a CUDA graph.
        """
        dropped = self.training and drop_path_rate > 0
        attn_factors, mlp_factors = branch_factors(x, drop_path_rate, self.rescale) if dropped else (None, None)
        run = self._class_token if class_token and self._is_plain() else self._all_tokens
        inputs = (x, find_factors(x), attn_factors, mlp_factors)
        if recompute and torch.is_grad_enabled():
            random = self.training and bool(self.attn.dropout or self.mlp.dropout)
            out = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=random)
        else:
            out = run(*inputs)
        return out[:, :1] if class_token else keep_factors(out, mlp_factors)

    def _all_tokens(self, x: Tokens, before: Factors | None, attn_factors: Factors | None, mlp_factors: Factors | None) -> Tokens:
        """`before`: the factors of the branch that `x` ends with."""
        dtype = matmul_dtype(x)
        x, normal = _beside(self.norm1, x, dtype, before)
        x = self.attn(normal, x, attn_factors)
        x, normal = _beside(self.norm2, x, dtype, attn_factors)
        return self.mlp(normal, x, mlp_factors)

    def _class_token(self, x: Tokens, before: Factors | None, attn_factors: Factors | None, mlp_factors: Factors | None) -> OneToken:
        x, normal = _beside(self.norm1, x, torch.promote_types(x.dtype, torch.float32), before)
        dtype = matmul_dtype(x)
        first = add_branch(x[:, :1], self.attn.class_token(normal, dtype), attn_factors)
        return self.mlp(self.norm2(first, dtype), first, mlp_factors)

    def _is_plain(self) -> bool:
        """Whether nobody listens to a part of the block, and its queries, keys and values are those of a linear layer."""
        return is_plain(self.attn.qkv) and all(is_untouched(part) for part in self.modules() if part is not self)


def _beside(norm: LayerNorm, x: Tokens, out_dtype: torch.dtype, factors: Factors | None) -> tuple[Tokens, Tokens]:
    """The tokens, and normalised, in one pass of the backward unless somebody listens to the norm."""
    if is_untouched(norm):
        return ops.layer_norm_residual(x, norm.weight, norm.bias, norm.eps, out_dtype, factors)
    return x, norm(x, out_dtype)


def project(linear: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `linear` makes of x, its features in `shape`."""
    return ops.linear(x, linear.weight, linear.bias, shape) if is_plain(linear) else linear(x).unflatten(-1, shape)


def is_plain(linear: Any) -> bool:
    """Whether a call of `linear` is x Wᵀ + b and nothing else, so that an operation may read its parameters instead.

    Not so for an adapter in its place, with hooks, with parametrised, quantised or sharded weights, or without a bias: call those.
    """
    return type(linear) in _LINEAR and is_untouched(linear) and type(linear.weight) in PLAIN and type(linear.bias) in PLAIN


PLAIN = (nn.Parameter, Tensor)
"""Tensors of torch's own kind, neither quantised nor sharded."""

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's `forward` and nothing else."""
    return "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs hooks, its own or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or all_modules._has_any_global_hook()
    )


def branch_factors(x: Tokens, drop_path_rate: float, rescale: bool) -> Float[Tensor, "2 batch"]:
    """What a block's two branches are multiplied by in each example: 0 with the chance `drop_path_rate`, else 1 (arXiv 1603.09382, eq. 2).

    With `rescale` that 1 is divided by its chance.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = torch.empty(2, len(x), dtype=dtype, device=x.device).bernoulli_(1 - drop_path_rate)
    return kept.div_(1 - drop_path_rate) if rescale else kept


def add_branch(
    residual: Float[Tensor, "*batch dim"], branch: Float[Tensor, "*batch dim"], factors: Factors | None
) -> Float[Tensor, "*batch dim"]:
    """`residual` and the branch, of which each example is multiplied by its one of `factors`; in the wider of both dtypes."""
    if factors is None:
        return residual + branch
    check_factors(factors, residual)
    return torch.addcmul(residual, branch, as_broad(factors, branch)).to(torch.promote_types(residual.dtype, branch.dtype))


def drop_path_ramp(num_blocks: int, drop_path_rate: float) -> list[float]:
    """A chance per block: from 0 in the first, linearly to `drop_path_rate` in the last."""
    return [drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]


def _linear_add(x: Tensor, linear: Any, dropout: float, residual: Tensor | None = None, factors: Factors | None = None) -> Tensor:
    if residual is not None and is_plain(linear) and not dropout:
        return ops.linear_add(x, linear.weight, linear.bias, residual, factors)
    branch = functional.dropout(project(linear, x, (-1,)), dropout)
    if residual is not None:
        return add_branch(residual, branch, factors)
    if factors is not None:
        raise ValueError("factors multiply what is added to a residual, but there is none")
    return branch
