"""A video in memory becomes the grid of a file that holds it: the same frames, scaled and cropped alike."""

import av
import numpy as np
import pytest
import torch
from video_files import HEIGHT, NUM_FRAMES, SMALL, WIDTH, corner_shown, decode_videos, frames_shown

from polyvit_fast.data.arrays import read_value
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import MediaError

VIDEO = Video(**SMALL | {"short_side": 40}, eval_clips=4, eval_crops=3)


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def frames(gradients):
    return frames_of(gradients)


def test_the_frames_of_a_file_are_cut_like_the_file(gradients, frames):
    [grid] = read_value(VIDEO, frames, "mine")
    [expected] = decode_videos(VIDEO, gradients)
    assert grid.shape == expected.shape == (12, 4, 32, 32, 3)
    for ours, theirs in zip(grid, expected, strict=True):
        assert frames_shown(ours) == frames_shown(theirs)
        assert corner_shown(ours) == pytest.approx(corner_shown(theirs), abs=0.3)
    difference = (grid.int() - expected.int()).abs()
    assert difference.float().mean() < 0.5  # colours are converted before the scaling here, and in one step with it there
    assert difference.max() <= 6


@pytest.mark.parametrize("layout", ["TCHW", "floats", "tensor", "not contiguous", "grey"])
def test_layouts(frames, layout):
    if layout == "grey":
        frames = frames[..., :1]
    [expected] = read_value(VIDEO, frames.repeat(3, -1) if layout == "grey" else frames, "mine")
    value = {
        "TCHW": frames.transpose(0, 3, 1, 2),
        "floats": frames / np.float32(255),
        "tensor": torch.from_numpy(frames.copy()).permute(0, 3, 1, 2),
        "not contiguous": np.repeat(frames, 2, 0)[::2],
        "grey": frames,
    }[layout]
    [grid] = read_value(VIDEO, value, "mine")
    torch.testing.assert_close(grid, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels_first", [False, True])
def test_several_videos(frames, channels_first):
    both = np.stack([frames, frames[::-1]])
    grids = read_value(VIDEO, both.transpose(0, 1, 4, 2, 3) if channels_first else both, "mine")
    for grid, one in zip(grids, both, strict=True):
        torch.testing.assert_close(grid, read_value(VIDEO, one, "one")[0], rtol=0, atol=0)


def test_a_short_video_repeats_its_last_frame(frames):
    [grid] = read_value(Video(**SMALL), frames[:2], "mine")
    assert [round(number) for number in frames_shown(grid[0])] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 16, HEIGHT, WIDTH), r"mine: an array of shape \[3, 16, 48, 80\] has no axis of 1, 3 or 4 channels, first or last; wanted"),
        ((HEIGHT, WIDTH, 3), r"an array of shape \[48, 80, 3\] is no video"),
        ((0, HEIGHT, WIDTH, 3), "is empty"),
    ],
)
def test_what_is_no_video_is_refused_with_what_is_wanted(shape, reason):
    with pytest.raises(ValueError, match=reason):
        read_value(VIDEO, np.zeros(shape, np.uint8), "mine")


def test_frames_that_a_file_may_not_have_either(frames):
    assert len(frames) == NUM_FRAMES
    with pytest.raises(MediaError, match="its frames have 80 x 48 pixels, more than max_pixels = 100"):
        read_value(Video(**SMALL, max_pixels=100), frames, "mine")
    with pytest.raises(ValueError, match="an input of type str is no video"):
        read_value(VIDEO, "clip.mp4", "mine")
