"""Formulas by which `torch.utils.flop_counter.FlopCounterMode` counts the operations; importing this module registers them.

Two per multiplication of a matrix product, the scores that attention's backward computes again included, as for torch's own operators.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.polyvit
_Shape = tuple[int, ...]


def _products(x: _Shape, weight: _Shape) -> int:
    """Of one product with a weight `[out, ...]`."""
    return 2 * prod(x[:-1]) * prod(weight)


@register_flop_formula(_OPS.attention)
def _attention(qkv: _Shape, *_: Any, **__: Any) -> int:
    batch, tokens, _three, heads, head_dim = qkv
    return 2 * 2 * batch * heads * tokens**2 * head_dim


@register_flop_formula(_OPS.attention_backward)
def _attention_backward(grad: _Shape, qkv: _Shape, *_: Any, **__: Any) -> int:
    return _attention(qkv) // 2 * 5


@register_flop_formula(_OPS.attention_varlen, get_raw=True)
def _attention_varlen(qkv: Any, cu_tokens: Any, *_: Any, **__: Any) -> int:
    """The lengths are in a tensor, which counting waits for."""
    return sum(_attention((1, length, *qkv.shape[1:])) for length in cu_tokens.diff().tolist())


@register_flop_formula(_OPS.attention_varlen_backward, get_raw=True)
def _attention_varlen_backward(grad: Any, qkv: Any, out: Any, lse: Any, cu_tokens: Any, *_: Any, **__: Any) -> int:
    return _attention_varlen(qkv, cu_tokens) // 2 * 5


@register_flop_formula([_OPS.linear_gelu, _OPS.linear_add])
def _linear(x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return _products(x, weight)


@register_flop_formula([_OPS.linear_gelu_backward, _OPS.linear_add_backward], get_raw=True)
def _linear_backward(grad: Any, x: Any, weight: Any, *arguments: Any, **__: Any) -> int:
    d_x, d_weight, _ = arguments[-1]
    return (d_x + d_weight) * _products(tuple(x.shape), tuple(weight.shape))


@register_flop_formula(_OPS.mlp)
def _mlp(x: _Shape, fc1_weight: _Shape, fc1_bias: _Shape, fc2_weight: _Shape, *_: Any, **__: Any) -> int:
    return _products(x, fc1_weight) + _products(x, fc2_weight)


@register_flop_formula(_OPS.mlp_backward, get_raw=True)
def _mlp_backward(grad: Any, x: Any, fc1_weight: Any, activation: Any, slope: Any, fc2_weight: Any, *arguments: Any, **__: Any) -> int:
    d_x, d_fc1_weight, _, d_fc2_weight, _ = arguments[-1]
    shape = tuple(x.shape)
    first, second = _products(shape, tuple(fc1_weight.shape)), _products(shape, tuple(fc2_weight.shape))
    hidden = any(arguments[-1][:3])  # whose gradient that of the first layer needs
    return (d_x + d_fc1_weight) * first + (hidden + d_fc2_weight) * second


@register_flop_formula(_OPS.patch_embed)
def _patch_embed(grid: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(grid) * weight[0]


@register_flop_formula(_OPS.patch_embed_backward, get_raw=True)
def _patch_embed_backward(grad: Any, grid: Any, weight: Any, *arguments: Any, **__: Any) -> int:
    d_weight, _ = arguments[-1]
    return d_weight * _patch_embed(tuple(grid.shape), tuple(weight.shape))
