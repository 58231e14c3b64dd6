"""Images: any common file to a square uint8 grid.

DALI decodes the rectangle that is wanted, and of a JPEG little else. PyTorch resamples it (bilinear with antialiasing, within one level
of Pillow's) and numpy changes its colours: on a CPU both are faster than DALI's own operators (benchmarks/bench_data.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from polyvit_fast.config import Decoder, Modality
from polyvit_fast.data.augment.colour import Colours, draw_colours, recolour
from polyvit_fast.data.augment.rand_augment import Operation, augmented, draw_operations
from polyvit_fast.data.dali import Graph, UnavailableError, new_pipeline, pieces
from polyvit_fast.data.image.file import PIXELS_FAILURE, check_size, kind_of, read_for_dali, specimen
from polyvit_fast.data.image.jpeg import capture_stderr, check_grey, check_warnings
from polyvit_fast.data.image.tiff import check_complaints, check_parts
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media, MediaError

Box = tuple[int, int, int, int]
"""(top, left, height, width) of a rectangle, in pixels of the upright picture."""
CROP_ATTEMPTS = 10  # a 4:3 picture needs more than these once in 10^6 crops, a 2:1 picture once in 700
ASPECT_RATIOS = (3 / 4, 4 / 3)
MISSING_DECODER = (
    "{kind} files cannot be decoded on this machine, not even a whole one of 8 × 8 pixels: the package nvidia-nvimgcodec-cu13 probably "
    "lacks the library for them in its folder extensions, which pip install --force-reinstall nvidia-nvimgcodec-cu13 brings back ({error})"
)
PIECE_PIXELS = 1 << 26  # 192 MiB; a batch of photographs by a telephone would be gigabytes before they are resampled


@dataclass(frozen=True, kw_only=True)
class Image(Modality):
    """Pictures: the first of a file, turned upright as its EXIF tag says, alpha dropped, 16 bits rounded to 8.

    JPEG, PNG and WebP through DALI; BMP, TIFF, GIF, PPM and its kin, JPEG 2000, AVIF, QOI, ICO, CUR, ICNS, PSD, DDS, FTEX, BLP, SGI, Sun,
    PCX, DCX, Pixar, MSP, XBM, XPM, XV thumbnails, GIMP brushes, FLI, Photo CD and TGA through Pillow.
    """

    name: ClassVar[str] = "image"
    size: int = 224
    """Rows and columns of the grid."""
    patch: int = 16
    """Rows and columns of one token."""
    crop: Literal["inception", "resize_crop"] = "inception"
    """In training. inception: a random rectangle, stretched to the grid; resize_crop: a random square."""
    eval_crop: Literal["resize", "centre"] = "resize"
    """In evaluation. resize: the whole picture, stretched to the grid (as the paper); centre: the square in the middle."""
    min_area_ratio: float = 0.05
    """Smallest share of the picture that an inception crop covers; its aspect ratio lies between 3/4 and 4/3."""
    crop_ratio: float = 0.875
    """Side of the resize_crop and centre squares, as a share of the picture's short side (224 of 256)."""
    flip: bool = True
    """Mirror every other training picture left to right."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by a random factor up to this far from 1; 0 switches it off."""
    hue_jitter_degrees: float = 0.0
    """Hue is turned by up to this angle either way; 0 switches it off."""
    rand_augment_ops: int = 0
    """RandAugment's N: random operations on each training picture; 0 switches it off."""
    rand_augment_magnitude: float = 9.0
    """RandAugment's M: their strength, from 0 to 10."""
    max_pixels: int = 89_478_485
    """A larger picture counts as broken and is not decoded (the default is 256 MiB of RGB)."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Subtracted from red, green and blue (0 to 255) before the model."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        for name in ("min_area_ratio", "crop_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0 and at most 1")
        if not 0 <= self.colour_jitter <= 1 or not 0 <= self.hue_jitter_degrees <= 180:
            raise ValueError("colour_jitter must lie in [0, 1] and hue_jitter_degrees in [0, 180]")
        if self.rand_augment_ops < 0 or not 0 <= self.rand_augment_magnitude <= 10:
            raise ValueError("rand_augment_ops must not be negative and rand_augment_magnitude must lie in [0, 10]")
        if self.max_pixels <= 0 or min(self.std) <= 0:
            raise ValueError("max_pixels and std must be positive")

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """One frame of `size` x `size` RGB pixels."""
        return (1, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """One square patch."""
        return (1, self.patch, self.patch)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in levels of 0 to 255."""
        return self.mean, self.std

    @property
    def eval_views(self) -> int:
        """One: evaluation sees one fixed crop."""
        return 1

    def thorough(self) -> Image:
        """With the whole picture, and heeding what libjpeg and libtiff warn of: for a process that does nothing else meanwhile."""
        fields: dict[str, Any] = vars(self) | {"eval_crop": "resize"}
        return ThoroughImage(**fields)

    def decoder(self, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder:
        """Files to uint8 grids [sample, 1, 1, size, size, 3]; a batch with a broken file raises MediaError, the next one works."""
        on_cpu = self._on_cpu(batch, train, num_threads)
        if device == "cpu":
            on_cpu.prepare()
            return on_cpu
        from polyvit_fast.data.image.gpu import DeviceImages

        return DeviceImages(on_cpu, torch.device("cuda", torch.cuda.current_device()))

    def _on_cpu(self, batch: int, train: bool, num_threads: int) -> ImageDecoder:
        return ImageDecoder(self, batch, train, num_threads)


class ThoroughImage(Image):
    """Decodes file by file, and takes what libjpeg and libtiff say on standard error for a reason."""

    def _on_cpu(self, batch: int, train: bool, num_threads: int) -> ImageDecoder:
        return ThoroughDecoder(self, batch, train, num_threads)


@dataclass(frozen=True)
class Changes:
    """What happens to a picture after it was resampled. The default is nothing, as in evaluation."""

    mirrored: bool = False
    colours: Colours | None = None
    operations: Sequence[Operation] = ()


@dataclass(frozen=True)
class Wanted:
    """A file's content, and what of it is wanted: a part and its changes."""

    content: np.ndarray
    height: int
    width: int
    box: Box
    changes: Changes

    @property
    def by_pillow(self) -> bool:
        """Whether the content ends in the pixels themselves."""
        return self.content[:2].tobytes() == b"P6"

    def cut(self) -> UInt8[np.ndarray, "rows columns 3"]:
        """The pixels of the box, of a picture `by_pillow`."""
        top, left, height, width = self.box
        pixels = self.content[-3 * self.height * self.width :].reshape(self.height, self.width, 3)
        return pixels[top : top + height, left : left + width].copy()


class ImageDecoder:
    """Decodes on the CPU.

    What libjpeg and libtiff say on standard error of a damaged file that is decoded all the same, such as a progressive JPEG that lost some
    of its data, names no file; `check` does.
    """

    def __init__(self, image: Image, batch: int, train: bool, num_threads: int) -> None:
        self.image, self.batch, self.train, self.num_threads = image, batch, train, num_threads
        self.headers = Graph(lambda: _header_pipeline(batch))
        self.pixels = Graph(lambda: _pixel_pipeline(batch, num_threads))

    def prepare(self) -> None:
        """Build the graphs now, so that what is missing is told at once."""
        self.headers.ready()
        self.pixels.ready()

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """Grids; raises MediaError on a broken file, UnavailableError when nothing of its kind can be decoded here."""
        wanted = self.wanted(media, rngs)
        grid = np.empty((len(media), 1, *self.image.grid), np.uint8)
        for piece in pieces([one.box[2] * one.box[3] for one in wanted], PIECE_PIXELS):
            self._decode(wanted[piece], grid[piece, 0, 0])
        return torch.from_numpy(grid)

    def wanted(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> list[Wanted]:
        """Reads the files and their headers and draws all random numbers."""
        contents = map_in_threads(self._read, media, self.num_threads)
        wanted = []
        for content, (height, width), rng in zip(contents, self._sizes(contents), rngs, strict=True):
            box = self._choose_box(height, width, rng)
            wanted.append(Wanted(content, height, width, box, draw_changes(self.image, rng) if self.train else Changes()))
        return wanted

    def _decode(self, wanted: list[Wanted], out: np.ndarray) -> None:
        place = {i: n for n, i in enumerate(i for i, one in enumerate(wanted) if not one.by_pillow)}
        decoded = self._run([wanted[i] for i in place]) if place else []

        def fill(i: int) -> None:
            crop = torch.from_dlpack(decoded[place[i]]) if i in place else torch.from_numpy(wanted[i].cut())
            check_grey(wanted[i].content, crop.numpy()[-1, -1].tolist())
            out[i] = self._finish(crop, wanted[i].changes)

        map_in_threads(fill, range(len(wanted)), self.num_threads)

    def _run(self, wanted: list[Wanted]) -> Any:
        try:
            [crops] = self.pixels.run(PIXELS_FAILURE, **inputs(wanted))
        except MediaError:
            for kind in {kind_of(one.content[:16].tobytes()) for one in wanted}:
                self._check_decodable(kind)
            raise
        return crops

    def _check_decodable(self, kind: str) -> None:
        """Raises UnavailableError when no file of that kind can be decoded: then the files are not to blame."""
        try:
            content = specimen(kind) if kind else b""
        except (KeyError, OSError):  # Pillow, too, lacks what it takes
            return
        try:
            if content:
                box = np.array((0, 0, 8, 8), np.int32)
                self.pixels.run("a picture made for trial", content=[np.frombuffer(content, np.uint8)], box=[box])
        except MediaError as error:
            raise UnavailableError(MISSING_DECODER.format(kind=kind, error=error)) from error

    def _read(self, media: Media) -> np.ndarray:
        return np.frombuffer(read_for_dali(media, self.image.max_pixels), np.uint8)

    def _sizes(self, contents: list[np.ndarray]) -> list[tuple[int, int]]:
        begins = "" if len(contents) > 1 else f"; it begins with {bytes(contents[0][:16])!r}"
        [shapes] = self.headers.run(f"not an image that can be decoded{begins}", content=contents)
        sizes = [(int(height), int(width)) for height, width, _ in shapes.as_array()]
        for height, width in sizes:
            check_size(height, width, self.image.max_pixels)
        return sizes

    def _choose_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        side = max(1, round(self.image.crop_ratio * min(height, width)))
        if not self.train:
            centre = ((height - side) // 2, (width - side) // 2, side, side)
            return centre if self.image.eval_crop == "centre" else (0, 0, height, width)
        if self.image.crop == "inception":
            return _inception_box(height, width, self.image.min_area_ratio, rng)
        return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side

    def _finish(self, crop: UInt8[Tensor, "height width 3"], changes: Changes) -> UInt8[np.ndarray, "size size 3"]:
        # What follows the resampling is numpy, which has less to do for each call than PyTorch.
        image = self.image
        planes = crop[None].permute(0, 3, 1, 2)
        resampled = functional.interpolate(planes, (image.size, image.size), mode="bilinear", antialias=True)
        pixels = resampled[0].permute(1, 2, 0).numpy()
        if changes.mirrored:
            pixels = pixels[:, ::-1]
        if changes.colours:
            pixels = recolour(pixels, *changes.colours)
        if changes.operations:
            # In Pillow, not DALI: DALI's draws from a seed of its own, and is slower on a CPU (benchmarks/bench_data.py).
            pixels = augmented(np.ascontiguousarray(pixels), changes.operations)
        return pixels


class ThoroughDecoder(ImageDecoder):
    """Reads and decodes file by file, so that what libjpeg and libtiff warn of is known to be that file's."""

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """As of any decoder; of a damaged file it tells the libraries' own reason."""
        return torch.cat([self._decode_alone(one, rng) for one, rng in zip(media, rngs, strict=True)])

    def _decode_alone(self, media: Media, rng: np.random.Generator) -> Tensor:
        grid = torch.empty(0)
        failure = None
        with capture_stderr() as warnings:
            try:
                grid = super().__call__([media], [rng])
            except MediaError as error:
                failure = error
        content = media.read()
        check_warnings(content, warnings)  # the libraries know best why
        check_complaints(content, warnings)
        if failure:
            raise failure
        with capture_stderr():  # it says more of the bytes that are put in for trial
            check_parts(content, self.image.max_pixels)
        return grid


def draw_changes(image: Image, rng: np.random.Generator) -> Changes:
    """The random numbers of one training picture that follow its crop's."""
    mirrored = image.flip and rng.random() < 0.5
    jittered = image.colour_jitter or image.hue_jitter_degrees
    colours = draw_colours(rng, image.colour_jitter, image.hue_jitter_degrees) if jittered else None
    return Changes(mirrored, colours, draw_operations(rng, image.rand_augment_ops, image.rand_augment_magnitude))


def inputs(wanted: Sequence[Wanted]) -> dict[str, list[np.ndarray]]:
    """What a graph of `decoded_boxes` is run with."""
    return {"content": [one.content for one in wanted], "box": [np.array(one.box, np.int32) for one in wanted]}


def _inception_box(height: int, width: int, min_area_ratio: float, rng: np.random.Generator) -> Box:
    """A random part of the picture (Szegedy et al. 2015): its area uniform, its aspect ratio log-uniform."""
    areas = height * width * rng.uniform(min_area_ratio, 1, CROP_ATTEMPTS)
    ratios = np.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]), CROP_ATTEMPTS))
    heights, widths = np.sqrt(areas / ratios), np.sqrt(areas * ratios)
    fits = np.flatnonzero((heights <= height) & (widths <= width))
    if fits.size:
        box_height, box_width = float(heights[fits[0]]), float(widths[fits[0]])
    else:  # the picture is long and thin: the largest allowed rectangle
        box_width = min(width, height * ASPECT_RATIOS[1])
        box_height = min(height, box_width / ASPECT_RATIOS[0])
    rows, columns = max(1, round(box_height)), max(1, round(box_width))
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns


def _header_pipeline(batch: int) -> Any:
    """DALI graph from files to the sizes that their headers tell, EXIF rotation applied: it is what the other graph will decode."""
    pipeline, fn, types = new_pipeline(batch, 1)
    with pipeline:
        pipeline.set_outputs(fn.peek_image_shape(fn.external_source(name="content", dtype=types.UINT8, ndim=1)))
    pipeline.build()
    return pipeline


def _pixel_pipeline(batch: int, num_threads: int) -> Any:
    """DALI graph from files and boxes to the pixels in the boxes."""
    pipeline, fn, types = new_pipeline(batch, num_threads)
    with pipeline:
        pipeline.set_outputs(decoded_boxes(fn, types))
    pipeline.build()
    return pipeline


def decoded_boxes(fn: Any, types: Any, **options: Any) -> Any:
    """The part of a DALI graph from files and boxes to the pixels in the boxes; `options` are the decoder's."""
    content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
    box = fn.external_source(name="box", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(content, start=box[:2], shape=box[2:], axes=[0, 1], **options)
