"""Videos on the GPU: NVDEC decodes, DALI scales and crops, PyTorch mirrors and changes colours.

NVDEC gets the files that it decodes like the CPU's decoder does, which the header and the first frame tell; the CPU decodes the others.
"""

from __future__ import annotations

import ctypes
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
from polyvit_fast.data.dali import Graph, new_pipeline, pieces
from polyvit_fast.data.device import DeviceDecoder, send, send_array
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.data.video.frames import Header, read_header
from polyvit_fast.data.video.modality import Draws, Video, VideoDecoder, corners, draw, frame_numbers, scaled
from polyvit_fast.media import Media, MediaError

PIECE_BYTES = 3 << 27  # files and frames of one run; a clip that alone needs more is the CPU's
FILE_BYTES = 1 << 26  # DALI reads a file through for every clip; of larger ones the CPU's decoder reads only what it needs
BUFFERED_FRAMES = 8  # that DALI holds for each file beside the wanted ones
CODECS = {"cuda": frozenset({"h264", "hevc", "vp8", "mpeg4"}), "cpu": frozenset({"vp8", "vp9"})}
"""What DALI's decoder for a device decodes into the frames that are asked for. The CPU's are AV1, which Hopper's NVDEC lacks, MPEG-2, which
DALI lacks there, and VP9, of which DALI 2.4 showed frames three too early on an H100 (driver 580.159), though not of every file."""
CONTAINERS = ("mov,", "matroska,")  # others have quirks: AVI stores more frames than there are, transport streams name no keyframes
SIDES = (144, 4096)  # the least of NVDEC's decoder for HEVC, the most of that for H.264
BT709 = 1
BT601 = (2, 5, 6)  # FFmpeg's numbers: unknown, and the two names of BT.601's matrix
NO_NVDEC = (
    "videos are decoded on the CPU: the driver's libnvcuvid.so.1 (NVDEC) cannot be opened ({}). In a container, start it with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
)


@dataclass(frozen=True)
class _Clip:
    """What of a file is wanted."""

    row: int
    media: Media
    file_bytes: int
    header: Header
    rng: np.random.Generator
    state: Any
    """Of `rng`, before anything was drawn for this file."""
    draws: Draws | None
    numbers: Int[np.ndarray, "clips frames"]
    squares: Float32[np.ndarray, "squares 4"]
    """Top, left, bottom and right of each, in pixels of the file."""

    @property
    def stored(self) -> Int[np.ndarray, " distinct"]:
        """The numbers of the frames that are decoded."""
        return np.unique(self.numbers)

    @property
    def decoded_bytes(self) -> int:
        """Of RGB that DALI holds at most."""
        return 3 * (self.numbers.size + BUFFERED_FRAMES) * self.header.height * self.header.width


class DeviceVideos(DeviceDecoder):
    """`on_cpu`'s grids, on a device: the same frames, squares, mirroring and colours.

    Grids are less than 1 level apart on average where FFmpeg converts colours exactly (frames that are scaled to an odd width), less than
    5 where it takes its quick way (that is DALI's decoder on the CPU; tests on a GPU hold NVDEC to 6); single pixels at sharp edges of
    colours, far more. Files in BT.709, which DALI takes for BT.601, get their own colours back, but for those that it clipped. NVDEC does
    not report damage in the middle of a file: it shows a flawed picture where the CPU's decoder raises MediaError. A file that NVDEC
    refuses is the CPU's from then on. DALI keeps up to 100 NVDEC sessions open, for all tasks together.
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
        """NVDEC's files in runs of `PIECE_BYTES` each, then the CPU's."""
        grid = torch.empty(len(media), self.videos.num_views, *self.video.grid, dtype=torch.uint8, device=self.device)
        clips = [clip for clip in map_in_threads(self._clip, list(zip(count(), media, rngs)), self.videos.num_threads) if clip]
        done: set[int] = set()
        for piece in pieces([clip.file_bytes + clip.decoded_bytes for clip in clips], PIECE_BYTES) if clips else ():
            done |= self._decode_or_refuse(clips[piece], grid)
        if len(clips) > 1 and not done:  # of a single one, `refused_files` tells all: it says nothing about NVDEC
            raise MediaError("NVDEC refuses all of a batch")
        others = [row for row in range(len(media)) if row not in done]
        if others:
            decoded = send(self.videos([media[row] for row in others], [rngs[row] for row in others]), self.device)
            for row, own in zip(others, decoded, strict=True):
                grid[row] = own
        return grid

    def _clip(self, sample: tuple[int, Media, np.random.Generator]) -> _Clip | None:
        """None for a file that is the CPU's; its generator stays untouched."""
        row, media, rng = sample
        header = _header(media, self.video.max_pixels) if self.codecs and media not in self.refused_files else None
        if header is None or not can_decode(header, self.codecs) or (file_bytes := _num_bytes(media)) > FILE_BYTES:
            return None
        if file_bytes + 3 * (self.num_frames + BUFFERED_FRAMES) * header.height * header.width > PIECE_BYTES:
            return None
        state = rng.bit_generator.state
        draws = draw(self.video, rng) if self.videos.train else None
        numbers, squares = frame_numbers(self.video, header.num_frames, draws), np.array(_squares(self.video, header, draws), np.float32)
        return _Clip(row, media, file_bytes, header, rng, state, draws, numbers, squares)

    def _decode_or_refuse(self, clips: Sequence[_Clip], grid: UInt8[Tensor, "sample view frames size size 3"]) -> set[int]:
        """The rows that were decoded. Of the others the generators are as they were."""
        try:
            self._decode_piece(clips, grid)
            return {clip.row for clip in clips}
        except MediaError:
            if len(clips) > 1:
                return set().union(*[self._decode_or_refuse([clip], grid) for clip in clips])
        self.refused_files.add(clips[0].media)
        clips[0].rng.bit_generator.state = clips[0].state
        return set()

    def _decode_piece(self, clips: Sequence[_Clip], grid: UInt8[Tensor, "sample view frames size size 3"]) -> None:
        self.count(sum(clip.file_bytes for clip in clips), sum(clip.decoded_bytes for clip in clips))
        outputs = self.squares.run(
            "its frames cannot be decoded",
            content=map_in_threads(lambda clip: np.frombuffer(clip.media.read(), np.uint8), clips, self.videos.num_threads),
            frames=[clip.stored.astype(np.int32) for clip in clips],
            squares=[clip.squares for clip in clips],
        )
        orders = send_array(np.stack([np.searchsorted(clip.stored, clip.numbers) for clip in clips]), self.device)
        for k, output in enumerate(outputs):
            for i, clip in enumerate(clips):
                frames = self.borrow(output[i])
                for number, order in enumerate(orders[i]):
                    torch.index_select(frames, 0, order, out=grid[clip.row, number * len(outputs) + k])
        for clip in clips:
            for view in grid[clip.row]:
                _change(view, clip)


def missing_nvdec(device: torch.device) -> str:
    """Why the driver's video decoder cannot be used; empty when it can, or is not needed."""
    try:
        if device.type == "cuda":
            ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        return str(error)
    return ""


def can_decode(header: Header, codecs: frozenset[str]) -> bool:
    """Whether DALI decodes such a file into the same frames and colours as the CPU's decoder."""
    return (
        header.plain
        and header.codec in codecs
        and header.container.startswith(CONTAINERS)
        and header.pixels == "yuv420p"
        and header.colorspace in (BT709, *BT601)
        and SIDES[0] <= min(header.height, header.width)
        and max(header.height, header.width) <= SIDES[1]
    )


@lru_cache(maxsize=1 << 16)
def _header(media: Media, max_pixels: int) -> Header:
    return read_header(media, max_pixels)


def _num_bytes(media: Media) -> int:
    with media.open() as file:
        return file.seek(0, 2)


def _squares(video: Video, header: Header, draws: Draws | None) -> list[tuple[float, float, float, float]]:
    height, width = scaled(video, header.height, header.width, draws)
    down, right = header.height / height, header.width / width
    places = corners(video, height, width, draws)
    return [(top * down, left * right, (top + video.size) * down, (left + video.size) * right) for top, left in places]


def _change(view: UInt8[Tensor, "frames size size 3"], clip: _Clip) -> None:
    """Colours and mirroring of one clip, in place."""
    maps: list[ColourMap] = [bt709_map()] if clip.header.colorspace == BT709 else []
    if clip.draws:
        if clip.draws.mirrored:
            view.copy_(view.flip(2))
        maps += [colour_map(colours) for colours in clip.draws.colours]
    for one in maps:
        view.copy_(recolour(view, [one]))


def _square_pipeline(size: int, num_crops: int, batch: int, num_threads: int, device: torch.device) -> Any:
    """DALI graph from files, numbers of frames and squares in them to squares of `size`: an output for each of a sample's squares.

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
        cut = [{"roi_start": squares[k, :2], "roi_end": squares[k, 2:]} for k in range(num_crops)]
        pipeline.set_outputs(*[fn.resize(frames, size=(size, size), **place, **linear) for place in cut])
    pipeline.build()
    return pipeline
