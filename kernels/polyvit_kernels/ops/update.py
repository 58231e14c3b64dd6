"""Updates of flat parameter buffers in place."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sgd_(
    param: Float[Tensor, " size"],
    grad: Float[Tensor, " size"],
    momentum_buffer: Float[Tensor, " size"],
    *,
    lr: Float[Tensor, ""],
    scale: Float[Tensor, ""],
    ok: Bool[Tensor, ""],
    momentum: float,
    weight_decay: float,
) -> None:
    """One update of SGD with momentum, in place, with the gradient `scale * grad`; without `ok` neither `param` nor the buffer changes.

    The buffer starts at zero. `grad` is used up: its content afterwards is not defined. Nothing is sent to the host.
    """
    _check_flat(param, grad, momentum_buffer)
    torch.ops.aten._fused_sgd_(
        [param],
        [grad],
        [momentum_buffer],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=scale.reciprocal(),
        found_inf=ok.logical_not().float(),
    )


def adamw_(
    param: Float[Tensor, " size"],
    grad: Float[Tensor, " size"],
    exp_avg: Float[Tensor, " size"],
    exp_avg_sq: Float[Tensor, " size"],
    count: Float[Tensor, ""],
    *,
    lr: Float[Tensor, ""],
    scale: Float[Tensor, ""],
    ok: Bool[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of AdamW (arXiv 1711.05101, algorithm 2), in place, with the gradient `scale * grad`; without `ok` nothing changes.

    `count` is the number of updates, this one included; both averages start at zero.
    `grad` is used up: its content afterwards is not defined. Nothing is sent to the host.
    """
    _check_flat(param, grad, exp_avg, exp_avg_sq)
    torch.ops.aten._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [count],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale.reciprocal(),
        found_inf=ok.logical_not().float(),
    )


def _check_flat(*buffers: Tensor) -> None:
    # torch's fused updates walk over raw memory: other layouts would be read wrongly, or beyond their end.
    if any(buffer.ndim != 1 or not buffer.is_contiguous() for buffer in buffers) or len({(len(b), b.dtype) for b in buffers}) > 1:
        shapes = ", ".join(f"{list(buffer.shape)} {buffer.dtype}" for buffer in buffers)
        raise ValueError(f"updates need contiguous flat buffers of one size and dtype, not {shapes}")
