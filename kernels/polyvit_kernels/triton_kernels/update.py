"""SGD and AdamW on flat fp32 buffers: all that an optimizer does to a parameter, in one pass over memory.

A program reads a block of each buffer and writes parameter, moments, moving average, a copy in another precision, and zeros to the
gradient. The learning rate, the gradient's factor and whether to update at all are read from the device, so that the launch can be captured
in a CUDA graph.

- BLOCK: elements of a program
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant


@triton.jit
def _store(p_param, p_ema, p_copy, b_param, o_block, m_block, ema_rate):
    """The parameter, its moving average and its copy in another precision, each `[BLOCK]`; the last two may be None."""
    tl.store(p_param + o_block, b_param, m_block)
    if p_ema is not None:
        # [BLOCK]
        b_ema = tl.load(p_ema + o_block, m_block)
        tl.store(p_ema + o_block, b_ema + ema_rate * (b_param - b_ema), m_block)
    if p_copy is not None:
        tl.store(p_copy + o_block, b_param.to(p_copy.dtype.element_ty), m_block)


@triton.jit
def _clear(p_grad, o_block, m_block, BLOCK: tl.constexpr):
    """Zero the gradient, once all threads have read it."""
    # The zeros depend on no load: without the barrier a thread might write them before another one has read.
    tl.debug_barrier()
    tl.store(p_grad + o_block, tl.zeros([BLOCK], tl.float32), m_block)


@triton.jit
def sgd_update_kernel(
    p_param, p_grad, p_momentum, p_ema, p_copy, p_lr, p_scale, p_ok, size, momentum, weight_decay, ema_rate, BLOCK: tl.constexpr
):
    """As `reference.sgd`; `ema_rate` is 1 − the average's decay."""
    # [BLOCK]
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    if tl.load(p_ok) != 0:
        # [BLOCK]
        b_param = tl.load(p_param + o_block, m_block)
        b_grad = tl.load(p_scale).to(tl.float32) * tl.load(p_grad + o_block, m_block) + weight_decay * b_param
        b_momentum = momentum * tl.load(p_momentum + o_block, m_block) + b_grad
        tl.store(p_momentum + o_block, b_momentum, m_block)
        b_param -= tl.load(p_lr).to(tl.float32) * b_momentum
        _store(p_param, p_ema, p_copy, b_param, o_block, m_block, ema_rate)
    _clear(p_grad, o_block, m_block, BLOCK)


@triton.jit
def adamw_update_kernel(
    p_param,
    p_grad,
    p_first,
    p_second,
    p_ema,
    p_copy,
    p_count,
    p_lr,
    p_scale,
    p_ok,
    size,
    rate1,
    rate2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    ema_rate,
    BLOCK: tl.constexpr,
):
    """As `reference.adamw`; `rate1` and `rate2` are 1 − the betas, `ema_rate` is 1 − the average's decay."""
    # [BLOCK]
    o_block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    if tl.load(p_ok) != 0:
        # Bias corrections: scalars, the same for all elements.
        lr = tl.load(p_lr).to(tl.float32)
        count = tl.load(p_count).to(tl.float32)
        step = lr / _one_minus_exp(log_beta1 * count)
        root = tl.sqrt(_one_minus_exp(log_beta2 * count))
        # [BLOCK]
        b_param = tl.load(p_param + o_block, m_block)
        b_grad = tl.load(p_scale).to(tl.float32) * tl.load(p_grad + o_block, m_block)
        b_first = tl.load(p_first + o_block, m_block)
        b_second = tl.load(p_second + o_block, m_block)
        b_first += rate1 * (b_grad - b_first)
        b_second += rate2 * (b_grad * b_grad - b_second)
        tl.store(p_first + o_block, b_first, m_block)
        tl.store(p_second + o_block, b_second, m_block)
        b_param -= lr * weight_decay * b_param
        b_param -= step * b_first / (tl.sqrt(b_second) / root + eps)
        _store(p_param, p_ema, p_copy, b_param, o_block, m_block, ema_rate)
    _clear(p_grad, o_block, m_block, BLOCK)


@triton.jit
def _one_minus_exp(x):
    """1 − eˣ for x < 0, by Taylor's series near 0, where the difference would lose its digits."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7))
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    ema: Tensor | None,
    copy: Tensor | None,
    lr: Tensor,
    scale: Tensor,
    ok: Tensor,
    momentum: float,
    weight_decay: float,
    ema_decay: float,
    tile: Tile,
) -> None:
    """Update contiguous buffers of one size by SGD."""
    if not len(param):
        return
    launch: Any = sgd_update_kernel[(triton.cdiv(len(param), tile.blocks["BLOCK"]),)]
    buffers = (param, grad, momentum_buffer, ema, copy)
    launch(*buffers, lr, scale, ok.view(torch.uint8), len(param), momentum, weight_decay, 1 - ema_decay, **tile.launch())


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    copy: Tensor | None,
    count: Tensor,
    lr: Tensor,
    scale: Tensor,
    ok: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    tile: Tile,
) -> None:
    """Update contiguous buffers of one size by AdamW."""
    if not len(param):
        return
    launch: Any = adamw_update_kernel[(triton.cdiv(len(param), tile.blocks["BLOCK"]),)]
    buffers = (param, grad, exp_avg, exp_avg_sq, ema, copy)
    logarithms = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    rates = (1 - beta1, 1 - beta2, *logarithms, eps, weight_decay, 1 - ema_decay)
    launch(*buffers, count, lr, scale, ok.view(torch.uint8), len(param), *rates, **tile.launch())


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernel of a tile with and without a moving average, with and without a copy in bf16."""
    kernel: Any = sgd_update_kernel if tile.op == "sgd_update" else adamw_update_kernel
    for absent in (("p_ema", "p_copy"), ("p_copy",), ("p_ema",), ()):
        names = [name for name in kernel.arg_names if name not in (*absent, *tile.blocks)]
        kinds = {"p_copy": "*bf16", "p_ok": "*u8", "size": "i32"}
        yield Variant(
            kernel=kernel,
            signature={name: kinds.get(name, f"*{dtype}" if name.startswith("p_") else "fp32") for name in names},
            constants={**tile.blocks, **dict.fromkeys(absent)},
            divisible=tuple(name for name in names if name.startswith("p_") or name == "size"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
