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
from polyvit_fast.data.colour import jitter_colours, recolour
from polyvit_fast.data.frames import read_clips
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media

THOROUGH_CLIPS = 8  # of 32 frames with stride 2 they are 20 seconds, twice the length of Kinetics' files
Clip = UInt8[np.ndarray, "frames height width 3"]


@dataclass(frozen=True, kw_only=True)
class Video(Modality):
    """Clips: MP4, MOV, MKV, WebM, AVI and MPEG with H.264, HEVC, AV1, VP8, VP9, MPEG-4 or MJPEG, turned upright as the file says."""

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
        return _Decoder(self, train, num_threads)


class _Decoder:
    def __init__(self, video: Video, train: bool, num_threads: int) -> None:
        self.video, self.num_threads = video, num_threads
        self.num_views = 1 if train else video.eval_views
        self.read = self._random_clip if train else self._even_clips

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample view frames size size 3"]:
        grid = np.empty((len(media), self.num_views, *self.video.grid), np.uint8)

        def fill(i: int) -> None:
            self.read(media[i], rngs[i], grid[i])

        map_in_threads(fill, range(len(media)), self.num_threads)
        return torch.from_numpy(grid)

    def _random_clip(self, media: Media, rng: np.random.Generator, out: UInt8[np.ndarray, "1 frames size size 3"]) -> None:
        video = self.video
        start, top, left = rng.random(3)
        scales = rng.uniform(*video.scale_jitter, 2)

        def choose(count: int) -> Int[np.ndarray, "1 frames"]:
            return _numbers(video, count, np.array([int(start * (_last_start(video, count) + 1))]))

        [clip] = read_clips(media, choose, resize=lambda *size: _scaled(video, size, scales), max_pixels=video.max_pixels)
        height, width = clip.shape[1:3]
        clip = _square(clip, int(top * (height - video.size + 1)), int(left * (width - video.size + 1)), video.size)
        out[0] = self._recoloured(clip[:, :, ::-1] if video.flip and rng.random() < 0.5 else clip, rng)

    def _recoloured(self, clip: Clip, rng: np.random.Generator) -> Clip:
        video = self.video
        if (video.colour_jitter or video.hue_jitter_degrees) and rng.random() < video.colour_jitter_chance:
            clip = jitter_colours(clip, rng, video.colour_jitter, video.hue_jitter_degrees)
        if video.grey_chance and rng.random() < video.grey_chance:
            clip = recolour(clip, brightness=1.0, contrast=1.0, saturation=0.0, hue_degrees=0.0)
        return clip

    def _even_clips(self, media: Media, rng: np.random.Generator, out: UInt8[np.ndarray, "view frames size size 3"]) -> None:
        video = self.video

        def choose(count: int) -> Int[np.ndarray, "clips frames"]:
            places = np.linspace(0, 1, video.eval_clips) if video.eval_clips > 1 else np.array([0.5])
            return _numbers(video, count, np.rint(places * _last_start(video, count)).astype(int))

        clips = read_clips(media, choose, resize=lambda *size: _scaled(video, size, (1.0, 1.0)), max_pixels=video.max_pixels)
        places = (0.5,) if video.eval_crops == 1 else (0.0, 0.5, 1.0)
        spare = np.array(clips.shape[2:4]) - video.size
        along = np.array([spare[0] > spare[1], spare[0] <= spare[1]])
        corners = [np.where(along, np.rint(place * spare).astype(int), spare // 2) for place in places]
        out[:] = [_square(clip, int(top), int(left), video.size) for clip in clips for top, left in corners]


def _numbers(video: Video, count: int, starts: Int[np.ndarray, " clips"]) -> Int[np.ndarray, "clips frames"]:
    """The numbers of the frames of clips that start at `starts`, in a file of `count` frames, the last of which repeats."""
    return np.minimum(starts[:, None] + video.stride * np.arange(video.frames), count - 1)


def _last_start(video: Video, count: int) -> int:
    return max(0, count - (video.frames - 1) * video.stride - 1)


def _scaled(video: Video, size: tuple[int, ...], scales: Sequence[float] | np.ndarray) -> tuple[int, int]:
    """(height, width) of a frame whose short side was brought to `short_side` and whose sides were then scaled, at least the grid's."""
    height, width = (max(video.size, round(side * video.short_side / min(size) * scale)) for side, scale in zip(size, scales, strict=True))
    return height, width


def _square(clip: Clip, top: int, left: int, size: int) -> UInt8[np.ndarray, "frames size size 3"]:
    return clip[:, top : top + size, left : left + size]
