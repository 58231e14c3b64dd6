"""Attention by xformers, whose kernels are in the package mslk since version 0.0.36 of it; either will do."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MODULES = {"mslk": "mslk.attention.fmha", "xformers": "xformers.ops"}
"""Of each package, the module with the functions of its attention; of the second, those of the first where it is there."""


def is_installed() -> bool:
    """Whether one of the packages is there; nothing is imported."""
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


@torch.library.custom_op("polyvit::xformers_attention", mutates_args=(), device_types="cuda")
def xformers_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sums `[batch, heads, tokens]`) of `[batch, tokens, 3, heads, head_dim]`, whose gradient is packed, at the cost of a copy.

    xformers chooses among its kernels; those of the backward pass may add up in another order each time.
    """
    if not qkv.numel():
        return _empty_results(qkv)
    with torch.cuda.device_of(qkv):
        out, lse = load().memory_efficient_attention_forward_requires_grad(*qkv.unbind(2))
    return out.contiguous(), lse[..., : qkv.shape[1]].contiguous()  # some kernels fill the last block of the log-sums up


@xformers_attention.register_fake
def _empty_results(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, tokens, heads, head_dim), qkv.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("polyvit::xformers_attention_backward", mutates_args=(), device_types="cuda")
def _xformers_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    if not qkv.numel():
        return _empty_packed(grad, qkv, out, lse)
    with torch.cuda.device_of(qkv):
        return torch.stack(load().memory_efficient_attention_backward(grad.contiguous(), out, lse, *qkv.unbind(2)), 2)


@_xformers_attention_backward.register_fake
def _empty_packed(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, out, lse)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    return grad if grad is None else _xformers_attention_backward(grad, *ctx.saved_tensors)


xformers_attention.register_autograd(_differentiate, setup_context=_keep)
