"""What operations ask about their tensors: in which dtype to compute under autocast, and whether they lie together."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_one_device(**tensors: Tensor) -> None:
    """Raises ValueError when tensors lie on different devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device, not {places}")
