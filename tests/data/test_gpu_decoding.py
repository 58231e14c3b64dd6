"""Decoding on a GPU against decoding on the CPU: the tests of each module run on a CPU, here is what only a GPU can show."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import DEVICE
from image_files import photo, vary_pictures
from sound_files import noise, write
from tiny_runs import change
from video_files import NUMBERED, numbered_file, write_moving
from video_kinds import numbers_of

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.augment.colour import draw_colours
from polyvit_fast.data.augment.colour_gpu import colour_map, recolour
from polyvit_fast.data.augment.operations import draw_operations
from polyvit_fast.data.augment.rand_augment_gpu import rand_augment
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.demo_files import DemoFiles
from polyvit_fast.data.stream import Loader
from polyvit_fast.data.video import gpu as device_video
from polyvit_fast.data.video.modality import Video
from polyvit_fast.data.video.nvdec import missing_nvdec
from polyvit_fast.experiments.demo import PICTURE, demo_task
from polyvit_fast.experiments.demo import config as demo
from polyvit_fast.media import Media, MediaError
from polyvit_fast.randomness import generator

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]
ALL = Image(colour_jitter=0.4, hue_jitter_degrees=20.0, rand_augment_ops=2)
ON_NVDEC = ("h264.mp4", "h264-open-gop.mp4", "h264-29.97.mp4", "h264-fragments.mp4", "h264.mkv", "hevc.mp4", "mpeg4.mp4", "vp8.webm")
ON_CPU = ("vp9.webm", "vp9.mp4", "vp9-hidden-frames.webm", "av1.mp4", "mjpeg.mov", "h264.avi", "mpeg2.ts")
CLIPS = Video(frames=8, stride=3, short_side=256, scale_jitter=(0.9, 1.33))


def rngs(count, seed=0):
    return [generator(seed, "gpu", i) for i in range(count)]


def both(modality, media, *, train=True, seed=0):
    """(expected, grid, decoder): the CPU's grids, the GPU's, moved, and what made them."""
    count = len(media)
    expected = build_decoder(modality, batch=count, train=train, num_threads=2)(media, rngs(count, seed))
    decoder = build_decoder(modality, batch=count, train=train, num_threads=2, device="cuda")
    grid = decoder(media, rngs(count, seed))
    assert (grid.device.type, grid.device.index) == ("cuda", torch.cuda.current_device())
    assert (grid.shape, grid.dtype) == (expected.shape, expected.dtype)
    return expected, grid.cpu(), decoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of all kinds, large and small, and what nvJPEG leaves to the CPU."""
    folder = tmp_path_factory.mktemp("gpu-photos")
    kinds = [("jpg", {"subsampling": s, "quality": 90}) for s in (0, 1, 2)]
    kinds += [("jpg", {"progressive": True}), ("png", {}), ("webp", {}), ("gif", {}), ("bmp", {})]
    media = []
    for i, (suffix, options) in enumerate(kinds):
        path = folder / f"{i}.{suffix}"
        photo(200 + 60 * i, 500 - 40 * i, seed=i).save(path, **options)
        media.append(Media(str(path)))
    return media


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("image", [Image(), Image(size=64, crop="resize_crop", eval_crop="centre")])
def test_images_equal_the_cpus(photos, image, train):
    expected, grid, decoder = both(image, photos, train=train)
    assert decoder.note == ""
    difference = (grid.double() - expected.double()).abs().mean((1, 2, 3, 4, 5))
    assert difference.max() < 2


def test_changed_images_equal_the_cpus(photos):
    differences = []
    for seed in range(4):
        expected, grid, _ = both(ALL, photos, seed=seed)
        differences += (grid.double() - expected.double()).abs().mean((1, 2, 3, 4, 5)).tolist()
    assert np.median(differences) < 3


def test_an_image_does_not_depend_on_its_neighbours(photos):
    decoder = build_decoder(ALL, batch=8, train=True, num_threads=2, device="cuda")
    batch = decoder(photos, rngs(8))
    assert torch.equal(decoder(photos, rngs(8)), batch)
    assert torch.equal(torch.cat([decoder([one], [rng]) for one, rng in zip(photos, rngs(8), strict=True)]), batch)


def test_two_tasks_of_pictures_in_turn_next_to_a_busy_stream(tmp_path):
    """nvImageCodec may use one decoder for several tasks and regrow buffers: batches that come again must be the same to the bit."""
    tasks = {
        kind: replace(demo_task(kind, PICTURE, 64, steps=40), train=DemoFiles(kind=kind, num_samples=64, root=str(tmp_path)))
        for kind in ("shapes", "textures")
    }
    config = change(demo, tasks=tasks, device=DEVICE.type, decoding="gpu", num_threads=4)
    loaders = [Loader(name, config, train=True) for name in tasks]
    stop = threading.Event()

    def multiply():
        with torch.cuda.stream(torch.cuda.Stream()):
            matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
            while not stop.is_set():
                for _ in range(50):
                    matrix = (matrix @ matrix).clamp_(-1, 1)
                torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor() as threads:
        busy = threads.submit(multiply)
        try:
            for loader in loaders:
                loader.grid_dtype()  # of one picture alone
            first, *again = ([loader.load(step).grid for step in range(8) for loader in loaders] for _ in range(10))
            assert all(torch.equal(a, b) for grids in again for a, b in zip(first, grids, strict=True))
            assert not busy.done()
        finally:
            stop.set()
        busy.result()
    assert not any(loader.broken or loader.note for loader in loaders)


def test_broken_images_are_reported_and_the_next_batch_works(photos, tmp_path):
    (tmp_path / "cut.webp").write_bytes(photos[5].read()[:-900])
    (tmp_path / "text.jpg").write_bytes(b"<html>404 not found</html>" * 9)
    decoder = build_decoder(Image(), batch=8, train=True, num_threads=2, device="cuda")
    before = decoder(photos, rngs(8))
    for name, reason in (("cut.webp", "truncated or damaged"), ("text.jpg", "not an image")):
        with pytest.raises(MediaError, match=reason):
            decoder([photos[0], Media(str(tmp_path / name))], rngs(2))
        assert torch.equal(decoder(photos, rngs(8)), before)
    assert decoder.note == ""


def test_colours_and_operations_equal_those_on_the_cpu():
    batch = torch.from_numpy(np.concatenate([vary_pictures(224, 224)] * 8))
    maps = [colour_map(draw_colours(generator("gpu colours", i), 0.5, 40.0)) for i in range(len(batch))]
    assert (recolour(batch.cuda(), maps).cpu().int() - recolour(batch, maps).int()).abs().max() <= 1
    drawn = [draw_operations(generator("gpu operations", i), 1, 9.0) for i in range(len(batch))]
    assert (rand_augment(batch.cuda(), drawn).cpu().int() - rand_augment(batch, drawn).int()).abs().max() <= 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    if reason := missing_nvdec(torch.device("cuda", 0)):
        pytest.skip(f"the driver has no NVDEC: {reason}")
    folder = tmp_path_factory.mktemp("gpu-clips")
    codecs = {"a.mp4": "libx264", "b.mkv": "libx265", "c.webm": "libvpx-vp9", "d.webm": "libvpx", "e.mp4": "mpeg4"}
    return [write_moving(folder / name, codec, 256, 340, 60) for name, codec in codecs.items()]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("video", [CLIPS, Video(frames=8, stride=3, eval_clips=2, eval_crops=3, colour_jitter=0.3, grey_prob=0.3)])
def test_videos_equal_the_cpus(clips, video, train):
    for seed in range(2):
        expected, grid, decoder = both(video, clips, train=train, seed=seed)
        assert decoder.note == ""
        assert decoder.decoded_bytes > 0
        assert (grid.double() - expected.double()).abs().mean((1, 2, 3, 4, 5)).max() < 6


@pytest.mark.parametrize("name", [*ON_NVDEC, *ON_CPU])
def test_the_very_frames_are_shown(clips, tmp_path, name):
    media = [numbered_file(tmp_path / name, name)]
    for video in NUMBERED:
        for train in (True, False):
            expected, grid, decoder = both(video, media, train=train)
            shown = numbers_of(grid[0].numpy())
            assert (shown >= 0).all()
            assert np.array_equal(shown, numbers_of(expected[0].numpy()))
    assert (decoder.decoded_bytes > 0) == (name in ON_NVDEC)
    assert decoder.note == ""


def test_colours_of_bt709_are_nvdecs_too(clips, tmp_path):
    media = [write_moving(tmp_path / f"{space}.mp4", "libx264", 256, 340, 30, colorspace=space) for space in (1, 5)]
    expected, grid, _ = both(CLIPS, media, train=False)
    difference = (grid.double() - expected.double()).abs().mean((1, 2, 3, 4, 5))
    assert difference[0] < difference[1] + 1


def test_broken_videos_are_reported_and_the_next_batch_works(clips, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(clips[0].read()[:20_000])
    decoder = build_decoder(CLIPS, batch=8, train=True, num_threads=2, device="cuda")
    before = decoder(clips, rngs(5))
    with pytest.raises(MediaError):
        decoder([clips[0], Media(str(tmp_path / "cut.mp4"))], rngs(2))
    assert torch.equal(decoder(clips, rngs(5)), before)


def test_without_nvdec_the_cpu_decodes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(device_video, "missing_nvdec", lambda device: "no such file")
    expected, grid, decoder = both(CLIPS, [write_moving(tmp_path / "a.mp4", "libx264")])
    assert "libnvcuvid.so.1 (NVDEC) cannot be opened (no such file)" in decoder.note
    assert torch.equal(grid, expected)


@pytest.mark.parametrize("form", ["kaldi", "mbt"])
def test_sounds_equal_the_cpus(tmp_path, form):
    media = [Media(str(write(tmp_path / f"{i}.flac", noise(2 + i, 16_000, seed=i), 16_000))) for i in range(5)]
    audio = Audio(clip_seconds=3.2, spectrogram=form, freq_masks=2, time_masks=2)
    for train in (True, False):
        expected, grid, _ = both(audio, media, train=train)
        sounding = expected > -10  # what is silent lies at the floor
        assert (grid - expected)[sounding].abs().max() < 2e-3
        assert (grid - expected)[sounding].abs().mean() < 1e-4
        assert torch.equal(grid == audio.mean, expected == audio.mean)


@pytest.mark.parametrize("modality", [ALL, Audio(clip_seconds=0.32, freq_masks=1)])
def test_pytorch_never_waits_inside_and_the_result_is_complete_in_any_thread(photos, tmp_path, modality):
    is_image = modality is ALL
    media = photos if is_image else [Media(str(write(tmp_path / f"{i}.wav", noise(1, 16_000, seed=i), 16_000))) for i in range(8)]
    decoder = build_decoder(modality, batch=8, train=True, num_threads=2, device="cuda")
    before = decoder(media, rngs(8)).cpu()
    found = []

    def work():
        torch.cuda.set_sync_debug_mode("error")
        try:
            found.append(decoder(media, rngs(8)))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0].cpu(), before)


def test_memory_is_bounded_and_reported(photos):
    decoder = build_decoder(ALL, batch=8, train=True, num_threads=2, device="cuda")
    used = []
    for seed in range(30):
        decoder(photos, rngs(8, seed))
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    assert used[-1] - used[9] < 64 << 20
    host, device = decoder.memory_bytes()
    assert 0 < host < 16 << 20
    assert 3 * 224 * 224 * 8 < device < 1 << 30
    decoder.release()
    assert all(graph.pipeline is None for graph in decoder.graphs)
    assert decoder(photos, rngs(8)).shape == (8, 1, 1, 224, 224, 3)
