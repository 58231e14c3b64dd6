"""Arrays of pictures in the layouts that people have, as the decoders have them: levels from 0 to 255, red, green and blue last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

CHANNELS = (1, 3, 4)
"""Grey; red, green, blue; the same with alpha, which is dropped as a decoder drops it."""


def to_numpy(value: Any) -> np.ndarray | None:
    """An array or tensor, on whichever device, as numpy's; None for what is neither."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return np.asarray(value) if hasattr(value, "__array__") else None


def to_levels(pixels: np.ndarray, wanted: str) -> UInt8[np.ndarray, "*shape"]:
    """Levels from 0 to 255, of uint8 as they are, of floats from 0 to 1 rounded as in a file. Raises ValueError, ending in `wanted`."""
    if pixels.size == 0:
        raise ValueError(f"an array of shape {list(pixels.shape)} is empty; {wanted}")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"an array of {pixels.dtype} does not say which number is white; {wanted}")
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not 0 <= lowest <= highest <= 1:  # also true of NaN
        advice = " (after a normalisation? The model normalises by itself)" if lowest < 0 else ""
        advice = " (levels? Divide them by 255, or make them uint8)" if lowest >= 0 and 1 < highest <= 255 else advice
        raise ValueError(f"an array of floats from {lowest:.4g} to {highest:.4g}{advice}; {wanted}")
    return np.rint(pixels * 255).astype(np.uint8)


def to_rgb(levels: UInt8[np.ndarray, "*shape a b c"], wanted: str) -> UInt8[np.ndarray, "*shape rows columns 3"]:
    """Red, green and blue in the last axis, from an array in which channels are the last axis or the third last."""
    first, last = levels.shape[-3] in CHANNELS, levels.shape[-1] in CHANNELS
    if first == last:
        fault = "may have its channels first or last" if first else "has no axis of 1, 3 or 4 channels, first or last"
        raise ValueError(f"an array of shape {list(levels.shape)} {fault}; {wanted}")
    levels = levels if last else np.moveaxis(levels, -3, -1)
    return levels.repeat(3, -1) if levels.shape[-1] == 1 else levels[..., :3]
