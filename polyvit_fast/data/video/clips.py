"""Which frames of a video a clip shows, how they are scaled, and which squares are cut out of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from polyvit_fast.data.augment.colour import GREY, Colours, draw_colours
from polyvit_fast.data.video.modality import Video

CROP_OFFSETS = {1: (0.5,), 3: (0.0, 0.5, 1.0)}
"""Where evaluation's squares lie along the longer side, from its start (0) to its end (1), by how many there are."""


@dataclass(frozen=True)
class ClipDraws:
    """The random numbers of one training clip. `start`, `top` and `left` say, from 0 to 1, where it lies in the file and in its frames."""

    start: float
    top: float
    left: float
    scales: tuple[float, float]
    mirrored: bool
    colours: tuple[Colours, ...]
    """Changes of colours, one after the other."""


def draw_clip(video: Video, rng: np.random.Generator) -> ClipDraws:
    """A random clip."""
    start, top, left = rng.random(3)
    scales = rng.uniform(*video.scale_jitter, 2)
    mirrored = video.flip and rng.random() < 0.5
    colours = []
    if (video.colour_jitter or video.hue_jitter_degrees) and rng.random() < video.colour_jitter_prob:
        colours.append(draw_colours(rng, video.colour_jitter, video.hue_jitter_degrees))
    if video.grey_prob and rng.random() < video.grey_prob:
        colours.append(GREY)
    return ClipDraws(start, top, left, (scales[0], scales[1]), mirrored, tuple(colours))


def frame_numbers(video: Video, count: int, draws: ClipDraws | None) -> Int[np.ndarray, "clips frames"]:
    """The numbers of the clips' frames in a file of `count` frames: one random clip, or evenly spaced ones without `draws`.

    Where the file is too short, its last frame repeats.
    """
    last_start = max(0, count - (video.frames - 1) * video.stride - 1)
    if draws:
        starts = np.array([int(draws.start * (last_start + 1))])
    else:
        fractions = np.linspace(0, 1, video.eval_clips) if video.eval_clips > 1 else np.array([0.5])
        starts = np.rint(fractions * last_start).astype(int)
    return np.minimum(starts[:, None] + video.stride * np.arange(video.frames), count - 1)


def scale_size(video: Video, height: int, width: int, draws: ClipDraws | None) -> tuple[int, int]:
    """The (height, width) that a frame is scaled to: its short side to `short_side`, then both by the clip's factors, at least `size`."""
    factors = draws.scales if draws else (1.0, 1.0)
    short = min(height, width)
    rows, columns = (max(video.size, round(s * video.short_side / short * f)) for s, f in zip((height, width), factors, strict=True))
    return rows, columns


def square_corners(video: Video, height: int, width: int, draws: ClipDraws | None) -> list[tuple[int, int]]:
    """(top, left) of each square of a clip whose frames were scaled to `height` and `width`."""
    spare = np.array([height, width]) - video.size
    if draws:
        return [(int(draws.top * (spare[0] + 1)), int(draws.left * (spare[1] + 1)))]
    along = np.array([spare[0] > spare[1], spare[0] <= spare[1]])
    corners = [np.where(along, np.rint(offset * spare).astype(int), spare // 2) for offset in CROP_OFFSETS[video.eval_crops]]
    return [(int(top), int(left)) for top, left in corners]
