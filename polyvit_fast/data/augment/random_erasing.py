"""Random Erasing (arXiv 1708.04896, algorithm 1): a rectangle of a training picture becomes noise, each of its levels by itself.

The noise is drawn on the CPU for a GPU's decoder too, so that both have the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

ATTEMPTS = 100  # to find a rectangle that fits, as in the paper's code; with its settings 24 of 25 fit at once


@dataclass(frozen=True, eq=False)
class Erasing:
    """What is put into a picture, and where its first row and column are."""

    top: int
    left: int
    noise: UInt8[np.ndarray, "rows columns channels"]

    def apply(self, picture: UInt8[np.ndarray, "height width channels"] | UInt8[Tensor, "height width channels"]) -> None:
        """Overwrite the rectangle of a picture in memory or on a GPU."""
        rows, columns = self.noise.shape[:2]
        area = picture[self.top : self.top + rows, self.left : self.left + columns]
        if isinstance(area, Tensor):
            area.copy_(torch.from_numpy(self.noise))
        else:
            area[:] = self.noise


def draw_erasing(
    rng: np.random.Generator, prob: float, size: int, area_ratios: tuple[float, float], min_aspect_ratio: float
) -> Erasing | None:
    """What to erase of a square picture of `size` pixels a side, with the probability `prob`; else None.

    The rectangle's fraction of the picture is uniform between both `area_ratios`, its height over its width uniform between
    `min_aspect_ratio` and the inverse of that.
    """
    if rng.random() >= prob:
        return None
    for _ in range(ATTEMPTS):
        area, aspect = size * size * rng.uniform(*area_ratios), rng.uniform(min_aspect_ratio, 1 / min_aspect_ratio)
        rows, columns = max(1, round(sqrt(area * aspect))), max(1, round(sqrt(area / aspect)))
        if rows <= size and columns <= size:
            top, left = int(rng.integers(size - rows + 1)), int(rng.integers(size - columns + 1))
            return Erasing(top, left, rng.integers(0, 256, (rows, columns, 3), np.uint8))
    return None
