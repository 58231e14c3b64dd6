"""Images on the CPU: DALI decodes the rectangle, PyTorch resamples it, numpy and Pillow augment it.

Of a JPEG, little more than the rectangle is decoded. PyTorch resamples bilinearly with antialiasing, within one level of Pillow's result.
It and numpy are faster on a CPU than DALI's own operators (benchmarks/bench_data.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from polyvit_fast.data.augment.colour import recolour
from polyvit_fast.data.dali import Graph, UnavailableError, new_pipeline, split_by_size
from polyvit_fast.data.image.crops import (
    CHUNK_PIXELS,
    Augmentation,
    CropRequest,
    box_inputs,
    choose_evaluation_box,
    choose_training_box,
    decode_boxes,
    draw_augmentation,
)
from polyvit_fast.data.image.file import PIXELS_FAILURE, check_size, kind_of, make_specimen, read_for_dali
from polyvit_fast.data.image.jpeg import capture_stderr, check_grey, check_warnings
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.image.tiff import check_complaints, check_strips
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media, MediaError

MISSING_DECODER = (
    "{kind} files cannot be decoded on this machine, not even a whole one of 8 × 8 pixels: the package nvidia-nvimgcodec-cu13 probably "
    "lacks the library for them in its folder extensions, which pip install --force-reinstall nvidia-nvimgcodec-cu13 brings back ({error})"
)


class ImageDecoder:
    """Image files to uint8 grids, on the CPU.

    Of a damaged file that can be decoded all the same, such as a progressive JPEG that lost some of its data, libjpeg and libtiff write
    warnings to standard error. They name no file; a run (`data/decoder_messages.py`) and the command `check` do.
    """

    def __init__(self, image: Image, batch: int, train: bool, num_threads: int) -> None:
        self.image, self.batch, self.train, self.num_threads = image, batch, train, num_threads
        self.headers = Graph(lambda: _header_pipeline(batch))
        self.pixels = Graph(lambda: _pixel_pipeline(batch, num_threads))

    def prepare(self) -> None:
        """Build the graphs now, so that a missing library is reported at once."""
        self.headers.ready()
        self.pixels.ready()

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """Grids. Raises MediaError on a broken file, UnavailableError when no file of its kind can be decoded on this machine."""
        requests = self.request_crops(media, rngs)
        grid = np.empty((len(media), 1, *self.image.grid), np.uint8)
        for chunk in split_by_size([request.box[2] * request.box[3] for request in requests], CHUNK_PIXELS):
            self._decode(requests[chunk], grid[chunk, 0, 0])
        return torch.from_numpy(grid)

    def request_crops(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> list[CropRequest]:
        """Read the files and their headers, and draw all random numbers."""
        contents = map_in_threads(self._read, media, self.num_threads)
        requests = []
        for content, (height, width), rng in zip(contents, self._read_sizes(contents), rngs, strict=True):
            if self.train:
                box = choose_training_box(self.image, height, width, rng)
                augmentation = draw_augmentation(self.image, rng)
            else:
                box, augmentation = choose_evaluation_box(self.image, height, width), Augmentation()
            requests.append(CropRequest(content, height, width, box, augmentation))
        return requests

    def _decode(self, requests: list[CropRequest], out: np.ndarray) -> None:
        encoded = [i for i, request in enumerate(requests) if not request.holds_pixels]
        crops = self._run([requests[i] for i in encoded]) if encoded else []
        position = {i: n for n, i in enumerate(encoded)}

        def fill(i: int) -> None:
            crop = torch.from_dlpack(crops[position[i]]) if i in position else torch.from_numpy(requests[i].cut_box())
            check_grey(requests[i].content, crop.numpy()[-1, -1].tolist())
            out[i] = self._finish(crop, requests[i].augmentation)
            if erasing := requests[i].augmentation.erasing:
                erasing.apply(out[i])

        map_in_threads(fill, range(len(requests)), self.num_threads)

    def _run(self, requests: list[CropRequest]) -> Any:
        try:
            [crops] = self.pixels.run(PIXELS_FAILURE, **box_inputs(requests))
        except MediaError:
            for kind in {kind_of(request.content[:16].tobytes()) for request in requests}:
                self._check_decodable(kind)
            raise
        return crops

    def _check_decodable(self, kind: str) -> None:
        """Raise UnavailableError when not even a good file of that kind can be decoded: then the files are not to blame."""
        try:
            content = make_specimen(kind) if kind else b""
        except (KeyError, OSError):  # Pillow, too, lacks what it takes
            return
        try:
            if content:
                box = np.array((0, 0, 8, 8), np.int32)
                self.pixels.run("a specimen", content=[np.frombuffer(content, np.uint8)], box=[box])
        except MediaError as error:
            raise UnavailableError(MISSING_DECODER.format(kind=kind, error=error)) from error

    def _read(self, media: Media) -> np.ndarray:
        return np.frombuffer(read_for_dali(media, self.image.max_pixels), np.uint8)

    def _read_sizes(self, contents: list[np.ndarray]) -> list[tuple[int, int]]:
        begins = "" if len(contents) > 1 else f"; it begins with {bytes(contents[0][:16])!r}"
        [shapes] = self.headers.run(f"not an image that can be decoded{begins}", content=contents)
        sizes = [(int(height), int(width)) for height, width, _ in shapes.as_array()]
        for height, width in sizes:
            check_size(height, width, self.image.max_pixels)
        return sizes

    def _finish(self, crop: UInt8[Tensor, "height width 3"], augmentation: Augmentation) -> UInt8[np.ndarray, "size size 3"]:
        # What follows the resampling is numpy, which costs less per call than PyTorch.
        image = self.image
        planes = crop[None].permute(0, 3, 1, 2)
        resampled = functional.interpolate(planes, (image.size, image.size), mode="bilinear", antialias=True)
        pixels = resampled[0].permute(1, 2, 0).numpy()
        if augmentation.mirrored:
            pixels = pixels[:, ::-1]
        if augmentation.colours:
            pixels = recolour(pixels, *augmentation.colours)
        if augmentation.operations:
            from polyvit_fast.data.augment.rand_augment import apply_operations

            # Pillow's RandAugment, as DALI's takes no random numbers from outside, and is slower on a CPU (benchmarks/bench_data.py).
            pixels = apply_operations(np.ascontiguousarray(pixels), augmentation.operations)
        return pixels


class ThoroughDecoder(ImageDecoder):
    """Reads and decodes file by file, so that each warning of libjpeg and libtiff is known to be about that file."""

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """As `ImageDecoder`. Of a damaged file, the MediaError states the libraries' own reason."""
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
        with capture_stderr():  # libtiff also complains of the bytes that are put in as a test
            check_strips(content, self.image.max_pixels)
        return grid


def _header_pipeline(batch: int) -> Any:
    """DALI graph from files to the sizes in their headers, EXIF rotation applied as the other graph will do."""
    pipeline, fn, types = new_pipeline(batch, 1)
    with pipeline:
        pipeline.set_outputs(fn.peek_image_shape(fn.external_source(name="content", dtype=types.UINT8, ndim=1)))
    pipeline.build()
    return pipeline


def _pixel_pipeline(batch: int, num_threads: int) -> Any:
    """DALI graph from files and boxes to the pixels in the boxes."""
    pipeline, fn, types = new_pipeline(batch, num_threads)
    with pipeline:
        pipeline.set_outputs(decode_boxes(fn, types))
    pipeline.build()
    return pipeline
