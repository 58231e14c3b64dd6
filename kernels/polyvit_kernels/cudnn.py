"""cuDNN's attention backward, which can begin from the log-sums that our forward leaves."""

import math

import torch
from torch import Tensor

from polyvit_kernels.tiles import Tile


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(the packed gradient, contiguous; an empty tensor). The last strides are 1, addresses and the other strides multiples of 16 bytes."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    unused = torch.zeros((), dtype=torch.int64, device=qkv.device)  # of the random numbers for dropout
    parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad.transpose(1, 2), q, k, v, out.transpose(1, 2), (lse * math.log(2)).unsqueeze(-1), unused, unused, None, None, None,
        qkv.shape[1], qkv.shape[1], 0.0, False,
    )  # fmt: skip
    return torch.stack([part.transpose(1, 2) for part in parts], 2), lse.new_empty(0)
