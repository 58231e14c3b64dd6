"""Images on the GPU: nvJPEG decodes the wanted rectangle (its hardware engine where there is one), DALI resamples it, PyTorch the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from polyvit_fast.data.augment.colour import Colours
from polyvit_fast.data.augment.colour_gpu import colour_map, mirrored, recolour
from polyvit_fast.data.augment.rand_augment_gpu import rand_augment
from polyvit_fast.data.dali import Graph, new_pipeline, pieces
from polyvit_fast.data.device import DeviceDecoder
from polyvit_fast.data.image.jpeg import check_grey
from polyvit_fast.data.image.modality import PIECE_PIXELS, PIXELS_FAILURE, Changes, ImageDecoder, decoded_boxes, inputs
from polyvit_fast.media import Media

# nvJPEG is told to leave nothing out of the hardware engine that the engine can decode: by default it shares a batch out by its size,
# and a sample's pixels would depend on its neighbours. It smooths colours like the CPU's decoder, and reserves no memory beforehand.
OPTIONS = {
    "device": "mixed",
    "hw_decoder_load": 1.0,
    "jpeg_fancy_upsampling": True,
    "affine": False,
    "device_memory_padding": 0,
    "host_memory_padding": 0,
}


class DeviceImages(DeviceDecoder):
    """`on_cpu`'s grids, on a device. The same rectangle, mirroring, colours and operations; resampled by DALI.

    From the same decoded pixels grids are 0.25 levels apart on average and 1 at most, but for the outermost rows and columns, where DALI
    repeats the last pixel and PyTorch ignores what is missing: there 25. Colours then stretch these differences, and an operation with
    a threshold makes much of one level. nvJPEG's rounding comes on top: tests on a GPU hold all to 2 levels on average.
    """

    def __init__(self, on_cpu: ImageDecoder, device: torch.device) -> None:
        super().__init__(on_cpu, device)
        self.images = on_cpu
        self.pictures = Graph(lambda: _picture_pipeline(on_cpu, device), fragile=True)
        self.graphs = [on_cpu.headers, on_cpu.pixels, self.pictures]

    def decode(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample 1 1 size size 3"]:
        """Bounded memory: the engine may decode whole pictures, of which those of one run have `PIECE_PIXELS` together.

        Changes compute in copies of several bytes for each level, and so go through parts of the batch too.
        """
        wanted = self.images.wanted(media, rngs)
        areas = [one.height * one.width for one in wanted]
        outputs = []
        for piece in pieces(areas, PIECE_PIXELS):
            self.count(sum(len(one.content) for one in wanted[piece]), 3 * sum(areas[piece]))
            [output] = self.pictures.run(PIXELS_FAILURE, **inputs(wanted[piece]))
            outputs.append(self.borrow(output.as_tensor()))
            for one, last_pixel in zip(wanted[piece], outputs[-1][:, -1, -1].tolist(), strict=True):
                check_grey(one.content, last_pixel)
        pictures, changes = torch.cat(outputs), [one.changes for one in wanted]
        parts = pieces([self.images.image.size**2] * len(wanted), PIECE_PIXELS // 4)  # floats need four times the bytes
        return torch.cat([changed(pictures[part], changes[part]) for part in parts])[:, None, None]


def changed(pictures: UInt8[Tensor, "batch height width 3"], changes: Sequence[Changes]) -> UInt8[Tensor, "batch height width 3"]:
    """Each picture after its own changes."""
    pictures = mirrored(pictures, [one.mirrored for one in changes])
    if any(one.colours for one in changes):
        pictures = recolour(pictures, [colour_map(one.colours or Colours()) for one in changes])
    return rand_augment(pictures, [one.operations for one in changes]) if any(one.operations for one in changes) else pictures


def _picture_pipeline(images: ImageDecoder, device: torch.device) -> Any:
    """DALI graph from files and boxes to grids."""
    pipeline, fn, types = new_pipeline(images.batch, images.num_threads, device.index)
    with pipeline:
        crops = decoded_boxes(fn, types, **(OPTIONS if device.type == "cuda" else {}))
        size = images.image.size
        pipeline.set_outputs(fn.resize(crops, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True))
    pipeline.build()
    return pipeline
