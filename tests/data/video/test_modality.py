import av
import numpy as np
import pytest
import torch

from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media, MediaError
from polyvit_fast.randomness import generator

NUM_FRAMES, HEIGHT, WIDTH = 60, 48, 80
SMALL = {"size": 32, "patch": 16, "frames": 4, "stride": 3, "tubelet_frames": 2, "short_side": 48, "flip": False}


def write_video(path, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH):
    """An H.264 file whose every frame tells its number by its red, the column by its green and the row by its blue."""
    rows, columns = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "6", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for number in range(num_frames):
            red = np.full_like(rows, 30 + 3 * number)
            frame = np.stack([red, 20 + columns * 200 // width, 20 + rows * 200 // height], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "wide.mp4")


def decode(video, *paths, train=False, num_threads=2, seed=0):
    decoder = video.decoder(batch=max(1, len(paths)), train=train, num_threads=num_threads)
    return decoder([Media(str(path)) for path in paths], [generator(seed, "test", i) for i in range(len(paths))])


def numbers(clip):
    """The frame numbers that a clip [frames, rows, columns, 3] shows."""
    return ((clip[..., 0].double().mean((1, 2)) - 30) / 3).round().int().tolist()


def corner(clip, height=HEIGHT, width=WIDTH):
    """(top, left) of the square that a clip shows, in pixels of the file, from its middle."""
    size = clip.shape[1]
    green, blue = (clip[0, ..., channel].double().mean().item() for channel in (1, 2))
    return (blue - 20) / 200 * height - size / 2, (green - 20) / 200 * width - size / 2


def test_grid_tubelet_views_and_tokens_are_the_papers():
    video = Video()
    assert video.grid == (32, 224, 224, 3)
    assert video.tubelet == (4, 16, 16)
    assert video.num_tokens == 1569
    assert Video(tubelet_frames=2).num_tokens == 3137
    assert Video(eval_clips=4, eval_crops=3).eval_views == 12


def test_evaluation_shows_the_middle(file):
    [clip] = decode(Video(**SMALL), file)[:, 0]
    assert clip.shape == (4, 32, 32, 3)
    assert clip.dtype == torch.uint8
    assert numbers(clip) == [25, 28, 31, 34]
    assert corner(clip) == pytest.approx((8, 24), abs=1)


def test_clips_of_evaluation_are_evenly_spaced_and_crops_lie_along_the_longer_side(file, tmp_path):
    [views] = decode(Video(**SMALL, eval_clips=3, eval_crops=3), file)
    assert [numbers(view)[0] for view in views] == [0, 0, 0, 25, 25, 25, 50, 50, 50]
    for view, left in zip(views, (0, 24, 48) * 3, strict=True):
        assert corner(view) == pytest.approx((8, left), abs=1)
    tall = write_video(tmp_path / "tall.mp4", height=80, width=48)
    [views] = decode(Video(**SMALL, eval_crops=3), tall)
    for view, top in zip(views, (0, 24, 48), strict=True):
        assert corner(view, 80, 48) == pytest.approx((top, 8), abs=1)


def test_random_clips_start_and_lie_anywhere_with_equal_chance(file):
    count = 300
    clips = decode(Video(**SMALL), *[file] * count, train=True)[:, 0]
    starts = [numbers(clip)[0] for clip in clips]
    assert all(numbers(clip) == [start + 3 * i for i in range(4)] for clip, start in zip(clips, starts, strict=True))
    assert (min(starts), max(starts)) == (0, NUM_FRAMES - 10)
    assert np.mean(starts) == pytest.approx(25, abs=4 * 15 / count**0.5)
    corners = np.array([corner(clip) for clip in clips])
    assert corners.min(0) == pytest.approx((0, 0), abs=1)
    assert corners.max(0) == pytest.approx((16, 48), abs=1.5)
    assert corners.mean(0) == pytest.approx((8, 24), abs=3.5)


@pytest.mark.parametrize("train", [True, False])
def test_a_shorter_video_repeats_its_last_frame(tmp_path, train):
    path = write_video(tmp_path / "short.mp4", num_frames=5)
    [clip] = decode(Video(**SMALL), path, train=train)[:, 0]
    assert numbers(clip) == [0, 3, 4, 4]


def test_the_short_side_is_scaled(file):
    [clip] = decode(Video(**SMALL | {"short_side": 32}), file)[:, 0]
    assert corner(clip, 32, 53) == pytest.approx((0, 10.5), abs=1)
    with pytest.raises(ValueError, match="short_side = 20 must be at least size = 32"):
        Video(**SMALL | {"short_side": 20})


def test_scale_jitter_stretches_each_side_by_itself(file):
    clips = decode(Video(**SMALL, scale_jitter=(0.8, 1.6)), *[file] * 100, train=True)[:, 0].double()
    slopes = torch.stack([(clips[:, 0, -1] - clips[:, 0, 0])[..., 2].mean(1), (clips[:, 0, :, -1] - clips[:, 0, :, 0])[..., 1].mean(1)])
    scales = torch.tensor([[200 / HEIGHT], [200 / WIDTH]]) * 31 / slopes
    assert scales.min() == pytest.approx(0.8, abs=0.06)
    assert scales.max() == pytest.approx(1.6, abs=0.15)
    assert abs(torch.corrcoef(scales)[0, 1]) < 0.4


def test_half_of_all_clips_are_mirrored_whole(file):
    clips = decode(Video(**SMALL | {"flip": True}), *[file] * 200, train=True)[:, 0].double()
    slopes = (clips[:, :, :, -1] - clips[:, :, :, 0])[..., 1].mean(2)
    assert ((slopes < 0).all(1) | (slopes > 0).all(1)).all()
    assert 0.4 < (slopes[:, 0] < 0).double().mean() < 0.6


def test_colours_change_alike_in_all_frames_for_a_share_of_the_clips(file):
    video = Video(**SMALL, colour_jitter=0.4, colour_jitter_chance=0.5)
    plain, jittered = (decode(v, *[file] * 100, train=True)[:, 0].double() for v in (Video(**SMALL), video))
    ratios = (jittered.mean((2, 3)) / plain.mean((2, 3)))[..., 1]
    same = (ratios - 1).abs().amax(1) < 1e-3
    assert 0.35 < same.double().mean() < 0.65
    assert ratios[~same].std(1).max() < 0.1 * ratios[~same].std()


def test_grey_clips_have_no_colour(file):
    clips = decode(Video(**SMALL, grey_chance=0.5), *[file] * 100, train=True)[:, 0].int()
    grey = (clips.amax(-1) - clips.amin(-1)).amax((1, 2, 3)) <= 1
    assert 0.35 < grey.double().mean() < 0.65


def test_a_clip_depends_on_its_file_and_generator_alone(file, tmp_path):
    other = write_video(tmp_path / "other.mp4", num_frames=9)
    video = Video(**SMALL | {"flip": True}, colour_jitter=0.3, scale_jitter=(0.9, 1.3), grey_chance=0.2)
    together = decode(video, other, file, other, train=True, num_threads=2)
    alone = video.decoder(batch=1, train=True, num_threads=1)([Media(str(file))], [generator(0, "test", 1)])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[2])


def test_a_broken_file_is_told_and_the_next_call_works(file, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(file.read_bytes()[:400])
    decoder = Video(**SMALL).decoder(batch=2, train=True, num_threads=2)
    rngs = [generator(i) for i in range(2)]
    with pytest.raises(MediaError, match="truncated: it ends after 400 of at least"):
        decoder([Media(str(file)), Media(str(broken))], rngs)
    assert numbers(decoder([Media(str(file))], rngs[:1])[0, 0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, "frames = 0 must be at least 1"),
        ({"stride": 0}, "stride = 0"),
        ({"eval_clips": 0}, "eval_clips = 0"),
        ({"max_pixels": 0}, "max_pixels = 0"),
        ({"scale_jitter": (1.3, 0.9)}, "scale_jitter"),
        ({"colour_jitter": 1.5}, "colour_jitter"),
        ({"grey_chance": 2.0}, "grey_chance = 2.0"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
    ],
)
def test_impossible_fields_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        Video(**changes)
