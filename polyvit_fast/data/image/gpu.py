"""Images on the GPU: nvJPEG decodes the rectangle (in hardware where there is an engine), DALI resamples it, PyTorch augments it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from polyvit_fast.data.augment.colour import Colours
from polyvit_fast.data.augment.colour_gpu import colour_map, mirror, recolour
from polyvit_fast.data.augment.rand_augment_gpu import rand_augment
from polyvit_fast.data.dali import Graph, new_pipeline, split_by_size
from polyvit_fast.data.device import GpuDecoder
from polyvit_fast.data.image.cpu import ImageDecoder
from polyvit_fast.data.image.crops import CHUNK_PIXELS, Augmentation, box_inputs, decode_boxes
from polyvit_fast.data.image.file import PIXELS_FAILURE
from polyvit_fast.data.image.jpeg import check_grey
from polyvit_fast.media import Media

# All that the hardware engine can decode goes through it. By default nvJPEG divides a batch between the engine and the SMs by its size,
# and a sample's pixels would depend on its neighbours. Colours are upsampled as the CPU's decoder does; no memory is reserved beforehand.
OPTIONS = {
    "device": "mixed",
    "hw_decoder_load": 1.0,
    "jpeg_fancy_upsampling": True,
    "affine": False,
    "device_memory_padding": 0,
    "host_memory_padding": 0,
}


class GpuImageDecoder(GpuDecoder):
    """The grids of `on_cpu`, made on a GPU: the same rectangle, mirroring, colours and operations, but resampled by DALI.

    From the same decoded pixels, grids differ by 0.25 levels on average and 1 at most, except in the outermost rows and columns, where
    DALI repeats the last pixel and PyTorch ignores what is missing: there by up to 25. Colour changes then stretch these differences,
    and an operation with a threshold may turn one level into many. nvJPEG rounds in its own way, too; tests on a GPU require 2 levels on
    average at most.
    """

    def __init__(self, on_cpu: ImageDecoder, device: torch.device) -> None:
        super().__init__(on_cpu, device)
        self.images = on_cpu
        self.pictures = Graph(lambda: _picture_pipeline(on_cpu, device), fragile=True)
        self.graphs = [on_cpu.headers, on_cpu.pixels, self.pictures]

    def decode(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """In bounded memory: the engine may decode whole pictures, so each run gets at most `CHUNK_PIXELS` of them.

        Augmentation makes copies with several bytes for each level, so it goes through the batch in chunks too.
        """
        requests = self.images.request_crops(media, rngs)
        areas = [request.height * request.width for request in requests]
        outputs = []
        for chunk in split_by_size(areas, CHUNK_PIXELS):
            self.count(sum(len(request.content) for request in requests[chunk]), 3 * sum(areas[chunk]))
            [output] = self.pictures.run(PIXELS_FAILURE, **box_inputs(requests[chunk]))
            outputs.append(self.borrow(output.as_tensor()))
            for request, last_pixel in zip(requests[chunk], outputs[-1][:, -1, -1].tolist(), strict=True):
                check_grey(request.content, last_pixel)
        pictures, augmentations = torch.cat(outputs), [request.augmentation for request in requests]
        chunks = split_by_size([self.images.image.size**2] * len(requests), CHUNK_PIXELS // 4)  # floats need four times the bytes
        return torch.cat([augment(pictures[chunk], augmentations[chunk]) for chunk in chunks])[:, None, None]


def augment(pictures: UInt8[Tensor, "batch height width 3"], each: Sequence[Augmentation]) -> UInt8[Tensor, "batch height width 3"]:
    """Every picture after its own augmentation."""
    pictures = mirror(pictures, [one.mirrored for one in each])
    if any(one.colours for one in each):
        pictures = recolour(pictures, [colour_map(one.colours or Colours()) for one in each])
    if any(one.operations for one in each):
        pictures = rand_augment(pictures, [one.operations for one in each])
    if any(one.erasing for one in each):
        pictures = pictures.clone()  # what nothing has changed may be the decoder's own memory
        for picture, one in zip(pictures, each, strict=True):
            if one.erasing:
                one.erasing.apply(picture)
    return pictures


def _picture_pipeline(images: ImageDecoder, device: torch.device) -> Any:
    """DALI graph from files and boxes to grids."""
    pipeline, fn, types = new_pipeline(images.batch, images.num_threads, device.index)
    with pipeline:
        crops = decode_boxes(fn, types, **(OPTIONS if device.type == "cuda" else {}))
        size = images.image.size
        pipeline.set_outputs(fn.resize(crops, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True))
    pipeline.build()
    return pipeline
