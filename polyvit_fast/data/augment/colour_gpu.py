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
"""A matrix to the right of rows of RGB, and below it what is added."""
LUMA_SHARES = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}  # of red and of blue in the brightness


def colour_map(colours: Colours) -> ColourMap:
    """The map of `recolour`."""
    matrix, offset = affine_map(*colours)
    return np.concatenate([matrix, np.full((1, 3), offset, np.float32)])


def bt709_map() -> ColourMap:
    """From RGB that was computed from YCbCr as of BT.601 to what it would be as of BT.709; what the former clipped stays lost."""
    matrix = np.linalg.inv(_to_rgb("BT.601")) @ _to_rgb("BT.709")
    return np.concatenate([matrix, np.zeros((1, 3))]).astype(np.float32)


def _to_rgb(standard: str) -> np.ndarray:
    """Rows are Y, Cb and Cr (from -1/2 to 1/2), columns red, green and blue."""
    red, blue = LUMA_SHARES[standard]
    green = 1 - red - blue
    return np.array([[1, 1, 1], [0, -2 * blue * (1 - blue) / green, 2 * (1 - blue)], [2 * (1 - red), -2 * red * (1 - red) / green, 0]])


def recolour(pictures: UInt8[Tensor, "batch height width 3"], maps: Sequence[ColourMap]) -> UInt8[Tensor, "batch height width 3"]:
    """Every picture through its own map. Equals the numpy form `colour.recolour` but for ties of rounding: at most 1 level apart."""
    sent = send_array(np.stack(maps), pictures.device)[:, :, None, None]
    levels = pictures.float()
    # Three products written out: a matrix product might be rounded to TF32 where the model's are.
    mapped = sent[:, 3] + levels[..., :1] * sent[:, 0]
    mapped = mapped.addcmul_(levels[..., 1:2], sent[:, 1]).addcmul_(levels[..., 2:], sent[:, 2])
    return mapped.round_().clamp_(0, 255).to(torch.uint8)


def mirror(pictures: UInt8[Tensor, "batch height width 3"], which: Sequence[bool]) -> UInt8[Tensor, "batch height width 3"]:
    """Those pictures left to right, the others as they are."""
    if not any(which):
        return pictures
    chosen = send_array(np.array(which), pictures.device)[:, None, None, None]
    return torch.where(chosen, pictures.flip(2), pictures)
