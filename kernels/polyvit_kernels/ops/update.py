"""Updates of flat parameter buffers in place."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polyvit_kernels import tiles
from polyvit_kernels.ops.dtypes import check_one_device


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
    ema: Float[Tensor, " size"] | None = None,
    ema_decay: float = 0.0,
    copy: Float[Tensor, " size"] | None = None,
) -> None:
    """One update of SGD with momentum, in place, with the gradient `scale * grad`; without `ok` nothing but `grad` changes.

    The buffer starts at zero. `ema` becomes `ema_decay * ema + (1 - ema_decay) * param`; `copy`, in another precision, the new parameters.
    `grad` is zero afterwards, without `ok` as well. Nothing is sent to the host. Raises ValueError when buffers do not go together.
    """
    _check_flat(param, grad, momentum_buffer, ema=ema, copy=copy)
    _check_numbers(param, lr=lr, scale=scale, ok=ok)
    _sgd(param, grad, momentum_buffer, ema, copy, lr, scale, ok, momentum, weight_decay, ema_decay)


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
    ema: Float[Tensor, " size"] | None = None,
    ema_decay: float = 0.0,
    copy: Float[Tensor, " size"] | None = None,
) -> None:
    """One update of AdamW (arXiv 1711.05101, algorithm 2), in place, with the gradient `scale * grad`; without `ok` only `grad` changes.

    `count` is the number of updates, this one included; both averages start at zero. `ema`, `copy`, `grad` and errors as in `sgd_`.
    """
    _check_flat(param, grad, exp_avg, exp_avg_sq, ema=ema, copy=copy)
    _check_numbers(param, count=count, lr=lr, scale=scale, ok=ok)
    _adamw(param, grad, exp_avg, exp_avg_sq, ema, copy, count, lr, scale, ok, *betas, eps, weight_decay, ema_decay)


def _check_flat(*buffers: Tensor, ema: Tensor | None, copy: Tensor | None) -> None:
    # Updates walk over raw memory: other layouts would be read wrongly, or beyond their end.
    alike = [*buffers, *([] if ema is None else [ema])]
    present = [*alike, *([] if copy is None else [copy])]
    flat = all(buffer.ndim == 1 and buffer.is_contiguous() for buffer in present)
    if not flat or len({b.dtype for b in alike}) > 1 or len({len(b) for b in present}) > 1:
        shapes = ", ".join(f"{list(buffer.shape)} {buffer.dtype}" for buffer in present)
        raise ValueError(f"updates need contiguous flat buffers of one size and dtype, not {shapes}")
    check_one_device(**{f"buffer {number}": buffer for number, buffer in enumerate(present)})


def _check_numbers(param: Tensor, **numbers: Tensor) -> None:
    for name, number in numbers.items():
        if number.ndim:
            raise ValueError(f"{name} has the shape {list(number.shape)}, but a single number is needed")
    check_one_device(param=param, **numbers)
    if numbers["ok"].dtype != torch.bool:
        raise ValueError(f"ok is {numbers['ok'].dtype}, but torch.bool is needed")


def _sgd_by_torch(
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
) -> None:
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
    _follow(param, grad, ema, copy, ok, ema_decay)


def _adamw_by_torch(
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
) -> None:
    torch.ops.aten._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [count],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale.reciprocal(),
        found_inf=ok.logical_not().float(),
    )
    _follow(param, grad, ema, copy, ok, ema_decay)


def _follow(param: Tensor, grad: Tensor, ema: Tensor | None, copy: Tensor | None, ok: Tensor, ema_decay: float) -> None:
    """What follows the parameters' update."""
    if ema is not None:
        ema.copy_(torch.where(ok, ema.lerp(param, 1 - ema_decay), ema))
    if copy is not None:
        copy.copy_(torch.where(ok, param.to(copy.dtype), copy))
    grad.zero_()


_sgd = torch.library.custom_op(
    "polyvit::sgd_", _sgd_by_torch, mutates_args=("param", "grad", "momentum_buffer", "ema", "copy"), device_types="cpu"
)
_adamw = torch.library.custom_op(
    "polyvit::adamw_", _adamw_by_torch, mutates_args=("param", "grad", "exp_avg", "exp_avg_sq", "ema", "copy"), device_types="cpu"
)


@_sgd.register_kernel("cuda")
def _sgd_cuda(param: Tensor, *others: Any) -> None:
    tile = tiles.pick_for("sgd_update", param)
    if tile.backend == "torch":
        return _sgd_by_torch(param, *others)
    from polyvit_kernels import update

    with torch.cuda.device_of(param):
        return update.sgd(param, *others, tile=tile)


@_adamw.register_kernel("cuda")
def _adamw_cuda(param: Tensor, *others: Any) -> None:
    tile = tiles.pick_for("adamw_update", param)
    if tile.backend == "torch":
        return _adamw_by_torch(param, *others)
    from polyvit_kernels import update

    with torch.cuda.device_of(param):
        return update.adamw(param, *others, tile=tile)
