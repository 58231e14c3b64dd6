"""Videos: any common file to clips of square uint8 frames.

PyAV decodes and scales, also what DALI's CPU decoder cannot read (H.264, HEVC, AV1); numpy crops and changes colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from polyvit_fast.config import Decoder, Modality
from polyvit_fast.data.augment.colour import GREY, Colours, draw_colours, recolour
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.data.video.frames import read_clips
from polyvit_fast.media import Media

THOROUGH_CLIPS = 8  # of 32 frames with stride 2 they are 20 seconds, twice the length of Kinetics' files
EVAL_PLACES = {1: (0.5,), 3: (0.0, 0.5, 1.0)}  # of the squares along the longer side


@dataclass(frozen=True, kw_only=True)
class Video(Modality):
    """Clips: MP4, MOV, MKV, WebM, AVI and MPEG with H.264, HEVC, AV1, VP8, VP9, MPEG-4 or MJPEG, turned and mirrored as it says."""

    name: ClassVar[str] = "video"
    size: int = 224
    """Rows and columns of the grid."""
    patch: int = 16
    """Rows and columns of one token."""
    frames: int = 32
    """Frames of a clip. A shorter video repeats its last frame."""
    stride: int = 2
    """Frames of the file from one frame of the clip to the next."""
    tubelet_frames: int = 4
    """Frames of one token."""
    short_side: int = 256
    """Pixels that a frame's shorter side is scaled to before it is cropped."""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """In training, height and width are each multiplied by a random factor in this range, before the crop (the paper: 0.9 1.33)."""
    flip: bool = True
    """Mirror every other training clip left to right. Switch it off where left and right mean something."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation of a clip are each multiplied by a random factor up to this far from 1; 0 switches it off."""
    hue_jitter_degrees: float = 0.0
    """Hue of a clip is turned by up to this angle either way; 0 switches it off."""
    colour_jitter_chance: float = 1.0
    """Share of training clips whose colours are changed."""
    grey_chance: float = 0.0
    """Share of training clips that lose their colours."""
    eval_clips: int = 1
    """Evenly spaced clips of a file in evaluation; one is the middle. Their logits are averaged."""
    eval_crops: Literal[1, 3] = 1
    """Squares of a clip in evaluation. 1: the middle; 3: both ends of the longer side too."""
    max_pixels: int = 33_177_600
    """A file with larger frames counts as broken and is not decoded (the default is 8K)."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Subtracted from red, green and blue (0 to 255) before the model."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "eval_clips", "max_pixels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.short_side < self.size:
            raise ValueError(f"short_side = {self.short_side} must be at least size = {self.size}")
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"scale_jitter = {self.scale_jitter} must be two positive numbers, the smaller first")
        if not 0 <= self.colour_jitter <= 1 or not 0 <= self.hue_jitter_degrees <= 180:
            raise ValueError("colour_jitter must lie in [0, 1] and hue_jitter_degrees in [0, 180]")
        for name in ("colour_jitter_chance", "grey_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1]")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """`frames` of `size` x `size` RGB pixels."""
        return (self.frames, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """A square patch of several frames."""
        return (self.tubelet_frames, self.patch, self.patch)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in levels of 0 to 255."""
        return self.mean, self.std

    @property
    def eval_views(self) -> int:
        """`eval_crops` of each of `eval_clips`."""
        return self.eval_clips * self.eval_crops

    def thorough(self) -> Video:
        """With clips from all over the file."""
        return replace(self, eval_clips=max(self.eval_clips, THOROUGH_CLIPS))

    def decoder(self, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder:
        """Files to uint8 grids [sample, view, frames, size, size, 3]; a broken file raises MediaError, the next call works."""
        on_cpu = VideoDecoder(self, train, num_threads)
        if device == "cpu":
            return on_cpu
        from polyvit_fast.data.video.gpu import DeviceVideos

        return DeviceVideos(on_cpu, batch, torch.device("cuda", torch.cuda.current_device()))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training clip: from 0 to 1, where in the file and in its frames it lies; and how it is changed."""

    start: float
    top: float
    left: float
    scales: tuple[float, float]
    mirrored: bool
    colours: tuple[Colours, ...]
    """Changes of colours, one after the other."""


class VideoDecoder:
    """Decodes on the CPU."""

    def __init__(self, video: Video, train: bool, num_threads: int) -> None:
        self.video, self.train, self.num_threads = video, train, num_threads
        self.num_views = 1 if train else video.eval_views

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample view frames size size 3"]:
        """Grids; raises MediaError on a broken file."""
        grid = np.empty((len(media), self.num_views, *self.video.grid), np.uint8)

        def fill(i: int) -> None:
            self._read(media[i], draw(self.video, rngs[i]) if self.train else None, grid[i])

        map_in_threads(fill, range(len(media)), self.num_threads)
        return torch.from_numpy(grid)

    def _read(self, media: Media, draws: Draws | None, out: UInt8[np.ndarray, "view frames size size 3"]) -> None:
        video = self.video
        clips = read_clips(
            media,
            lambda count: frame_numbers(video, count, draws),
            resize=lambda height, width: scaled(video, height, width, draws),
            max_pixels=video.max_pixels,
        )
        places = corners(video, clips.shape[2], clips.shape[3], draws)
        squares = [clip[:, top : top + video.size, left : left + video.size] for clip in clips for top, left in places]
        for view, square in zip(out, squares, strict=True):
            view[:] = _changed(square, draws) if draws else square


def draw(video: Video, rng: np.random.Generator) -> Draws:
    """A random clip."""
    start, top, left = rng.random(3)
    scales = rng.uniform(*video.scale_jitter, 2)
    mirrored = video.flip and rng.random() < 0.5
    colours = []
    if (video.colour_jitter or video.hue_jitter_degrees) and rng.random() < video.colour_jitter_chance:
        colours.append(draw_colours(rng, video.colour_jitter, video.hue_jitter_degrees))
    if video.grey_chance and rng.random() < video.grey_chance:
        colours.append(GREY)
    return Draws(start, top, left, (scales[0], scales[1]), mirrored, tuple(colours))


def frame_numbers(video: Video, count: int, draws: Draws | None) -> Int[np.ndarray, "clips frames"]:
    """The numbers of the clips' frames in a file of `count` frames, the last of which repeats: one random clip, or evenly spaced ones."""
    last_start = max(0, count - (video.frames - 1) * video.stride - 1)
    if draws:
        starts = np.array([int(draws.start * (last_start + 1))])
    else:
        places = np.linspace(0, 1, video.eval_clips) if video.eval_clips > 1 else np.array([0.5])
        starts = np.rint(places * last_start).astype(int)
    return np.minimum(starts[:, None] + video.stride * np.arange(video.frames), count - 1)


def scaled(video: Video, height: int, width: int, draws: Draws | None) -> tuple[int, int]:
    """(height, width) of a frame whose short side was brought to `short_side` and whose sides were then scaled, at least the grid's."""
    factors = draws.scales if draws else (1.0, 1.0)
    short = min(height, width)
    rows, columns = (max(video.size, round(s * video.short_side / short * f)) for s, f in zip((height, width), factors, strict=True))
    return rows, columns


def corners(video: Video, height: int, width: int, draws: Draws | None) -> list[tuple[int, int]]:
    """(top, left) of the squares of a clip whose frames were scaled to `height` and `width`."""
    spare = np.array([height, width]) - video.size
    if draws:
        return [(int(draws.top * (spare[0] + 1)), int(draws.left * (spare[1] + 1)))]
    along = np.array([spare[0] > spare[1], spare[0] <= spare[1]])
    squares = [np.where(along, np.rint(place * spare).astype(int), spare // 2) for place in EVAL_PLACES[video.eval_crops]]
    return [(int(top), int(left)) for top, left in squares]


def _changed(clip: UInt8[np.ndarray, "frames size size 3"], draws: Draws) -> UInt8[np.ndarray, "frames size size 3"]:
    if draws.mirrored:
        clip = clip[:, :, ::-1]
    for colours in draws.colours:
        clip = recolour(clip, *colours)
    return clip
