"""Which rectangle of a picture becomes the grid and how it is augmented, and the DALI operators that the CPU and the GPU both use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from polyvit_fast.data.augment.colour import Colours, draw_colours
from polyvit_fast.data.augment.operations import Operation, draw_operations
from polyvit_fast.data.augment.random_erasing import Erasing, draw_erasing
from polyvit_fast.data.image.modality import Image

Box = tuple[int, int, int, int]
"""(top, left, height, width) of a rectangle, in pixels of the upright picture."""
CROP_ATTEMPTS = 10  # a 4:3 picture needs more than these once in 10^6 crops, a 2:1 picture once in 700
ASPECT_RATIOS = (3 / 4, 4 / 3)
CHUNK_PIXELS = 1 << 26  # decoded at a time, 192 MiB: a batch of photographs from a telephone takes gigabytes before it is resampled


@dataclass(frozen=True)
class Augmentation:
    """What is done to a picture after it was resampled. The default is nothing, as in evaluation."""

    mirrored: bool = False
    colours: Colours | None = None
    operations: Sequence[Operation] = ()
    erasing: Erasing | None = None


@dataclass(frozen=True)
class CropRequest:
    """A file's content, the size of its picture, the rectangle to decode, and the augmentation that follows."""

    content: np.ndarray
    height: int
    width: int
    box: Box
    augmentation: Augmentation

    @property
    def holds_pixels(self) -> bool:
        """Whether the content is a PPM, which ends in the pixels themselves: Pillow has decoded the file."""
        return self.content[:2].tobytes() == b"P6"

    def cut_box(self) -> UInt8[np.ndarray, "rows columns 3"]:
        """The pixels of the box, where the content `holds_pixels`."""
        top, left, height, width = self.box
        pixels = self.content[-3 * self.height * self.width :].reshape(self.height, self.width, 3)
        return pixels[top : top + height, left : left + width].copy()


def choose_training_box(image: Image, height: int, width: int, rng: np.random.Generator) -> Box:
    """A random rectangle of a picture of this size."""
    if image.crop == "inception":
        return _choose_inception_box(height, width, image.min_area_ratio, rng)
    side = _side(image, height, width)
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side


def choose_evaluation_box(image: Image, height: int, width: int) -> Box:
    """The whole picture, or the square in its middle."""
    if image.eval_crop == "resize":
        return 0, 0, height, width
    side = _side(image, height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def draw_augmentation(image: Image, rng: np.random.Generator) -> Augmentation:
    """A random augmentation of a training picture. It is drawn after the picture's box."""
    mirrored = image.flip and rng.random() < 0.5
    jittered = image.colour_jitter or image.hue_jitter_degrees
    colours = draw_colours(rng, image.colour_jitter, image.hue_jitter_degrees) if jittered else None
    operations = draw_operations(rng, image.rand_augment_ops, image.rand_augment_magnitude)
    return Augmentation(mirrored, colours, operations, _draw_erasing(image, rng))


def _draw_erasing(image: Image, rng: np.random.Generator) -> Erasing | None:
    if not image.random_erasing_prob:
        return None
    limits = image.random_erasing_area_ratios, image.random_erasing_aspect_ratio
    return draw_erasing(rng, image.random_erasing_prob, image.size, *limits)


def decode_boxes(fn: Any, types: Any, **options: Any) -> Any:
    """The operators of a DALI graph that lead from files and boxes to the pixels in the boxes; `options` are the decoder's."""
    content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
    box = fn.external_source(name="box", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(content, start=box[:2], shape=box[2:], axes=[0, 1], **options)


def box_inputs(requests: Sequence[CropRequest]) -> dict[str, list[np.ndarray]]:
    """The inputs of a graph with `decode_boxes`."""
    return {"content": [request.content for request in requests], "box": [np.array(request.box, np.int32) for request in requests]}


def _side(image: Image, height: int, width: int) -> int:
    return max(1, round(image.crop_ratio * min(height, width)))


def _choose_inception_box(height: int, width: int, min_area_ratio: float, rng: np.random.Generator) -> Box:
    """A random rectangle (Szegedy et al. 2015): its area is uniform, its aspect ratio log-uniform."""
    areas = height * width * rng.uniform(min_area_ratio, 1, CROP_ATTEMPTS)
    ratios = np.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]), CROP_ATTEMPTS))
    heights, widths = np.sqrt(areas / ratios), np.sqrt(areas * ratios)
    fits = np.flatnonzero((heights <= height) & (widths <= width))
    if fits.size:
        box_height, box_width = float(heights[fits[0]]), float(widths[fits[0]])
    else:  # the picture is long and thin: the largest rectangle with an allowed aspect ratio
        box_width = min(width, height * ASPECT_RATIOS[1])
        box_height = min(height, box_width / ASPECT_RATIOS[0])
    rows, columns = max(1, round(box_height)), max(1, round(box_width))
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns
