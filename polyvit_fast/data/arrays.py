"""Arrays and other values in memory, as the files of their modality that hold the same, or as the grids that those become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyvit_fast.config import Modality
from polyvit_fast.data.audio.arrays import read_waveform
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.arrays import read_pictures
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.pixels import to_numpy
from polyvit_fast.data.video.arrays import read_videos
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media

GRID_DIMENSIONS = 6  # that no array of pictures, videos or waveforms has
READERS: dict[type[Modality], Callable[[Any, Any, str], list[Any]]] = {Image: read_pictures, Video: read_videos, Audio: read_waveform}
"""By class of modality. A subclass without a line of its own is read as its parent class."""


def read_value(modality: Modality, value: Any, name: str) -> list[Media | Tensor]:
    """What one value in memory holds: media for the modality's decoder, or grids `[view, frames, rows, columns, channels]`.

    Arrays of six dimensions are grids as a decoder gives them, `[sample, view, frames, rows, columns, channels]`. Messages call the value
    `name`. Raises ValueError for a value that is none of the modality, and says what is wanted; MediaError for what is damaged.
    """
    try:
        if getattr(value, "ndim", 0) == GRID_DIMENSIONS:
            return list(_check_grids(modality, torch.as_tensor(to_numpy(value))))
        read = next((READERS[kind] for kind in type(modality).__mro__ if kind in READERS), None)
        if read is None:
            raise ValueError(f"an input of type {type(value).__name__} cannot be read; wanted are {_describe_grids(modality)}")
        return read(modality, value, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_grids(modality: Modality, grids: Tensor) -> Tensor:
    if grids.shape[2:] != modality.grid or not grids.numel() or not (grids.is_floating_point() or grids.dtype == torch.uint8):
        raise ValueError(f"grids of {grids.dtype} {list(grids.shape)}; wanted are {_describe_grids(modality)}")
    return grids.float() if grids.is_floating_point() else grids


def _describe_grids(modality: Modality) -> str:
    sizes = ", ".join(map(str, modality.grid))
    return f"grids [samples, views, {sizes}] as the decoder of {modality.name} gives them, uint8 or floats in its units"
