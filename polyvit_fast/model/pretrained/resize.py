"""Weights of one grid for another: kernels of tubelets with more or fewer frames and channels, positions of more or fewer tubelets."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Inflation = Literal["central", "average"]
Interpolation = Literal["bilinear", "bicubic"]
Tubelets = tuple[int, int, int]
"""How many there are along (frames, rows, columns)."""
Kernel = Float[Tensor, "dim frames rows columns channels"]
FittedKernel = Float[Tensor, "dim new_frames rows columns new_channels"]


def fit_kernel(kernel: Kernel, sizes: tuple[int, int, int, int], inflation: Inflation) -> tuple[FittedKernel, str]:
    """The kernel for tubelets of `sizes` (frames, rows, columns, channels), and what was done, "" where nothing was.

    central: of one frame's kernel the middle frame of the tubelet gets all, the others zeros; average: each gets an equal part, so that a
    still picture gives the same tokens with both (arXiv 2103.15691, section 3.4). Several frames for one are added up. Raises ValueError
    for other differences.
    """
    frames, rows, columns, channels = sizes
    done = []
    if kernel.shape[2:4] != (rows, columns):
        raise ValueError(f"its tubelets have {_times(kernel.shape[2:4])} pixels, the model's {_times((rows, columns))}")
    if kernel.shape[1] != frames:
        done.append(f"inflated to {frames} frames ({inflation})" if frames > 1 else f"{kernel.shape[1]} frames added up")
        kernel = _fit_frames(kernel, frames, inflation)
    if kernel.shape[4] != channels:
        if 1 not in (kernel.shape[4], channels):
            raise ValueError(f"its grid has {kernel.shape[4]} channels, the model's {channels}")
        done.append(f"{kernel.shape[4]} to {channels} channels")
        # One channel is the sum of equal ones, several equal ones have a part of it each.
        kernel = kernel.sum(4, keepdim=True).div(channels).expand(*kernel.shape[:4], channels)
    return kernel, ", ".join(done)


def _fit_frames(kernel: Kernel, frames: int, inflation: Inflation) -> FittedKernel:
    if frames == 1:
        return kernel.sum(1, keepdim=True)
    if kernel.shape[1] != 1:
        raise ValueError(f"its tubelets have {kernel.shape[1]} frames, the model's {frames}; only 1 becomes several, and several become 1")
    if inflation == "average":
        return kernel.div(frames).expand(-1, frames, -1, -1, -1)
    inflated = kernel.new_zeros(len(kernel), frames, *kernel.shape[2:])
    inflated[:, frames // 2] = kernel[:, 0]
    return inflated


def fit_positions(
    positions: Float[Tensor, "1 old dim"], old: Tubelets, new: Tubelets, interpolation: Interpolation
) -> tuple[Float[Tensor, "1 new dim"], str]:
    """Positions of `old` tubelets for `new` ones, and what was done, "" where nothing was.

    Rows and columns are resized: bilinear between aligned corners, as the paper's code does; bicubic with antialiasing, as timm does. One
    frame's positions are repeated for each new frame, and of several for one the mean is taken; other numbers of frames are interpolated.
    """
    done = []
    grid = positions.unflatten(1, old)[0].movedim(-1, 0)  # [dim, frames, rows, columns]
    if old[1:] != new[1:]:
        done.append(f"resized from {_times(old[1:])} to {_times(new[1:])} ({interpolation})")
        grid = _resize(grid.movedim(1, 0), new[1:], interpolation).movedim(0, 1)
    if old[0] != new[0]:
        done.append(_describe_frames(old[0], new[0]))
        grid = _fit_times(grid, new[0])
    return grid.movedim(0, -1).reshape(1, math.prod(new), -1), ", ".join(done)


def _resize(grid: Float[Tensor, "frames dim rows columns"], size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if interpolation == "bilinear":
        return functional.interpolate(grid, size, mode="bilinear", align_corners=True)
    return functional.interpolate(grid, size, mode="bicubic", antialias=True)


def _fit_times(grid: Float[Tensor, "dim frames rows columns"], frames: int) -> Float[Tensor, "dim new_frames rows columns"]:
    if grid.shape[1] == 1:
        return grid.expand(-1, frames, -1, -1)
    if frames == 1:
        return grid.mean(1, keepdim=True)
    flat = grid.flatten(2).transpose(1, 2)  # [dim, rows * columns, frames]
    resized = functional.interpolate(flat, frames, mode="linear", align_corners=True)
    return resized.transpose(1, 2).unflatten(2, tuple(grid.shape[2:]))


def _describe_frames(old: int, new: int) -> str:
    return f"repeated for {new} frames" if old == 1 else f"mean of {old} frames" if new == 1 else f"interpolated from {old} to {new} frames"


def guess_tubelets(count: int, wanted: Tubelets) -> Tubelets | None:
    """How `count` tubelets lie in a grid that nothing tells, by the model's own that is `wanted`; None where nothing fits.

    The same grid; else more or fewer frames of the same rows and columns; else, of a grid that is no square, more or fewer rows, which are
    times; else a square of as many frames.
    """
    frames, rows, columns = wanted
    if count == math.prod(wanted):
        return wanted
    if frames > 1 and count % (rows * columns) == 0:
        return count // (rows * columns), rows, columns
    if frames == 1 and rows != columns and count % columns == 0:
        return 1, count // columns, columns
    side = math.isqrt(count // frames)
    return (frames, side, side) if side * side * frames == count else None


def _times(sizes: torch.Size | tuple[int, ...]) -> str:
    return " × ".join(map(str, sizes))
