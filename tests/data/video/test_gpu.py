import numpy as np
import pytest
import torch
from generators import rngs
from long_forms import mark_long
from video_files import NUMBERED, numbered_file, write_moving
from video_kinds import numbers_of

from polyvit_fast.data import dali
from polyvit_fast.data.device import PATIENCE
from polyvit_fast.data.video import gpu as module
from polyvit_fast.data.video.cpu import VideoDecoder
from polyvit_fast.data.video.frames import read_header
from polyvit_fast.data.video.gpu import GpuVideoDecoder
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media, MediaError

CPU = torch.device("cpu")
LIMIT = 10**7
SMALL = {"size": 64, "frames": 6, "stride": 3, "short_side": 96}
EXACT = {"scale_jitter": (0.9, 1.33)}  # sides that FFmpeg scales to are odd for some clips: there it converts colours exactly


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """VP9, VP8, H.264 (which DALI's CPU decoder refuses), VP9 shorter than a clip and upright."""
    folder = tmp_path_factory.mktemp("moving")
    return [
        write_moving(folder / "a.webm"),
        write_moving(folder / "b.webm", "libvpx"),
        write_moving(folder / "c.mp4", "libx264"),
        write_moving(folder / "d.mp4", height=200, width=150, count=7),
    ]


def both(video, *, train, batch=4):
    """The CPU form, and the GPU form's code on the CPU, where DALI decodes VP8 and VP9."""
    on_cpu = VideoDecoder(video, train, 2)
    return on_cpu, GpuVideoDecoder(on_cpu, batch, CPU)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "video", [Video(**SMALL), Video(**SMALL, **EXACT, colour_jitter=0.3, grey_prob=0.5), Video(**SMALL, eval_clips=2, eval_crops=3)]
)
def test_grids_equal_those_of_the_cpu_form(media, video, train):
    on_cpu, on_device = both(video, train=train)
    for seed in range(2):
        expected, grid = on_cpu(media, rngs(4, seed)), on_device(media, rngs(4, seed))
        assert (grid.shape, grid.dtype) == (expected.shape, torch.uint8)
        difference = (grid.double() - expected.double()).abs().mean((1, 2, 3, 4, 5))
        assert difference.max() < 5
        assert difference[2] == 0  # the CPU's own
    assert on_device.note == ""


def test_where_ffmpeg_converts_exactly_hardly_a_level_differs(media):
    on_cpu, on_device = both(Video(**SMALL | {"short_side": 93}), train=False)  # 93 x 124; and of the last, 124 x 93
    difference = (on_cpu(media[3:], rngs(1)).double() - on_device(media[3:], rngs(1)).double()).abs()
    assert difference.mean() < 0.7
    assert difference.max() <= 16


def test_frames_and_squares_are_exactly_those_of_the_cpu_form(tmp_path):
    """Any other frame, or a square some pixels off, would differ by more than the decoders do."""
    media = [write_moving(tmp_path / "a.webm")]
    on_cpu, on_device = both(Video(**SMALL, **EXACT), train=True)
    expected, grid = (decoder(media * 4, rngs(4)).double() for decoder in (on_cpu, on_device))
    for other in (grid.roll(1, 2), grid.roll(1, 3), grid.roll(1, 4), grid.flip(4)):
        assert (grid - expected).abs().mean() < 0.6 * (other - expected).abs().mean()


def test_a_sample_depends_on_its_own_generator_only(media, monkeypatch):
    _, decoder = both(Video(**SMALL, **EXACT, colour_jitter=0.4), train=True)
    batch = decoder(media, rngs(4))
    assert torch.equal(torch.cat([decoder([one], [rng]) for one, rng in zip(media, rngs(4), strict=True)]), batch)
    assert not torch.equal(decoder(media, rngs(4, seed=1)), batch)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 14 * 180 * 240 + 100_000)
    sizes = []
    monkeypatch.setattr(dali, "run", lambda *args, run=dali.run, **kw: (sizes.append(len(kw["content"])), run(*args, **kw))[1])
    assert torch.equal(decoder(media, rngs(4)), batch)
    assert sizes == [1, 1, 1]


def test_clips_and_files_too_large_for_a_run_are_the_cpus(media, monkeypatch):
    on_cpu, decoder = both(Video(**SMALL), train=False)
    for name in ("CHUNK_BYTES", "FILE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 1000)
            assert torch.equal(decoder(media, rngs(4)), on_cpu(media, rngs(4)))
    assert decoder.squares.pipeline is None
    assert decoder.memory_bytes() == (0, 0)


def test_colours_of_bt709_are_those_of_the_cpu_form(tmp_path):
    media = [write_moving(tmp_path / "a.mp4", colorspace=1), write_moving(tmp_path / "b.mp4", colorspace=5)]
    assert [read_header(one, LIMIT).colorspace for one in media] == [1, 5]
    on_cpu, decoder = both(Video(**SMALL | {"short_side": 93}), train=False)
    difference = (on_cpu(media, rngs(2)).double() - decoder(media, rngs(2)).double()).abs().mean((1, 2, 3, 4, 5))
    assert difference[0] < difference[1] + 0.7


def refusing(monkeypatch, *refused):
    """DALI's run refuses these files; the numbers of files of each run."""
    sizes, contents = [], [one.read() for one in refused]

    def run(pipeline, failure, run=dali.run, **kw):
        sizes.append(len(kw["content"]))
        if any(bytes(content) in contents for content in kw["content"]):
            raise MediaError("cannot")
        return run(pipeline, failure, **kw)

    monkeypatch.setattr(dali, "run", run)
    return sizes


def test_a_file_that_nvdec_refuses_is_the_cpus_from_then_on(media, monkeypatch):
    on_cpu, decoder = both(Video(**SMALL, **EXACT, colour_jitter=0.3), train=True)
    before, expected = decoder(media, rngs(4)), on_cpu(media, rngs(4))
    sizes = refusing(monkeypatch, media[1])
    for _ in range(2):
        grid = decoder(media, rngs(4))
        assert torch.equal(grid[[0, 3]], before[[0, 3]])
        assert torch.equal(grid[[1, 2]], expected[[1, 2]])
    assert sizes == [3, 1, 1, 1, 2]
    assert decoder.note == ""


def test_when_nvdec_refuses_all_the_cpu_decodes_and_says_so(media, monkeypatch):
    on_cpu, decoder = both(Video(**SMALL), train=True)
    refusing(monkeypatch, *media)
    assert torch.equal(decoder(media, rngs(4)), on_cpu(media, rngs(4)))
    assert decoder.note == "a batch went through the CPU, because the GPU's decoder refused: NVDEC refuses all of a batch"
    assert decoder.squares.pipeline is None


def test_batches_of_one_do_not_give_nvdec_up(media, monkeypatch):
    on_cpu, decoder = both(Video(**SMALL), train=True)
    sizes = refusing(monkeypatch, *media[:2])
    for _ in range(PATIENCE):
        for one in media[:2]:
            assert torch.equal(decoder([one], rngs(1)), on_cpu([one], rngs(1)))
    decoder(media[3:], rngs(1))
    assert sizes == [1, 1, 1]  # each refused file is tried once
    assert (decoder.note, decoder.refused) == ("", 0)


def test_without_nvdec_the_cpu_decodes_and_says_so(media, monkeypatch):
    monkeypatch.setattr(module, "missing_nvdec", lambda device: "no such file")
    on_cpu, decoder = both(Video(**SMALL), train=True)
    assert "the driver's libnvcuvid.so.1 (NVDEC) cannot be opened (no such file)" in decoder.note
    assert torch.equal(decoder(media, rngs(4)), on_cpu(media, rngs(4)))
    assert decoder.squares.pipeline is None


def test_broken_files_are_reported_and_the_next_batch_works(media, tmp_path):
    (tmp_path / "cut.webm").write_bytes(media[0].read()[:9000])
    _, decoder = both(Video(**SMALL), train=True)
    before = decoder(media, rngs(4))
    with pytest.raises(MediaError, match=r"truncated|damaged"):
        decoder([media[1], Media(str(tmp_path / "cut.webm"))], rngs(2))
    with pytest.raises(MediaError, match="the file is missing"):
        decoder([media[1], Media(str(tmp_path / "gone.webm"))], rngs(2))
    assert torch.equal(decoder(media, rngs(4)), before)
    assert decoder.note == ""


@pytest.mark.parametrize(
    "name", mark_long(["vp9.webm", "vp9.mp4", "vp9-hidden-frames.webm", "vp8.webm"], ["vp9-hidden-frames.webm", "vp8.webm"])
)
def test_the_very_frames_are_shown(tmp_path, name):
    media = [numbered_file(tmp_path / name, name)]
    for video in NUMBERED:
        for train in (True, False):
            on_cpu, decoder = both(video, train=train)
            shown = numbers_of(decoder(media, rngs(1))[0].numpy())
            assert (shown >= 0).all()
            assert np.array_equal(shown, numbers_of(on_cpu(media, rngs(1))[0].numpy()))
            assert decoder.decoded_bytes > 0


def test_a_shorter_video_repeats_its_last_frame(tmp_path):
    media = [numbered_file(tmp_path / "a.webm", "vp9.webm", 5)]
    _, decoder = both(Video(size=192, frames=4, stride=3, short_side=192), train=False)
    assert numbers_of(decoder(media, rngs(1))[0].numpy()).tolist() == [[0, 3, 4, 4]]
    assert decoder.decoded_bytes > 0
