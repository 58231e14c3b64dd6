"""Videos on the CPU: PyAV decodes and scales, numpy crops and augments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from polyvit_fast.data.augment.colour import recolour
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.data.video.clips import ClipDraws, draw_clip, frame_numbers, scale_size, square_corners
from polyvit_fast.data.video.frames import read_clips
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media


class VideoDecoder:
    """Video files to uint8 grids, on the CPU."""

    def __init__(self, video: Video, train: bool, num_threads: int) -> None:
        self.video, self.train, self.num_threads = video, train, num_threads
        self.num_views = 1 if train else video.eval_views

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> UInt8[Tensor, "sample view frames size size 3"]:
        """Grids. Raises MediaError on a broken file."""
        grid = np.empty((len(media), self.num_views, *self.video.grid), np.uint8)

        def fill(i: int) -> None:
            self._read(media[i], draw_clip(self.video, rngs[i]) if self.train else None, grid[i])

        map_in_threads(fill, range(len(media)), self.num_threads)
        return torch.from_numpy(grid)

    def _read(self, media: Media, draws: ClipDraws | None, out: UInt8[np.ndarray, "view frames size size 3"]) -> None:
        video = self.video
        clips = read_clips(
            media,
            lambda count: frame_numbers(video, count, draws),
            resize=lambda height, width: scale_size(video, height, width, draws),
            max_pixels=video.max_pixels,
        )
        self.cut_views(clips, draws, out)

    def cut_views(
        self,
        clips: UInt8[np.ndarray, "clips frames rows columns 3"],
        draws: ClipDraws | None,
        out: UInt8[np.ndarray, "view frames size size 3"],
    ) -> None:
        """Write the squares of scaled clips into `out`, augmented as `draws` says."""
        video = self.video
        corners = square_corners(video, clips.shape[2], clips.shape[3], draws)
        squares = [clip[:, top : top + video.size, left : left + video.size] for clip in clips for top, left in corners]
        for view, square in zip(out, squares, strict=True):
            view[:] = _augment(square, draws) if draws else square


def _augment(clip: UInt8[np.ndarray, "frames size size 3"], draws: ClipDraws) -> UInt8[np.ndarray, "frames size size 3"]:
    if draws.mirrored:
        clip = clip[:, :, ::-1]
    for colours in draws.colours:
        clip = recolour(clip, *colours)
    return clip
