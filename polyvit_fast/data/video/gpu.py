"""Videos on the GPU: NVDEC decodes, DALI scales and crops, PyTorch mirrors and changes colours.

NVDEC gets the files that it decodes as the CPU's decoder does, by their headers and first frames. The CPU decodes all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from polyvit_fast.data.augment.colour_gpu import ColourMap, bt709_map, colour_map, recolour
from polyvit_fast.data.dali import Graph, new_pipeline, split_by_size
from polyvit_fast.data.device import GpuDecoder, send, send_array
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.data.video.clips import ClipDraws, draw_clip, frame_numbers, scale_size, square_corners
from polyvit_fast.data.video.cpu import VideoDecoder
from polyvit_fast.data.video.frames import VideoHeader, read_header
from polyvit_fast.data.video.modality import Video
from polyvit_fast.data.video.nvdec import BT709, CODECS, can_decode, missing_nvdec
from polyvit_fast.media import Media, MediaError

CHUNK_BYTES = 3 << 27  # files and frames of one run; a clip that alone needs more is decoded on the CPU
FILE_BYTES = 1 << 26  # DALI reads a whole file for every clip; of larger ones the CPU's decoder reads only what it needs
BUFFERED_FRAMES = 8  # that DALI holds for each file in addition to those of the clip
NO_NVDEC = (
    "videos are decoded on the CPU: the driver's libnvcuvid.so.1 (NVDEC) cannot be opened ({}). In a container, start it with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
)


@dataclass(frozen=True)
class _ClipRequest:
    """The frames and squares to decode from one file."""

    row: int
    media: Media
    file_bytes: int
    header: VideoHeader
    rng: np.random.Generator
    state: Any
    """Of `rng`, before anything was drawn for this file."""
    draws: ClipDraws | None
    numbers: Int[np.ndarray, "clips frames"]
    squares: Float32[np.ndarray, "squares 4"]
    """Top, left, bottom and right of each, in pixels of the file."""

    @property
    def distinct_numbers(self) -> Int[np.ndarray, " distinct"]:
        """The frames to decode, each once."""
        return np.unique(self.numbers)

    @property
    def decoded_bytes(self) -> int:
        """The most RGB that DALI holds for it."""
        return 3 * (self.numbers.size + BUFFERED_FRAMES) * self.header.height * self.header.width


class GpuVideoDecoder(GpuDecoder):
    """The grids of `on_cpu`, made on a GPU: the same frames, squares, mirroring and colours.

    Grids differ by less than 1 level on average where FFmpeg converts colours exactly (frames that are scaled to an odd width), and by
    less than 5 where it takes its fast path (measured with DALI's decoder on the CPU; tests on a GPU require less than 6 of NVDEC); single
    pixels at sharp edges of colours differ by far more. DALI takes files in BT.709 for BT.601: they get their own colours back, except
    those that it clipped. NVDEC does not report damage in the middle of a file: it shows a flawed picture where the CPU's decoder raises
    MediaError. A file that NVDEC refuses is decoded on the CPU from then on. DALI keeps up to 100 NVDEC sessions open, for all tasks
    together.
    """

    def __init__(self, on_cpu: VideoDecoder, batch: int, device: torch.device) -> None:
        super().__init__(on_cpu, device)
        self.videos, self.video = on_cpu, on_cpu.video
        missing = missing_nvdec(device)
        self.note = NO_NVDEC.format(missing) if missing else ""
        self.codecs = frozenset() if missing else CODECS[device.type]
        self.refused_files: set[Media] = set()
        self.num_frames = self.video.frames * (1 if on_cpu.train else self.video.eval_clips)
        num_crops = 1 if on_cpu.train else self.video.eval_crops
        self.squares = Graph(lambda: _square_pipeline(self.video.size, num_crops, batch, on_cpu.num_threads, device), fragile=True)
        self.graphs = [self.squares]

    def decode(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample view frames size size 3"]:
        """First what NVDEC decodes, in runs of `CHUNK_BYTES` each, then the rest on the CPU."""
        grid = torch.empty(len(media), self.videos.num_views, *self.video.grid, dtype=torch.uint8, device=self.device)
        requests = map_in_threads(self._request_clips, list(zip(count(), media, rngs)), self.videos.num_threads)
        requests = [request for request in requests if request]
        done: set[int] = set()
        for chunk in split_by_size([one.file_bytes + one.decoded_bytes for one in requests], CHUNK_BYTES):
            done |= self._decode_or_refuse(requests[chunk], grid)
        if len(requests) > 1 and not done:  # a single file is in `refused_files`, and says nothing about NVDEC
            raise MediaError("NVDEC refuses all of a batch")
        others = [row for row in range(len(media)) if row not in done]
        if others:
            decoded = send(self.videos([media[row] for row in others], [rngs[row] for row in others]), self.device)
            for row, own in zip(others, decoded, strict=True):
                grid[row] = own
        return grid

    def _request_clips(self, sample: tuple[int, Media, np.random.Generator]) -> _ClipRequest | None:
        """None for a file that the CPU is to decode; its generator stays untouched."""
        row, media, rng = sample
        header = _header(media, self.video.max_pixels) if self.codecs and media not in self.refused_files else None
        if header is None or not can_decode(header, self.codecs) or (file_bytes := _num_bytes(media)) > FILE_BYTES:
            return None
        if file_bytes + 3 * (self.num_frames + BUFFERED_FRAMES) * header.height * header.width > CHUNK_BYTES:
            return None
        state = rng.bit_generator.state
        draws = draw_clip(self.video, rng) if self.videos.train else None
        numbers, squares = frame_numbers(self.video, header.num_frames, draws), np.array(_squares(self.video, header, draws), np.float32)
        return _ClipRequest(row, media, file_bytes, header, rng, state, draws, numbers, squares)

    def _decode_or_refuse(self, requests: Sequence[_ClipRequest], grid: UInt8[Tensor, "sample view frames size size 3"]) -> set[int]:
        """The rows that were decoded. The generators of the others are put back to where they were."""
        try:
            self._decode_chunk(requests, grid)
            return {request.row for request in requests}
        except MediaError:
            if len(requests) > 1:
                return set().union(*[self._decode_or_refuse([request], grid) for request in requests])
        self.refused_files.add(requests[0].media)
        requests[0].rng.bit_generator.state = requests[0].state
        return set()

    def _decode_chunk(self, requests: Sequence[_ClipRequest], grid: UInt8[Tensor, "sample view frames size size 3"]) -> None:
        self.count(sum(request.file_bytes for request in requests), sum(request.decoded_bytes for request in requests))
        outputs = self.squares.run(
            "its frames cannot be decoded",
            content=map_in_threads(lambda request: np.frombuffer(request.media.read(), np.uint8), requests, self.videos.num_threads),
            frames=[request.distinct_numbers.astype(np.int32) for request in requests],
            squares=[request.squares for request in requests],
        )
        orders = send_array(np.stack([np.searchsorted(one.distinct_numbers, one.numbers) for one in requests]), self.device)
        for k, output in enumerate(outputs):
            for i, request in enumerate(requests):
                frames = self.borrow(output[i])
                for number, order in enumerate(orders[i]):
                    torch.index_select(frames, 0, order, out=grid[request.row, number * len(outputs) + k])
        for request in requests:
            for view in grid[request.row]:
                _augment(view, request)


@lru_cache(maxsize=1 << 16)
def _header(media: Media, max_pixels: int) -> VideoHeader:
    return read_header(media, max_pixels)


def _num_bytes(media: Media) -> int:
    with media.open() as file:
        return file.seek(0, 2)


def _squares(video: Video, header: VideoHeader, draws: ClipDraws | None) -> list[tuple[float, float, float, float]]:
    height, width = scale_size(video, header.height, header.width, draws)
    down, right = header.height / height, header.width / width
    corners = square_corners(video, height, width, draws)
    return [(top * down, left * right, (top + video.size) * down, (left + video.size) * right) for top, left in corners]


def _augment(view: UInt8[Tensor, "frames size size 3"], request: _ClipRequest) -> None:
    """Write over a clip: correct its colours, mirror it and change its colours."""
    maps: list[ColourMap] = [bt709_map()] if request.header.colorspace == BT709 else []
    if request.draws:
        if request.draws.mirrored:
            view.copy_(view.flip(2))
        maps += [colour_map(colours) for colours in request.draws.colours]
    for one in maps:
        view.copy_(recolour(view, [one]))


def _square_pipeline(size: int, num_crops: int, batch: int, num_threads: int, device: torch.device) -> Any:
    """DALI graph from files, frame numbers and squares in frames to squares of `size`: an output for each of a sample's squares.

    A square is resampled straight from the frame, which is the same as scaling the frame and cutting the square out.
    """
    pipeline, fn, types = new_pipeline(batch, num_threads, device.index)
    with pipeline:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        squares = fn.external_source(name="squares", dtype=types.FLOAT, ndim=2)
        options = {"device": "mixed", "affine": False} if device.type == "cuda" else {}
        frames = fn.decoders.video(content, frames=numbers, pad_mode="none", **options)
        linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
        regions = [{"roi_start": squares[k, :2], "roi_end": squares[k, 2:]} for k in range(num_crops)]
        pipeline.set_outputs(*[fn.resize(frames, size=(size, size), **region, **linear) for region in regions])
    pipeline.build()
    return pipeline
