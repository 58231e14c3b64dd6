"""Random colours for training pictures, in numpy: on a CPU that is faster than DALI's own operator (benchmarks/bench_data.py)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

# Rows are brightness and two differences of colours (NTSC's YIQ): hue is an angle in the plane of the two, saturation a radius.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def jitter_colours(
    pictures: UInt8[np.ndarray, "*frames height width 3"], rng: np.random.Generator, jitter: float, hue_degrees: float
) -> UInt8[np.ndarray, "*frames height width 3"]:
    """All pictures with the same random brightness, contrast and saturation, up to `jitter` away from 1, and hue, up to `hue_degrees`."""
    brightness, contrast, saturation = rng.uniform(1 - jitter, 1 + jitter, 3)
    return recolour(pictures, brightness, contrast, saturation, rng.uniform(-1, 1) * hue_degrees)


def recolour(
    pictures: UInt8[np.ndarray, "*frames height width 3"], brightness: float, contrast: float, saturation: float, hue_degrees: float
) -> UInt8[np.ndarray, "*frames height width 3"]:
    """One affine map of the colours: hue and saturation, then contrast about middle grey, then brightness."""
    angle = math.radians(hue_degrees)
    turn = np.eye(3)
    turn[1:, 1:] = saturation * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = (brightness * contrast * (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ)).T.astype(np.float32)
    offset = np.float32(brightness * (1 - contrast) * 128)
    mapped = np.empty(pictures.shape, np.uint8)
    # Picture by picture, whose intermediate results stay in the cache; those of a whole clip would not.
    for frame, out in zip(pictures.reshape(-1, *pictures.shape[-3:]), mapped.reshape(-1, *pictures.shape[-3:]), strict=True):
        out[:] = np.rint(frame.astype(np.float32) @ matrix + offset).clip(0, 255)
    return mapped
