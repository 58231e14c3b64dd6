"""Grids to tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional


def patch_embed(
    grid: UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"],
    weight: Float[Tensor, "dim tubelet_frames tubelet_rows tubelet_columns channels"],
    bias: Float[Tensor, " dim"],
    cls_token: Float[Tensor, "1 1 dim"],
    pos_embed: Float[Tensor, "1 tokens dim"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch tokens dim"]:
    """A grid as tokens: normalised, cut into tubelets, projected, the class token put first, positions added to all of them.

    Tubelets are in the order (frames, rows, columns). `mean` and `std` are in the grid's units. Raises ValueError when sizes disagree.
    """
    _check_patch_embed(grid, weight, pos_embed)
    # Normalised in fp32 at least: bf16 knows a mean such as 123.7 only to within 0.25.
    precise = torch.promote_types(weight.dtype, torch.float32)
    split = grid
    for axis in (3, 2, 1):
        split = split.unflatten(axis, (-1, weight.shape[axis]))
    tubelets = split.permute(0, 1, 3, 5, 2, 4, 6, 7)
    patches = tubelets.to(precise, memory_format=torch.contiguous_format, copy=True).view(len(grid), -1, weight[0].numel())
    repeats = weight[0].numel() // len(mean)
    patches = patches.sub_(mean.to(precise).repeat(repeats)).div_(std.to(precise).repeat(repeats)).to(weight.dtype)
    # Channels are the weight's last axis as they are the grid's: gathering copies whole runs, and the weight is a matrix as it lies.
    embedded = functional.linear(patches, weight.flatten(1), bias)
    return torch.cat([cls_token.expand(len(grid), -1, -1), embedded], 1) + pos_embed


def _check_patch_embed(grid: Tensor, weight: Tensor, pos_embed: Tensor) -> None:
    if grid.ndim != 5:
        raise ValueError(f"the grid has the shape {list(grid.shape)}, but [batch, frames, rows, columns, channels] is needed")
    sizes, tubelet = list(grid.shape[1:4]), list(weight.shape[1:4])
    if grid.shape[4] != weight.shape[4]:
        raise ValueError(f"the grid has {grid.shape[4]} channels and the weight {weight.shape[4]}")
    if any(size % step for size, step in zip(sizes, tubelet, strict=True)):
        raise ValueError(f"a grid of (frames, rows, columns) = {sizes} does not divide into tubelets of {tubelet}")
    num_tokens = 1 + grid[0, ..., 0].numel() // weight[0, ..., 0].numel()
    if pos_embed.shape[1] != num_tokens:
        raise ValueError(
            f"a grid of {sizes} in tubelets of {tubelet} makes {num_tokens} tokens, but there are {pos_embed.shape[1]} positions"
        )
