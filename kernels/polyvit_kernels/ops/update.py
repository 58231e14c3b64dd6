"""Optimizer steps that overwrite flat buffers of parameters."""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polyvit_kernels.ops.dtypes import check_floating, check_one_device
from polyvit_kernels.ops.registration import Pick, register

_SGD_BUFFERS = ("param", "grad", "momentum_buffer", "ema", "copy")
_ADAMW_BUFFERS = ("param", "grad", "exp_avg", "exp_avg_sq", "ema", "copy")


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
    """One step of SGD with momentum, which overwrites the buffers, with the gradient `scale * grad`; unless `ok` only `grad` changes.

    `lr`, `scale` and `ok` are 0-d tensors on the buffers' device. The momentum's buffer starts at zero. `ema` becomes
    `ema_decay * ema + (1 - ema_decay) * param`; `copy`, in fp16 or bf16, the new parameters. `grad` is zero afterwards, whether
    `ok` or not. Nothing is sent to the host. Raises ValueError when buffers do not go together or overlap in memory, or a number is no such
    tensor.
    """
    _check_flat(copy, ema=ema, param=param, grad=grad, momentum_buffer=momentum_buffer)
    _check_numbers(param, lr=lr, scale=scale, ok=ok)
    _sgd_op(param, grad, momentum_buffer, ema, copy, lr, scale, ok, momentum, weight_decay, ema_decay)


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
    """One step of AdamW (arXiv 1711.05101, algorithm 2) as `sgd_` does one of SGD; unless `ok` only `grad` changes.

    `count`, a 0-d tensor like `lr`, `scale` and `ok`, is the number of updates, this one included; both averages start at zero. `ema`,
    `copy`, `grad` and errors as in `sgd_`.
    """
    _check_flat(copy, ema=ema, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_numbers(param, count=count, lr=lr, scale=scale, ok=ok)
    _adamw_op(param, grad, exp_avg, exp_avg_sq, ema, copy, count, lr, scale, ok, *betas, eps, weight_decay, ema_decay)


def _check_flat(copy: Tensor | None, *, ema: Tensor | None, param: Tensor, **others: Tensor) -> None:
    # Updates walk over raw memory: other layouts would be read wrongly, or beyond their end.
    alike = {"param": param, **others} | ({} if ema is None else {"ema": ema})
    present = alike | ({} if copy is None else {"copy": copy})
    check_floating(**alike)
    if copy is not None and copy.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"copy is {copy.dtype}, but torch.float16 or torch.bfloat16 is needed")
    for name, buffer in present.items():
        if buffer.ndim != 1 or not buffer.is_contiguous():
            layout = f"the shape {list(buffer.shape)} and the strides {list(buffer.stride())}"
            raise ValueError(f"{name} has {layout}, but a contiguous flat buffer is needed")
        if len(buffer) != len(param):
            raise ValueError(f"{name} has {len(buffer)} elements and param {len(param)}, but buffers of one size are needed")
    for name, buffer in alike.items():
        if buffer.dtype != param.dtype:
            raise ValueError(f"{name} is {buffer.dtype} and param {param.dtype}, but one dtype is needed")
    check_one_device(**present)


def _check_numbers(param: Tensor, *, ok: Tensor, **numbers: Tensor) -> None:
    for name, number in (numbers | {"ok": ok}).items():
        if not isinstance(number, Tensor):
            kind = type(number).__name__
            article = "an" if kind[0] in "aeiou" else "a"
            raise ValueError(f"{name} is {article} {kind}, but a tensor of one number on {param.device} is needed")
        if number.ndim or number.device != param.device:
            found = f"{list(number.shape)} on {number.device}"
            raise ValueError(f"{name} is {found}, but a tensor of one number on {param.device}, of the shape [], is needed")
    check_floating(**numbers)
    if ok.dtype != torch.bool:
        raise ValueError(f"ok is {ok.dtype}, but torch.bool is needed")


def _check_apart(names: tuple[str, ...], buffers: tuple[Tensor | None, ...]) -> None:
    """Raises ValueError where two buffers overlap in memory; called inside the operation, as tensors that are traced have none."""
    present = [(buffer.data_ptr(), buffer.nbytes, name) for name, buffer in zip(names, buffers, strict=True) if buffer is not None]
    ordered = sorted(span for span in present if span[1])
    for (begin, size, name), (following, _, other) in pairwise(ordered):
        if begin + size > following:
            first, second = sorted((name, other), key=names.index)
            raise ValueError(f"{first} and {second} overlap in memory, but each buffer needs its own")


def _sgd(
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
    pick: Pick,
) -> None:
    _check_apart(_SGD_BUFFERS, (param, grad, momentum_buffer, ema, copy))
    tile = pick("sgd_update", param)
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import update

        return update.sgd(param, grad, momentum_buffer, ema, copy, lr, scale, ok, momentum, weight_decay, ema_decay, tile=tile)
    # As of torch 2.13 the fused updates of torch.optim have no public function on tensors.
    # At momentum 0 torch wants no buffer; its first step, at any other momentum, is what the formula then gives: the buffer set anew.
    torch.ops.aten._fused_sgd_(
        [param],
        [grad],
        [momentum_buffer],
        lr=lr.float(),
        momentum=momentum or 1.0,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=not momentum,
        grad_scale=scale.float().reciprocal(),
        found_inf=ok.logical_not().float(),
    )
    return _finish_update(param, grad, ema, copy, ok, ema_decay)


def _adamw(
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
    pick: Pick,
) -> None:
    _check_apart(_ADAMW_BUFFERS, (param, grad, exp_avg, exp_avg_sq, ema, copy))
    tile = pick("adamw_update", param)
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import update

        averages = (exp_avg, exp_avg_sq)
        return update.adamw(param, grad, *averages, ema, copy, count, lr, scale, ok, beta1, beta2, eps, weight_decay, ema_decay, tile=tile)
    torch.ops.aten._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [count.float()],
        lr=lr.float(),
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale.float().reciprocal(),
        found_inf=ok.logical_not().float(),
    )
    return _finish_update(param, grad, ema, copy, ok, ema_decay)


def _finish_update(param: Tensor, grad: Tensor, ema: Tensor | None, copy: Tensor | None, ok: Tensor, ema_decay: float) -> None:
    """The moving average, the copy in a lower precision, and a gradient of zero for the next step."""
    if ema is not None:
        ema.copy_(torch.where(ok, ema.lerp(param, 1 - ema_decay), ema))
    if copy is not None:
        copy.copy_(torch.where(ok, param.to(copy.dtype), copy))
    grad.zero_()


_sgd_op = register("sgd_", _sgd, mutates=_SGD_BUFFERS)
_adamw_op = register("adamw_", _adamw, mutates=_ADAMW_BUFFERS)
