import pytest
import torch
from generators import rngs
from video_files import SMALL, corner_shown, decode_videos, frames_shown, write_gradients

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media, MediaError


def test_evaluation_shows_the_middle(gradients):
    [clip] = decode_videos(Video(**SMALL), gradients)[:, 0]
    assert clip.shape == (4, 32, 32, 3)
    assert clip.dtype == torch.uint8
    assert frames_shown(clip) == [25, 28, 31, 34]
    assert corner_shown(clip) == pytest.approx((8, 24), abs=1)


def test_half_of_all_clips_are_mirrored_whole(gradients):
    clips = decode_videos(Video(**SMALL | {"flip": True}), *[gradients] * 200, train=True)[:, 0].double()
    slopes = (clips[:, :, :, -1] - clips[:, :, :, 0])[..., 1].mean(2)
    assert ((slopes < 0).all(1) | (slopes > 0).all(1)).all()
    assert 0.4 < (slopes[:, 0] < 0).double().mean() < 0.6


def test_colours_change_alike_in_all_frames_of_some_clips(gradients):
    video = Video(**SMALL, colour_jitter=0.4, colour_jitter_prob=0.5)
    plain, jittered = (decode_videos(v, *[gradients] * 100, train=True)[:, 0].double() for v in (Video(**SMALL), video))
    ratios = (jittered.mean((2, 3)) / plain.mean((2, 3)))[..., 1]
    same = (ratios - 1).abs().amax(1) < 1e-3
    assert 0.35 < same.double().mean() < 0.65
    assert ratios[~same].std(1).max() < 0.1 * ratios[~same].std()


def test_grey_clips_have_no_colour(gradients):
    clips = decode_videos(Video(**SMALL, grey_prob=0.5), *[gradients] * 100, train=True)[:, 0].int()
    grey = (clips.amax(-1) - clips.amin(-1)).amax((1, 2, 3)) <= 1
    assert 0.35 < grey.double().mean() < 0.65


def test_a_clip_depends_on_its_file_and_generator_alone(gradients, tmp_path):
    other = write_gradients(tmp_path / "other.mp4", num_frames=9)
    video = Video(**SMALL | {"flip": True}, colour_jitter=0.3, scale_jitter=(0.9, 1.3), grey_prob=0.2)
    together = decode_videos(video, other, gradients, other, train=True, num_threads=2)
    alone = build_decoder(video, batch=1, train=True, num_threads=1)([Media(str(gradients))], rngs(2)[1:])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[2])


def test_a_broken_file_is_reported_and_the_next_call_works(gradients, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(gradients.read_bytes()[:400])
    decoder = build_decoder(Video(**SMALL), batch=2, train=True, num_threads=2)
    with pytest.raises(MediaError, match="truncated: it ends after 400 of at least"):
        decoder([Media(str(gradients)), Media(str(broken))], rngs(2))
    assert frames_shown(decoder([Media(str(gradients))], rngs(1))[0, 0])
