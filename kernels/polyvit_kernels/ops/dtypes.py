"""What operations ask about their tensors: in which dtype to compute under autocast, and whether they can be computed with."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply `x`: autocast's where autocast is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would give `x` normalised: fp32 where autocast is on, else its own; on a CPU as on CUDA."""
    return torch.float32 if _is_cast(x) else x.dtype


def _is_cast(x: Tensor) -> bool:
    """Whether autocast, which knows no meta tensors, is on for `x`."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return on and x.is_floating_point() and x.dtype is not torch.float64


def check_floating(**tensors: Tensor | torch.dtype) -> None:
    """Raises ValueError when a tensor's dtype, or a dtype itself, is none of `FLOATING`."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor
        if dtype not in FLOATING:
            raise ValueError(f"{name} is {dtype}, but a floating-point dtype is needed: float16, bfloat16, float32 or float64")


def check_one_device(**tensors: Tensor) -> None:
    """Raises ValueError when tensors lie on different devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device, not {places}")
