"""Random colours for training pictures, in numpy: on a CPU that is faster than DALI's own operator (benchmarks/bench_data.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

# NTSC's YIQ. Rows are brightness and two colour differences: hue is an angle in the plane of these two, saturation a radius.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Colours(NamedTuple):
    """A change of colours: three factors and an angle. The default changes nothing."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_degrees: float = 0.0


GREY = Colours(saturation=0.0)


def draw_colours(rng: np.random.Generator, jitter: float, hue_degrees: float) -> Colours:
    """Random brightness, contrast and saturation, up to `jitter` away from 1, and hue, up to `hue_degrees`."""
    brightness, contrast, saturation = rng.uniform(1 - jitter, 1 + jitter, 3)
    return Colours(brightness, contrast, saturation, rng.uniform(-1, 1) * hue_degrees)


def jitter_colours(
    pictures: UInt8[np.ndarray, "*frames height width 3"], rng: np.random.Generator, jitter: float, hue_degrees: float
) -> UInt8[np.ndarray, "*frames height width 3"]:
    """All pictures after the same random change of colours, as `draw_colours` draws it."""
    return recolour(pictures, *draw_colours(rng, jitter, hue_degrees))


def recolour(
    pictures: UInt8[np.ndarray, "*frames height width 3"], brightness: float, contrast: float, saturation: float, hue_degrees: float
) -> UInt8[np.ndarray, "*frames height width 3"]:
    """The pictures after one affine map of their colours: hue and saturation, then contrast about middle grey, then brightness."""
    matrix, offset = affine_map(brightness, contrast, saturation, hue_degrees)
    mapped = np.empty(pictures.shape, np.uint8)
    # Picture by picture: the intermediate results of one stay in the cache, those of a whole clip would not.
    for frame, out in zip(pictures.reshape(-1, *pictures.shape[-3:]), mapped.reshape(-1, *pictures.shape[-3:]), strict=True):
        out[:] = np.rint(frame.astype(np.float32) @ matrix + offset).clip(0, 255)
    return mapped


def affine_map(
    brightness: float, contrast: float, saturation: float, hue_degrees: float
) -> tuple[Float32[np.ndarray, "from=3 to=3"], np.float32]:
    """The matrix by which rows of RGB are multiplied from the right, and the number that is then added to all channels."""
    angle = math.radians(hue_degrees)
    turn = np.eye(3)
    turn[1:, 1:] = saturation * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = (brightness * contrast * (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ)).T.astype(np.float32)
    return matrix, np.float32(brightness * (1 - contrast) * 128)
