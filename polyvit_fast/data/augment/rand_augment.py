"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) by Pillow, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps

from polyvit_fast.data.augment.operations import GREY, Operation, draw_operations


def rand_augment(
    picture: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator, num_ops: int, magnitude: float
) -> UInt8[np.ndarray, "height width 3"]:
    """`picture` after `num_ops` operations drawn with replacement from the paper's 14, all at `magnitude` of 10.

    Magnitude 10 is the far end of AutoAugment's ranges (arXiv 1805.09501, table 6); 0 changes nothing, except for the three operations
    without a strength. Operations that have a direction get a random one.
    """
    return apply_operations(picture, draw_operations(rng, num_ops, magnitude))


def apply_operations(picture: UInt8[np.ndarray, "height width 3"], operations: Sequence[Operation]) -> UInt8[np.ndarray, "height width 3"]:
    """`picture` after `operations`, one after the other."""
    image = Pillow.fromarray(picture)
    for number, strength in operations:
        image = OPERATIONS[number](image, strength)
    return np.array(image)


def _identity(image: Pillow.Image, strength: float) -> Pillow.Image:
    return image


def _autocontrast(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageOps.equalize(image)


def _rotate(image: Pillow.Image, strength: float) -> Pillow.Image:
    return image.rotate(30 * strength, fillcolor=GREY)


def _solarize(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(strength))))


def _posterize(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _colour(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageEnhance.Color(image).enhance(1 + 0.9 * strength)


def _contrast(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength)


def _brightness(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength)


def _sharpness(image: Pillow.Image, strength: float) -> Pillow.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength)


def _shear_x(image: Pillow.Image, strength: float) -> Pillow.Image:
    return _affine(image, (1.0, 0.3 * strength, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Pillow.Image, strength: float) -> Pillow.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.3 * strength, 1.0, 0.0))


def _translate_x(image: Pillow.Image, strength: float) -> Pillow.Image:
    return _affine(image, (1.0, 0.0, 150 / 331 * strength * image.width, 0.0, 1.0, 0.0))


def _translate_y(image: Pillow.Image, strength: float) -> Pillow.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, 150 / 331 * strength * image.height))


def _affine(image: Pillow.Image, matrix: tuple[float, ...]) -> Pillow.Image:
    # Nearest pixel, as the paper's code, and much faster than bilinear.
    return image.transform(image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.NEAREST, fillcolor=GREY)


OPERATIONS: tuple[Callable[[Pillow.Image, float], Pillow.Image], ...] = (
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
