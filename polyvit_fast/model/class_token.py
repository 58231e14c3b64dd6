"""Attention of the class token alone, without a key or a value of any token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from polyvit_kernels.ops import dtypes


def attend_first(
    x: Float[Tensor, "batch tokens dim"], weight: Float[Tensor, "qkv dim"], bias: Float[Tensor, " qkv"], num_heads: int
) -> Float[Tensor, "batch dim"]:
    """What attention on the packed projection x Wᵀ + b gives for the first token.

    For one query q it is cheaper to bring q through the keys' weights, q · (W x + b) = (Wᵀ q) · x + a constant that the softmax does
    not see, and the mean of the tokens, not each of them, through the values' weights.
    """
    if torch.is_grad_enabled() and dtypes.runs_registered(x) and not torch.compiler.is_compiling():
        return _AttendFirst.apply(x, weight, bias, num_heads)
    return _attend_first(x, weight, bias, num_heads)[0]


def _attend_first(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """The result, then scaled queries, those brought through the keys' weights, attention, the tokens' means."""
    query, key, value = weight.unflatten(0, (3, num_heads, -1)).unbind()
    query_bias, _, value_bias = bias.chunk(3)
    q = functional.linear(x[:, 0], query.flatten(0, 1), query_bias).unflatten(1, (num_heads, -1)) / query.shape[1] ** 0.5
    through = _per_head(q, key)
    attention = (through @ x.transpose(1, 2)).softmax(-1)
    mean = attention @ x
    return _per_head(mean, value.transpose(1, 2)).flatten(1) + value_bias, q, through, attention, mean


def _per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """`[batch, heads, in]` through a matrix `[in, out]` for each head."""
    return (x.transpose(0, 1) @ matrices).transpose(0, 1)


class _AttendFirst(torch.autograd.Function):
    """Torch would make three gradients of all tokens, one of them zeros but for the first token, and add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
        out, *kept = _attend_first(x, weight, bias, num_heads)
        ctx.save_for_backward(x, weight, *kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * 4
        x, weight, q, through, attention, mean = ctx.saved_tensors
        num_heads, head_dim = q.shape[1:]
        query, key, value = weight.unflatten(0, (3, num_heads, -1)).unbind()
        grads = grad.unflatten(1, (num_heads, -1))
        d_mean = _per_head(grads, value)
        d_scores = torch.ops.aten._softmax_backward_data(d_mean @ x.transpose(1, 2), attention, -1, x.dtype)
        d_through = d_scores @ x
        d_query = (_per_head(d_through, key.transpose(1, 2)) / head_dim**0.5).flatten(1)
        # [batch, tokens, dim], made in one product: tokens meet the softmax as values, and as keys.
        d_x = torch.cat([attention, d_scores], 1).transpose(1, 2) @ torch.cat([d_mean, through], 1)
        d_x[:, 0].add_(d_query @ query.flatten(0, 1))
        d_weight = torch.cat([d_query.t() @ x[:, 0], _outer(q, d_through), _outer(grads, mean)])
        d_bias = torch.cat([d_query, torch.zeros_like(grad), grad], 1).sum(0)
        return d_x, d_weight, d_bias, None


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`[heads * left, right]`: the sums over the batch of each head's outer products."""
    return (left.permute(1, 2, 0) @ right.transpose(0, 1)).flatten(0, 1)
