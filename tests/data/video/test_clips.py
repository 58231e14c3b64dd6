import numpy as np
import pytest
import torch
from video_files import HEIGHT, NUM_FRAMES, SMALL, WIDTH, corner_shown, decode_videos, frames_shown, write_gradients

from polyvit_fast.data.video.modality import Video


def test_clips_of_evaluation_are_evenly_spaced_and_crops_lie_along_the_longer_side(gradients, tmp_path):
    [views] = decode_videos(Video(**SMALL, eval_clips=3, eval_crops=3), gradients)
    assert [frames_shown(view)[0] for view in views] == [0, 0, 0, 25, 25, 25, 50, 50, 50]
    for view, left in zip(views, (0, 24, 48) * 3, strict=True):
        assert corner_shown(view) == pytest.approx((8, left), abs=1)
    tall = write_gradients(tmp_path / "tall.mp4", height=80, width=48)
    [views] = decode_videos(Video(**SMALL, eval_crops=3), tall)
    for view, top in zip(views, (0, 24, 48), strict=True):
        assert corner_shown(view, 80, 48) == pytest.approx((top, 8), abs=1)


def test_random_clips_start_and_lie_anywhere_with_equal_probability(gradients):
    count = 300
    clips = decode_videos(Video(**SMALL), *[gradients] * count, train=True)[:, 0]
    starts = [frames_shown(clip)[0] for clip in clips]
    assert all(frames_shown(clip) == [start + 3 * i for i in range(4)] for clip, start in zip(clips, starts, strict=True))
    assert (min(starts), max(starts)) == (0, NUM_FRAMES - 10)
    assert np.mean(starts) == pytest.approx(25, abs=4 * 15 / count**0.5)
    corners = np.array([corner_shown(clip) for clip in clips])
    assert corners.min(0) == pytest.approx((0, 0), abs=1)
    assert corners.max(0) == pytest.approx((16, 48), abs=1.5)
    assert corners.mean(0) == pytest.approx((8, 24), abs=3.5)


@pytest.mark.parametrize("train", [True, False])
def test_a_shorter_video_repeats_its_last_frame(tmp_path, train):
    path = write_gradients(tmp_path / "short.mp4", num_frames=5)
    [clip] = decode_videos(Video(**SMALL), path, train=train)[:, 0]
    assert frames_shown(clip) == [0, 3, 4, 4]


def test_the_short_side_is_scaled(gradients):
    [clip] = decode_videos(Video(**SMALL | {"short_side": 32}), gradients)[:, 0]
    assert corner_shown(clip, 32, 53) == pytest.approx((0, 10.5), abs=1)
    with pytest.raises(ValueError, match="short_side = 20 must be at least size = 32"):
        Video(**SMALL | {"short_side": 20})


def test_scale_jitter_stretches_each_side_by_itself(gradients):
    clips = decode_videos(Video(**SMALL, scale_jitter=(0.8, 1.6)), *[gradients] * 100, train=True)[:, 0].double()
    slopes = torch.stack([(clips[:, 0, -1] - clips[:, 0, 0])[..., 2].mean(1), (clips[:, 0, :, -1] - clips[:, 0, :, 0])[..., 1].mean(1)])
    scales = torch.tensor([[200 / HEIGHT], [200 / WIDTH]]) * 31 / slopes
    assert scales.min() == pytest.approx(0.8, abs=0.06)
    assert scales.max() == pytest.approx(1.6, abs=0.15)
    assert abs(torch.corrcoef(scales)[0, 1]) < 0.4
