import pytest

from polyvit_fast.data.video.modality import Video


def test_grid_tubelet_views_and_tokens_are_the_papers():
    video = Video()
    assert video.grid == (32, 224, 224, 3)
    assert video.tubelet == (4, 16, 16)
    assert video.num_tokens == 1569
    assert Video(tubelet_frames=2).num_tokens == 3137
    assert Video(eval_clips=4, eval_crops=3).eval_views == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, "frames = 0 must be at least 1"),
        ({"stride": 0}, "stride = 0"),
        ({"eval_clips": 0}, "eval_clips = 0"),
        ({"max_pixels": 0}, "max_pixels = 0"),
        ({"scale_jitter": (1.3, 0.9)}, "scale_jitter"),
        ({"colour_jitter": 1.5}, "colour_jitter"),
        ({"grey_prob": 2.0}, "grey_prob = 2.0"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
    ],
)
def test_impossible_fields_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        Video(**changes)


def test_other_views():
    video = Video(eval_crops=3)
    assert video.with_views(4) == Video(eval_clips=4, eval_crops=3)
    assert video.with_views(4, 1) == Video(eval_clips=4)
    assert video.with_views(2, 3).eval_views == 6
    for counts in ((4, 2), (4, 3, 1)):
        with pytest.raises(ValueError, match=f"1 or 3 crops, such as 4x3, and not {'x'.join(map(str, counts))}"):
            video.with_views(*counts)
