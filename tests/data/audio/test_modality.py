import pytest
from sound_files import SMALL

from polyvit_fast.data.audio.modality import Audio


def test_shape_of_the_tokens():
    audio = Audio()
    assert (audio.grid, audio.tubelet, audio.num_tokens, audio.eval_views) == ((1, 800, 128, 3), (1, 16, 16), 401, 1)
    assert audio.normalisation == ((-4.2677393,) * 3, (9.1379948,) * 3)
    assert Audio(eval_clips=4).eval_views == 4
    assert Audio(**SMALL).num_tokens == 5
    with pytest.raises(ValueError, match="rows = 1001 does not divide by the tubelet's 16"):
        Audio(clip_seconds=10.01).check_grid()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 0}, "patch = 0 must be at least 1"),
        ({"channels": 0}, "channels = 0 must be at least 1"),
        ({"eval_clips": 0}, "eval_clips = 0 must be at least 1"),
        ({"num_mel_bins": -1}, "num_mel_bins = -1 must be at least 1"),
        ({"clip_seconds": 0.0}, r"clip_seconds = 0\.0 must be a whole number of hundredths, and not 0"),
        ({"clip_seconds": 1.005}, r"clip_seconds = 1\.005 must be a whole number of hundredths"),
        ({"sample_rate_hz": 22_050}, "sample_rate_hz = 22050 must be a multiple of 100, from 1000 on"),
        ({"sample_rate_hz": 500}, "sample_rate_hz = 500 must be a multiple of 100, from 1000 on"),
        ({"freq_masks": -1}, "freq_masks = -1 must not be negative"),
        ({"freq_masks": 1, "freq_mask_bins": 129}, "freq_mask_bins = 129 must lie between 1 and 128"),
        ({"time_masks": 1, "time_mask_frames": 801}, "time_mask_frames = 801 must lie between 1 and 800"),
        ({"max_seconds": 0.0}, "max_seconds and std must be positive"),
        ({"std": 0.0}, "max_seconds and std must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Audio(**fields)


def test_other_views():
    assert Audio().with_views(4) == Audio(eval_clips=4)
    with pytest.raises(ValueError, match="audio: views are clips, such as 4, and not 4x3"):
        Audio().with_views(4, 3)
