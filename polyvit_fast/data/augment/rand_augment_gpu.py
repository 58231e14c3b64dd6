"""RandAugment of whole batches, in PyTorch on any device: the fourteen operations of `rand_augment`, with Pillow's results.

Pictures that undergo the same operation are changed together. Most operations are tables of 256 levels or moves of pixels, whose integers
are Pillow's; operations that blend may be 1 level off where the device fuses a product and a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from polyvit_fast.data.augment.operations import GREY, Operation
from polyvit_fast.data.device import send_array

Pictures = UInt8[Tensor, "batch height width 3"]
FIXED_POINT = 1 << 16  # Pillow's coordinates in the source picture count in fractions of a pixel
LUMA = (19595, 38470, 7471)  # of 1 << 16


def rand_augment(pictures: Pictures, operations: Sequence[Sequence[Operation]]) -> Pictures:
    """Each picture after its own `operations`, applied one after the other."""
    pictures = pictures.clone()
    for step in range(max(map(len, operations), default=0)):
        rows: dict[int, list[int]] = {}
        for row, own in enumerate(operations):
            if step < len(own):
                rows.setdefault(own[step].number, []).append(row)
        for number, chosen in rows.items():
            sent = send_array(np.array(chosen), pictures.device)
            strengths = np.array([operations[row][step].strength for row in chosen])
            pictures.index_copy_(0, sent, OPERATIONS[number](pictures.index_select(0, sent), strengths))
    return pictures


def _identity(x: Pictures, strengths: np.ndarray) -> Pictures:
    return x


def _autocontrast(x: Pictures, strengths: np.ndarray) -> Pictures:
    levels, present = _levels(x), _histograms(x) > 0
    low = torch.where(present, levels, 255).amin(-1, keepdim=True).double()
    high = torch.where(present, levels, 0).amax(-1, keepdim=True).double()
    scale = 255 / (high - low).clamp(min=1)
    return _look_up(x, torch.where(high > low, (levels * scale - low * scale).clamp(0, 255).long(), levels))


def _equalize(x: Pictures, strengths: np.ndarray) -> Pictures:
    levels, counts = _levels(x), _histograms(x)
    last = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255  # 0 when all pixels are equal
    below = counts.cumsum(-1) - counts
    table = (step // 2 + below) // step.clamp(min=1)
    return _look_up(x, torch.where(step > 0, table, levels).clamp(max=255))


def _solarize(x: Pictures, strengths: np.ndarray) -> Pictures:
    thresholds = np.round(256 * (1 - np.abs(strengths)))[:, None]
    return _map_levels(x, np.where(np.arange(256) < thresholds, np.arange(256), 255 - np.arange(256)))


def _posterize(x: Pictures, strengths: np.ndarray) -> Pictures:
    dropped = np.round(4 * np.abs(strengths)).astype(int)[:, None]
    return _map_levels(x, np.arange(256) >> dropped << dropped)


def _brightness(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _blend(x, torch.zeros_like(x[:, :1, :1]), strengths)


def _contrast(x: Pictures, strengths: np.ndarray) -> Pictures:
    means = (_grey(x).double().mean((1, 2), keepdim=True) + 0.5).to(torch.uint8)
    return _blend(x, means[..., None], strengths)


def _colour(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _blend(x, _grey(x)[..., None], strengths)


def _sharpness(x: Pictures, strengths: np.ndarray) -> Pictures:
    """Blend with a smoothed picture, whose outermost pixels are the picture's own."""
    planes = x.permute(0, 3, 1, 2).float()
    sums = 9 * functional.avg_pool2d(planes, 3, stride=1) + 4 * planes[..., 1:-1, 1:-1]
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = (sums.round() / 13 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return _blend(x, smooth, strengths)


def _rotate(x: Pictures, strengths: np.ndarray) -> Pictures:
    height, width = x.shape[1:3]
    angles = -np.radians(30 * strengths % 360)
    cos, sin = np.round(np.cos(angles), 15), np.round(np.sin(angles), 15)
    right = cos * (-width / 2) + sin * (-height / 2) + width / 2
    down = -sin * (-width / 2) + cos * (-height / 2) + height / 2
    return _move_pixels(x, np.stack([cos, sin, right, -sin, cos, down], -1))


def _shear_x(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _move_pixels(x, _matrices(strengths, (0, 0.3, 0, 0, 0, 0)))


def _shear_y(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _move_pixels(x, _matrices(strengths, (0, 0, 0, 0.3, 0, 0)))


def _translate_x(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _move_pixels(x, _matrices(strengths, (0, 0, 150 / 331 * x.shape[2], 0, 0, 0)))


def _translate_y(x: Pictures, strengths: np.ndarray) -> Pictures:
    return _move_pixels(x, _matrices(strengths, (0, 0, 0, 0, 0, 150 / 331 * x.shape[1])))


def _matrices(strengths: np.ndarray, at_full_strength: tuple[float, ...]) -> np.ndarray:
    return np.array([1, 0, 0, 0, 1, 0]) + strengths[:, None] * np.array(at_full_strength)


def _move_pixels(x: Pictures, matrices: np.ndarray) -> Pictures:
    """Move pixels: (x, y) shows the pixel nearest to (a x + b y + c, d x + e y + f), or grey where that lies outside."""
    height, width = x.shape[1:3]
    a, b, c, d, e, f = matrices.T
    centred = np.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    a, b, c, d, e, f = send_array(np.floor(centred * FIXED_POINT + 0.5).astype(np.int64), x.device)[:, :, None, None]
    down, right = (torch.arange(size, device=x.device) for size in (height, width))
    columns = (a * right + b * down[:, None] + c) // FIXED_POINT
    rows = (d * right + e * down[:, None] + f) // FIXED_POINT
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    positions = torch.where(inside, rows * width + columns, 0).flatten(1)
    moved = x.flatten(1, 2).gather(1, positions[..., None].expand(-1, -1, 3)).view_as(x)
    return torch.where(inside[..., None], moved, GREY[0])


def _blend(x: Pictures, other: UInt8[Tensor, "batch rows columns channels"], strengths: np.ndarray) -> Pictures:
    """A blend that leads from `other` towards, and beyond, `x`."""
    factors = send_array((1 + 0.9 * strengths).astype(np.float32), x.device)[:, None, None, None]
    start = other.float()
    return (start + factors * (x.float() - start)).clamp_(0, 255).to(torch.uint8)


def _grey(x: Pictures) -> UInt8[Tensor, "batch height width"]:
    red, green, blue = x.int().unbind(-1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + FIXED_POINT // 2 >> 16).to(torch.uint8)


def _levels(x: Pictures) -> Tensor:
    return torch.arange(256, device=x.device)


def _histograms(x: Pictures) -> Tensor:
    """int64 [batch, 3, 256]."""
    planes = x.permute(0, 3, 1, 2).flatten(2).long()
    counts = torch.zeros(*planes.shape[:2], 256, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(2, planes, torch.ones_like(planes))


def _look_up(x: Pictures, tables: Tensor) -> Pictures:
    """Each channel of each picture through its own table, [batch, 3, 256]."""
    planes = x.permute(0, 3, 1, 2)
    return tables.to(torch.uint8).gather(2, planes.flatten(2).long()).view(planes.shape).permute(0, 2, 3, 1)


def _map_levels(x: Pictures, tables: np.ndarray) -> Pictures:
    """Each picture through its own table, [batch, 256]."""
    return _look_up(x, send_array(tables.astype(np.uint8), x.device)[:, None].expand(-1, 3, -1))


OPERATIONS: tuple[Callable[[Pictures, np.ndarray], Pictures], ...] = (
    _identity,
    _autocontrast,
    _equalize,
    _rotate,
    _solarize,
    _colour,
    _posterize,
    _contrast,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
