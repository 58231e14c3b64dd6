"""Attention by xformers. Since its version 0.0.36 the kernels are in the package mslk; either package will do."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polyvit_kernels.ops.registration import Pick, register

_MODULES = {"mslk": "mslk.attention.fmha", "xformers": "xformers.ops"}
"""The module with the attention functions of each package; xformers itself calls those of mslk where that is installed."""


def is_installed() -> bool:
    """Whether one of the packages is installed; nothing is imported."""
    return any(find_spec(package) for package in _MODULES)


@cache
def load() -> ModuleType:
    """The module of the first package that can be imported. Raises ValueError that says how to install one, or why none can be."""
    reasons = []
    for package, module in _MODULES.items():
        if find_spec(package):
            try:
                return import_module(module)
            except Exception as error:  # a compiled part for another version of torch raises whatever it likes
                reasons.append(f"{package} cannot be imported ({type(error).__name__}: {error})")
    advice = "pip install mslk-cuda (of the release for your version of torch) or pip install xformers"
    raise ValueError(f"attention by xformers: {'; '.join(reasons) or 'neither mslk nor xformers is installed'}; {advice}")


def _attention(qkv: Tensor, pick: Pick) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp `[batch, heads, tokens]`); xformers chooses among its kernels."""
    if not qkv.numel():
        return _empty_results(qkv)
    out, lse = load().memory_efficient_attention_forward_requires_grad(*qkv.unbind(2))
    return out.contiguous(), lse[..., : qkv.shape[1]].contiguous()  # some kernels pad the log-sum-exp to a whole block


def _empty_results(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, tokens, heads, head_dim), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


def _attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, pick: Pick) -> Tensor:
    if not qkv.numel():
        return _empty_packed(grad, qkv, out, lse)
    return torch.stack(load().memory_efficient_attention_backward(grad.contiguous(), out, lse, *qkv.unbind(2)), 2)


def _empty_packed(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_attention_backward_op = register("xformers_attention_backward", _attention_backward, _empty_packed, device_types=("cuda",))


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, out, lse)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    return grad if grad is None else _attention_backward_op(grad, *ctx.saved_tensors)


xformers_attention = register(
    "xformers_attention", _attention, _empty_results, save=_save, differentiate=_differentiate, device_types=("cuda",)
)
"""(out, log-sum-exp) of `[batch, tokens, 3, heads, head_dim]`, whose gradient is packed at the cost of a copy.

The kernels of the backward pass may add up in another order each time.
"""
