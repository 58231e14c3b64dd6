"""Changes of colours of whole batches, in PyTorch on any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from polyvit_fast.data.augment.colour import Colours, affine_map
from polyvit_fast.data.device import send_array

ColourMap = Float32[np.ndarray, "rows=4 to=3"]
"""A matrix by which rows of RGB are multiplied from the right, and as its last row what is added."""
LUMA_WEIGHTS = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}  # of red and of blue


def colour_map(colours: Colours) -> ColourMap:
    """The change of colours as a map for `recolour`."""
    matrix, offset = affine_map(*colours)
    return np.concatenate([matrix, np.full((1, 3), offset, np.float32)])


def bt709_map() -> ColourMap:
    """The map from RGB that BT.601 made of YCbCr to the RGB that BT.709 would have made; what was clipped stays lost."""
    matrix = np.linalg.inv(_to_rgb("BT.601")) @ _to_rgb("BT.709")
    return np.concatenate([matrix, np.zeros((1, 3))]).astype(np.float32)


def _to_rgb(standard: str) -> np.ndarray:
    """The matrix from Y, Cb and Cr (-1/2 to 1/2), its rows, to red, green and blue, its columns."""
    red, blue = LUMA_WEIGHTS[standard]
    green = 1 - red - blue
    return np.array([[1, 1, 1], [0, -2 * blue * (1 - blue) / green, 2 * (1 - blue)], [2 * (1 - red), -2 * red * (1 - red) / green, 0]])


def recolour(pictures: UInt8[Tensor, "batch height width 3"], maps: Sequence[ColourMap]) -> UInt8[Tensor, "batch height width 3"]:
    """Every picture after its own map: equals `colour.recolour` except where rounding ties differ, by at most 1 level."""
    sent = send_array(np.stack(maps), pictures.device)[:, :, None, None]
    levels = pictures.float()
    # Three products instead of a matrix product, which would be rounded to TF32 where the model's are.
    mapped = sent[:, 3] + levels[..., :1] * sent[:, 0]
    mapped = mapped.addcmul_(levels[..., 1:2], sent[:, 1]).addcmul_(levels[..., 2:], sent[:, 2])
    return mapped.round_().clamp_(0, 255).to(torch.uint8)


def mirror(pictures: UInt8[Tensor, "batch height width 3"], which: Sequence[bool]) -> UInt8[Tensor, "batch height width 3"]:
    """The pictures, mirrored left to right where `which` is true."""
    if not any(which):
        return pictures
    chosen = send_array(np.array(which), pictures.device)[:, None, None, None]
    return torch.where(chosen, pictures.flip(2), pictures)
