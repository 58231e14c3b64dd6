"""Pictures in memory, as the files that hold the same: each becomes a PPM, which the decoders read like any other file."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyvit_fast.data.image.file import picture_to_ppm, pixels_to_ppm
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.pixels import to_levels, to_numpy, to_rgb
from polyvit_fast.media import Media, MemoryMedia

WANTED = (
    "wanted is a picture of Pillow, or an array of uint8 from 0 to 255 or floats from 0 to 1 with the axes (rows, columns, channels), "
    "(channels, rows, columns), (rows, columns), or either of the first two after an axis of several pictures"
)


def read_pictures(image: Image, value: Any, name: str) -> list[Media]:
    """The pictures that an array or a picture of Pillow holds. Raises ValueError for other values, MediaError for colours unknown."""
    if hasattr(value, "getexif"):  # of Pillow
        return [MemoryMedia(name, content=picture_to_ppm(value, image.max_pixels))]
    array = to_numpy(value)
    if array is None:
        raise ValueError(f"an input of type {type(value).__name__} is no picture; {WANTED}")
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"an array of shape {list(array.shape)} is no picture; {WANTED}")
    levels = to_levels(array, WANTED)
    pictures = to_rgb(levels[..., None] if array.ndim == 2 else levels, WANTED)
    if pictures.ndim == 3:
        return [_as_file(pictures, name)]
    return [_as_file(picture, f"{name}[{number}]") for number, picture in enumerate(pictures)]


def _as_file(pixels: np.ndarray, name: str) -> Media:
    return MemoryMedia(name, content=pixels_to_ppm((pixels.shape[1], pixels.shape[0]), pixels.tobytes()))
