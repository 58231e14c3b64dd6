"""In which dtype an operation computes under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply `x`: autocast's where autocast is on, else its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
