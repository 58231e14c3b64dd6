"""The last block of a trunk whose class token alone is read: it computes nothing of the other tokens that nobody reads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from polyvit_fast.model.modules import Attention, Block, ClassToken, Factors, Tokens
from polyvit_kernels import ops
from polyvit_kernels.block import pre_norm_block
from polyvit_kernels.layers import add_branch, add_linear, is_plain, norm_residual, project
from polyvit_kernels.ops import dtypes
from polyvit_kernels.ops.dtypes import matmul_dtype, without_autocast


class ClassTokenAttention(Attention):
    """`Attention` that gives the class token alone, `[batch, 1, dim]`, computed in the dtype of its input, fp32 at least."""

    def forward(
        self, x: Tokens, residual: Tokens | None = None, factors: Factors | None = None, all_tokens: bool = False
    ) -> ClassToken | Tokens:
        """What `Attention.forward` gives for the first token, or with `all_tokens` for all.

        Where `qkv` is a linear layer with a bias and nothing else, `attend_first` reads its parameters; an adapter around it, or a layer
        with hooks, is called with all tokens.
        """
        if all_tokens:
            return super().forward(x, residual, factors)
        dropout, first = self.dropout * self.training, None if residual is None else residual[:, :1]
        dtype = matmul_dtype(x if residual is None else residual)
        if is_plain(self.qkv):
            with without_autocast(x):
                mixed = attend_first(x, self.qkv.weight.to(x.dtype), self.qkv.bias.to(x.dtype), self.num_heads)[:, None].to(dtype)
        else:
            mixed = ops.attention(project(self.qkv, x.to(dtype), (3, self.num_heads, -1)), self.backend)[:, :1].flatten(2)
        if first is None:
            return add_linear(self.proj, mixed, None, factors, dropout)
        # Not fused with the projection: of one token per example a sum costs nothing.
        return add_branch(first, add_linear(self.proj, mixed, dropout=dropout), factors)


class ClassTokenBlock(Block):
    """A `Block` that gives the class token alone, `[batch, 1, dim]`, for less than a tenth of the work; its parameters are the same.

    All its parts are called as modules, so that hooks on them run as often as in a `Block`. What they see differs: the inputs of `attn`
    and the outputs of `norm1` are all tokens, in fp32 at least; the outputs of `attn`, and all of `norm2` and `mlp`, are the class token
    alone. With `all_tokens` it computes what a `Block` does.
    """

    attention = ClassTokenAttention

    def forward(self, x: Tokens, drop_path_rate: float = 0.0, recompute: bool = False, all_tokens: bool = False) -> ClassToken | Tokens:
        """The class token after both branches, or all tokens; see `Block.forward`."""
        return self.compute(self.add_all_branches if all_tokens else self.add_branches, x, drop_path_rate, recompute)

    def add_all_branches(self, x: Tokens, attn_factors: Factors | None, mlp_factors: Factors | None) -> Tokens:
        """All tokens after both branches."""
        attn = partial(self.attn, all_tokens=True)
        return pre_norm_block(x, self.norm1, attn, self.norm2, self.mlp, attn_factors, mlp_factors)

    def add_branches(self, x: Tokens, attn_factors: Factors | None, mlp_factors: Factors | None) -> ClassToken:
        """The class token after both branches."""
        x, y = norm_residual(self.norm1, x, torch.promote_types(x.dtype, torch.float32))
        first = self.attn(y, x, attn_factors)
        return self.mlp(self.norm2(first, matmul_dtype(first)), first, mlp_factors)


def attend_first(
    x: Float[Tensor, "batch tokens dim"], weight: Float[Tensor, "qkv dim"], bias: Float[Tensor, " qkv"], num_heads: int
) -> Float[Tensor, "batch dim"]:
    """What attention on the packed projection x Wᵀ + b gives for the first token, without a key or a value of any token.

    For one query q it is cheaper to multiply q by the keys' weights, as q · (W x + b) = (Wᵀ q) · x + a constant, which the softmax
    ignores, and the values' weights by the mean of the tokens instead of by each token.
    """
    if torch.is_grad_enabled() and dtypes.runs_registered(x) and not torch.compiler.is_compiling():
        return _AttendFirst.apply(x, weight, bias, num_heads)
    return _attend_first(x, weight, bias, num_heads)[0]


def _attend_first(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """The result, then the scaled queries, these multiplied by the keys' weights, attention, the tokens' means."""
    query, key, value = weight.unflatten(0, (3, num_heads, -1)).unbind()
    query_bias, _, value_bias = bias.chunk(3)
    q = functional.linear(x[:, 0], query.flatten(0, 1), query_bias).unflatten(1, (num_heads, -1)) / query.shape[1] ** 0.5
    key_query = _per_head(q, key)
    attention = (key_query @ x.transpose(1, 2)).softmax(-1)
    mean = attention @ x
    return _per_head(mean, value.transpose(1, 2)).flatten(1) + value_bias, q, key_query, attention, mean


def _per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """`[batch, heads, in]` times a matrix `[in, out]` for each head."""
    return (x.transpose(0, 1) @ matrices).transpose(0, 1)


class _AttendFirst(torch.autograd.Function):
    """By itself torch would make three gradients of all tokens, one of them zero but for the first token, and add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
        out, *saved = _attend_first(x, weight, bias, num_heads)
        ctx.save_for_backward(x, weight, *saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * 4
        x, weight, q, key_query, attention, mean = ctx.saved_tensors
        num_heads, head_dim = q.shape[1:]
        query, key, value = weight.unflatten(0, (3, num_heads, -1)).unbind()
        grads = grad.unflatten(1, (num_heads, -1))
        d_mean = _per_head(grads, value)
        # Private, as torch 2.13 has no public backward of softmax from its output.
        d_scores = torch.ops.aten._softmax_backward_data(d_mean @ x.transpose(1, 2), attention, -1, x.dtype)
        d_key_query = d_scores @ x
        d_query = (_per_head(d_key_query, key.transpose(1, 2)) / head_dim**0.5).flatten(1)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if wants_x:
            # [batch, tokens, dim] in one product: tokens enter as values, weighted by attention, and as keys, by the scores' gradient.
            d_x = torch.cat([attention, d_scores], 1).transpose(1, 2) @ torch.cat([d_mean, key_query], 1)
            d_x[:, 0].add_(d_query @ query.flatten(0, 1))
        if wants_weight:
            d_weight = torch.cat([d_query.t() @ x[:, 0], _outer(q, d_key_query), _outer(grads, mean)])
        if wants_bias:
            d_bias = torch.cat([d_query, torch.zeros_like(grad), grad], 1).sum(0)
        return d_x, d_weight, d_bias, None


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`[heads * left, right]`: the sums over the batch of each head's outer products."""
    return (left.permute(1, 2, 0) @ right.transpose(0, 1)).flatten(0, 1)
