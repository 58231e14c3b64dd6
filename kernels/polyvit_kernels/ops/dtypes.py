"""Checks of an operation's tensors, and the dtype in which autocast computes with them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def runs_registered(x: Tensor) -> bool:
    """Whether a public function calls its registered operation for `x`: on CUDA.

    On a CPU it calls torch's own operators, which torch differentiates: the result is the same, and a call takes a third of the time.
    """
    return x.is_cuda


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply `x`: autocast's where autocast is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would give `x` normalised: fp32 where autocast is on, else its own; on a CPU as on CUDA."""
    return torch.float32 if _is_cast(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast_on(x) else nullcontext()


def _is_cast(x: Tensor) -> bool:
    """Whether autocast casts `x`."""
    return is_autocast_on(x) and x.is_floating_point() and x.dtype is not torch.float64


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast, which knows no meta tensors, is on where `x` is."""
    device = x.device.type  # asked by name: before torch 2.13 torch.compile cannot trace torch.amp.is_autocast_available
    return device != "meta" and torch.is_autocast_enabled(device)


def check_floating(**tensors: Tensor | torch.dtype) -> None:
    """Raises ValueError when a tensor's dtype, or a dtype itself, is none of `FLOATING`."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor
        if dtype not in FLOATING:
            raise ValueError(f"{name} is {dtype}, but a floating-point dtype is needed: float16, bfloat16, float32 or float64")


def check_factors(factors: Tensor, stream: Tensor) -> None:
    """Raises ValueError unless there is a factor for each example of a residual stream, in fp32, or in fp64 for an fp64 stream."""
    dtype = torch.promote_types(stream.dtype, torch.float32)
    if stream.ndim < 2 or factors.shape != stream.shape[:1] or factors.dtype != dtype:
        needed = f"{list(stream.shape[:1])} {dtype}, one for each example of a stream {list(stream.shape)}"
        raise ValueError(f"factors are {list(factors.shape)} {factors.dtype}, but {needed}, are needed")
    check_one_device(stream=stream, factors=factors)


def check_one_device(**tensors: Tensor) -> None:
    """Raises ValueError when tensors lie on different devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device, not {found}")
