"""Videos in memory, cut into clips as files are: the same frames are chosen, scaled and cropped. Nothing is decoded, so they are grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from polyvit_fast.data.pixels import to_levels, to_numpy, to_rgb
from polyvit_fast.data.video.clips import frame_numbers, scale_size
from polyvit_fast.data.video.cpu import VideoDecoder
from polyvit_fast.data.video.frames import check_size
from polyvit_fast.data.video.modality import Video
from polyvit_fast.extras import require

WANTED = (
    "wanted is an array of uint8 from 0 to 255 or floats from 0 to 1 with the axes (frames, rows, columns, channels) or "
    "(frames, channels, rows, columns), or either after an axis of several videos"
)


def read_videos(video: Video, value: Any, name: str) -> list[Tensor]:
    """The evaluation views `[view, frames, rows, columns, 3]` of the videos that an array holds.

    Raises ValueError for other values, MediaError for frames that are too large.
    """
    array = to_numpy(value)
    if array is None:
        raise ValueError(f"an input of type {type(value).__name__} is no video; {WANTED}")
    if array.ndim not in (4, 5):
        raise ValueError(f"an array of shape {list(array.shape)} is no video; {WANTED}")
    videos = to_rgb(to_levels(array, WANTED), WANTED)
    return [_cut(video, one) for one in (videos if videos.ndim == 5 else videos[None])]


def _cut(video: Video, frames: UInt8[np.ndarray, "all height width 3"]) -> UInt8[Tensor, "view frames size size 3"]:
    require("reading videos", "av")
    import av
    from av.video.reformatter import VideoReformatter

    converter, numbers = VideoReformatter(), frame_numbers(video, len(frames), None)
    rows, columns = scale_size(video, frames.shape[1], frames.shape[2], None)
    clips = np.empty((*numbers.shape, rows, columns, 3), np.uint8)
    for number in np.unique(numbers):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[number]), "rgb24")
        check_size(frame, video.max_pixels)
        clips[numbers == number] = converter.reformat(frame, columns, rows, "rgb24", threads=1).to_ndarray()
    grid = np.empty((video.eval_views, *video.grid), np.uint8)
    VideoDecoder(video, train=False, num_threads=1).cut_views(clips, None, grid)
    return torch.from_numpy(grid)
