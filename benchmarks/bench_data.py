"""Decoding from files to grids: our decoders on two threads against a torch DataLoader of two workers and DALI alone.

Run: pytest benchmarks/bench_data.py. Each candidate makes the same grids (asserted before it is timed) from the same files. CPU seconds are
those of all threads and processes.
"""

import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import av
import machine
import numpy as np
import pytest
import soundfile
import torch
from harness import OURS, Group, Runner, candidate_params, time_on_host
from PIL import Image as Pillow
from scipy.signal import resample_poly
from torch.utils.data import DataLoader, Dataset
from transformers.audio_utils import mel_filter_bank

from polyvit_fast.config import Modality
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.augment.colour import jitter_colours
from polyvit_fast.data.augment.rand_augment import rand_augment
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.crops import choose_training_box
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media
from polyvit_fast.randomness import generator

FILES = tempfile.TemporaryDirectory()
NUM_THREADS = 2
TURNS = (1, 1) if machine.IS_TINY else (15, 1)
DALI = "DALI alone"

Decode = Callable[[], torch.Tensor]
"""Makes all batches and gives the first."""


class Meter:
    """All batches once more, and the CPU seconds that they take in this process and in the workers of DataLoaders."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.calls, self.own, self.workers = 0, 0.0, 0.0

    def __call__(self) -> None:
        own, workers = time.process_time(), workers_cpu_seconds()
        self.decode()
        self.calls += 1
        self.own += time.process_time() - own
        self.workers += workers_cpu_seconds() - workers

    def describe(self, seconds: float, *, uses_workers: bool) -> dict[str, object]:
        """CPU seconds of a call. Raises AssertionError when workers of another candidate were busy meanwhile."""
        own, workers = self.own / self.calls, self.workers / self.calls
        assert uses_workers or workers < 0.02 * seconds, "a DataLoader works while others have their turn"
        return {"cpu_seconds": own + workers, "note": f"{own + workers:.2f} CPU seconds"}


def workers_cpu_seconds() -> float:
    """Of all the processes that live."""
    # Linux numbers the CPU clock of a process so (clock_getcpuclockid).
    return sum(time.clock_gettime((~child.pid << 3) | 2) for child in multiprocessing.active_children() if child.pid)


def build(
    name: str, make: Callable[[], Decode], expected: torch.Tensor, distance: Callable[[torch.Tensor], torch.Tensor], most: float
) -> Runner:
    """A candidate whose first batch is as near to what is expected as it has to be: `distance` of the difference is at most `most`."""
    meter = Meter(make())
    found = meter.decode()
    assert distance(found.reshape(expected.shape).double() - expected.double()) <= most
    return Runner(run=meter, describe=partial(meter.describe, uses_workers="DataLoader" in name))


def largest(difference: torch.Tensor) -> torch.Tensor:
    return difference.abs().max()


def mean(difference: torch.Tensor) -> torch.Tensor:
    return difference.abs().mean()


def group_of(title: str, amount: float, unit: str, candidates: dict[str, Callable[[], Runner]]) -> Group:
    return Group(title=title, amount=amount, unit=unit, candidates=candidates, timer=time_on_host, turns=TURNS)


def load(dataset: Dataset, batch: int) -> Decode:
    """A DataLoader that reads all of it, and nothing ahead of what it is asked for: its workers then wait."""
    loader = DataLoader(dataset, batch, num_workers=NUM_THREADS, persistent_workers=True)

    def run() -> torch.Tensor:
        batches = list(loader)
        return batches[0]

    return run


def decode_all(modality: Modality, paths: list[str], batch: int) -> Decode:
    """All training batches by ours."""
    decoder = build_decoder(modality, batch=batch, train=True, num_threads=NUM_THREADS)

    def run() -> torch.Tensor:
        batches = []
        for start in range(0, len(paths), batch):
            media = [Media(path) for path in paths[start : start + batch]]
            batches.append(decoder(media, [generator("bench", start + i) for i in range(len(media))]))
        return batches[0]

    return run


# Images: the Inception crop and flip of ImageNet training, 224 x 224 uint8

NUM_IMAGES, IMAGE_BATCH = (4, 2) if machine.IS_TINY else (256, 64)
IMAGES = {"images": Image(), "images, colours": Image(colour_jitter=0.4), "images, RandAugment": Image(rand_augment_ops=2)}


@cache
def write_images() -> list[str]:
    """JPEGs of 500 x 375 pixels and about 85 kB, as ImageNet's: smooth shapes, edges and grain."""
    folder, paths = Path(FILES.name), []
    y, x = np.mgrid[:375, :500]
    for i in range(NUM_IMAGES):
        rng = generator("bench image", i)
        a, b, c, d = rng.uniform(0.005, 0.15, 4)
        waves = np.stack([np.sin(a * x + b * y), np.cos(c * x) * np.sin(a * y), np.sign(np.sin(d * (x - y)))], -1)
        pixels = 127 + 60 * waves + rng.normal(0, 14, (375, 500, 1))
        paths.append(str(folder / f"{i}.jpg"))
        Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class PillowImages(Dataset):
    """The crops that `image` draws, made by Pillow."""

    def __init__(self, image: Image, paths: list[str]) -> None:
        self.image, self.paths = image, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = generator("bench", index)
        with Pillow.open(self.paths[index]) as file:
            picture = file.convert("RGB")
        top, left, height, width = choose_training_box(self.image, picture.height, picture.width, rng)
        size = (self.image.size, self.image.size)
        picture = picture.crop((left, top, left + width, top + height)).resize(size, Pillow.Resampling.BILINEAR)
        if rng.random() < 0.5:
            picture = picture.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(picture)
        if self.image.colour_jitter:
            pixels = jitter_colours(pixels, rng, self.image.colour_jitter, 0.0)
        if self.image.rand_augment_ops:
            pixels = rand_augment(pixels, rng, self.image.rand_augment_ops, self.image.rand_augment_magnitude)
        return torch.from_numpy(pixels)


def dali_images(image: Image, paths: list[str]) -> Callable[[], torch.Tensor]:
    """All training batches by DALI's own operators; the boxes, flips and colours are drawn as ours."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment as dali_rand_augment

    @pipeline_def(batch_size=IMAGE_BATCH, num_threads=NUM_THREADS, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def graph():
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        box, flip = (fn.external_source(name=name, dtype=types.INT32, ndim=ndim) for name, ndim in (("box", 1), ("flip", 0)))
        picture = fn.decoders.image_slice(content, start=box[:2], shape=box[2:], axes=[0, 1])
        picture = fn.flip(fn.resize(picture, size=(image.size, image.size), antialias=True), horizontal=flip)
        if image.colour_jitter:
            factors = fn.external_source(name="factors", dtype=types.FLOAT, ndim=1)
            picture = fn.color_twist(picture, brightness=factors[0], contrast=factors[1], saturation=factors[2])
        if image.rand_augment_ops:
            picture = dali_rand_augment.rand_augment(picture, n=image.rand_augment_ops, m=9, fill_value=128)
        return picture

    pipeline = graph()
    pipeline.build()

    def draw(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = generator("bench", index)
        box, flip = np.array(choose_training_box(image, 375, 500, rng), np.int32), np.int32(rng.random() < 0.5)
        return box, np.array(flip), rng.uniform(1 - image.colour_jitter, 1 + image.colour_jitter, 3).astype(np.float32)

    def run() -> torch.Tensor:
        batches = []
        for start in range(0, len(paths), IMAGE_BATCH):
            content = [np.fromfile(path, np.uint8) for path in paths[start : start + IMAGE_BATCH]]
            box, flip, factors = zip(*(draw(start + i) for i in range(len(content))), strict=True)
            colours = {"factors": list(factors)} if image.colour_jitter else {}
            [grid] = pipeline.run(content=content, box=list(box), flip=list(flip), **colours)
            batches.append(torch.from_dlpack(grid.as_tensor()))
        return batches[0]

    return run


def image_group(title: str) -> Group:
    image, paths = IMAGES[title], write_images()
    dataset = PillowImages(image, paths)
    expected = torch.stack([dataset[i] for i in range(IMAGE_BATCH)])
    # One level apart before RandAugment may be several after it, where that stretches the contrast or inverts.
    ours = 3 if image.rand_augment_ops else 0.3
    dali = 0.5 if title == "images" else math.inf  # DALI's own operators change colours otherwise
    makers = {
        OURS: (partial(decode_all, image, paths, IMAGE_BATCH), mean, ours),
        "DataLoader, Pillow": (partial(load, dataset, IMAGE_BATCH), largest, 0),
        DALI: (partial(dali_images, image, paths), mean, dali),
    }
    candidates = {name: partial(build, name, make, expected, *rule) for name, (make, *rule) in makers.items()}
    return group_of(title, NUM_IMAGES, "images", candidates)


# Videos: 32 frames, every second one, from a random start, cropped to 224 x 224 uint8

NUM_VIDEOS, VIDEO_BATCH, NUM_FRAMES = (2, 2, 80) if machine.IS_TINY else (16, 8, 250)
VIDEOS = {"H.264": ("mp4", "libx264"), "VP9": ("webm", "libvpx-vp9")}
VIDEO = Video()


def write_videos(kind: str, codec: str) -> list[str]:
    """Ten seconds of 340 x 256 pixels at 25 frames a second, as Kinetics' are: a drifting pattern with grain."""
    rng = generator("bench video")
    y, x = np.mgrid[:320, :420]
    pattern = 127 + 60 * np.stack([np.sin(x / 9 + y / 23), np.cos(x / 31) * np.sin(y / 7), np.sign(np.sin((x - y) / 19))], -1)
    frames = [(pattern[i // 4 :][:256, i // 5 :][:, :340] + rng.normal(0, 6, (256, 340, 1))).clip(0, 255) for i in range(NUM_FRAMES)]
    return [_write_video(Path(FILES.name) / f"{i}.{kind}", codec, frames) for i in range(2)] * (NUM_VIDEOS // 2)


def _write_video(path: Path, codec: str, frames: list[np.ndarray]) -> str:
    with av.open(str(path), "w") as container:
        fast = {"preset": "veryfast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
        stream = container.add_stream(codec, rate=25, options=fast)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return str(path)


class PyAVVideos(Dataset):
    """The clips that `Video` draws, made by PyAV and numpy."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = generator("bench", index)
        start, top, left = rng.random(3)
        rng.uniform(1, 1, 2)
        with av.open(self.paths[index]) as container:
            stream = container.streams.video[0]
            assert stream.time_base
            first = int(start * (NUM_FRAMES - 62))
            wanted = set(range(first, first + 64, 2))
            container.seek(round(first / 25 / stream.time_base), stream=stream)
            clip = []
            for frame in container.decode(stream):
                assert frame.time is not None
                if round(frame.time * 25) in wanted:
                    clip.append(frame.to_ndarray(format="rgb24"))
                if len(clip) == len(wanted):
                    break
        y, x = int(top * (256 - 224 + 1)), int(left * (340 - 224 + 1))
        frames = np.stack(clip)[:, y : y + 224, x : x + 224]
        return torch.from_numpy(frames[:, :, ::-1].copy() if rng.random() < 0.5 else np.ascontiguousarray(frames))


def video_group(title: str) -> Group:
    paths = write_videos(*VIDEOS[title])
    dataset = PyAVVideos(paths)
    expected = torch.stack([dataset[i] for i in range(VIDEO_BATCH)])
    makers = {
        OURS: (partial(decode_all, VIDEO, paths, VIDEO_BATCH), 1),
        "DataLoader, PyAV": (partial(load, dataset, VIDEO_BATCH), 0),
    }
    candidates = {name: partial(build, name, make, expected, largest, most) for name, (make, most) in makers.items()}
    return group_of(f"videos, {title}", NUM_VIDEOS, "clips", candidates)


# Sounds: eight of ten seconds, from a random start, as 800 x 128 log-mel energies

NUM_SOUNDS, SOUND_BATCH = (2, 2) if machine.IS_TINY else (128, 64)
SOUNDS = {"WAV, 16 kHz": ("wav", 16_000), "FLAC, 16 kHz": ("flac", 16_000), "FLAC, 44.1 kHz": ("flac", 44_100)}
AUDIO = Audio(spectrogram="mbt", channels=1)


def write_sounds(kind: str, rate: int) -> list[str]:
    """Tones that glide, with noise: FLAC packs them to about half, as music."""
    time, paths = np.arange(10 * rate) / rate, []
    for i in range(NUM_SOUNDS):
        rng = generator("bench sound", i)
        tones = sum(np.sin(2 * np.pi * hz * (time + 0.02 * time**2)) for hz in rng.uniform(100, 3000, 3))
        paths.append(str(Path(FILES.name) / f"{rate}-{i}.{kind}"))
        soundfile.write(paths[-1], 0.1 * tones + rng.normal(0, 0.01, len(time)), rate)
    return paths


class SoundfileSounds(Dataset):
    """The spectrograms that `Audio` makes, by soundfile, scipy's resampling, torch.stft and a matrix."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.window = torch.hamming_window(400)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "At least one mel filter has all zero values")  # true of 128 bands of 257 frequencies
            bands = mel_filter_bank(257, 128, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
        self.bands = torch.from_numpy(bands).float()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        wave, rate = soundfile.read(self.paths[index], dtype="float32")
        if rate != 16_000:
            wave = resample_poly(wave, 160, 441).astype(np.float32)
        start = int(generator("bench", index).integers(len(wave) - 128_240 + 1))
        part = torch.from_numpy(wave[start : start + 128_240])
        # torch.stft puts a window that is shorter than the transform in its middle: so many zeros go before and behind.
        part = torch.nn.functional.pad(part, (56, 56))
        spectrum = torch.stft(part, 512, 160, 400, self.window, center=False, return_complex=True)
        return (spectrum.abs().square().T @ self.bands).clamp(min=1e-6).log()


def dali_sounds(paths: list[str]) -> Callable[[], torch.Tensor]:
    """The spectrograms by DALI's own operators."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=SOUND_BATCH, num_threads=NUM_THREADS, device_id=None, prefetch_queue_depth=1)
    def graph():
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        wave, _ = fn.decoders.audio(content, downmix=True)
        part = fn.slice(wave, start=start, shape=[128_240], axes=[0])
        window = torch.hamming_window(400).tolist()
        power = fn.spectrogram(part, nfft=512, window_length=400, window_step=160, window_fn=window, center_windows=False)
        mel = fn.mel_filter_bank(power, sample_rate=16_000, nfilter=128, mel_formula="htk", normalize=False)
        logarithms = fn.to_decibels(mel, multiplier=math.log(10), reference=1.0, cutoff_db=math.log(1e-6))
        return fn.transpose(logarithms, perm=[1, 0])

    pipeline = graph()
    pipeline.build()

    def run() -> torch.Tensor:
        batches = []
        for first in range(0, len(paths), SOUND_BATCH):
            content = [np.fromfile(path, np.uint8) for path in paths[first : first + SOUND_BATCH]]
            starts = [generator("bench", first + i).integers(160_000 - 128_240 + 1, size=1).astype(np.int32) for i in range(len(content))]
            [pictures] = pipeline.run(content=content, start=starts)
            batches.append(torch.from_dlpack(pictures.as_tensor()))
        return batches[0]

    return run


def sound_group(title: str) -> Group:
    """DALI's resampler lets high tones come back as low ones: it has no turn where the rate changes."""
    paths, changes_rate = write_sounds(*SOUNDS[title]), "44.1" in title
    dataset = SoundfileSounds(paths)
    expected = torch.stack([dataset[i] for i in range(SOUND_BATCH)])
    makers = {
        OURS: (partial(decode_all, AUDIO, paths, SOUND_BATCH), mean, 0.05 if changes_rate else 1e-4),  # resamplers differ at the end
        "DataLoader, soundfile": (partial(load, dataset, SOUND_BATCH), largest, 1e-2),  # a process of one thread adds in another order
        DALI: (partial(dali_sounds, paths), mean, 1e-4),
    }
    candidates = {name: partial(build, name, make, expected, *rule) for name, (make, *rule) in makers.items()}
    return group_of(f"sounds, {title}", 10 * NUM_SOUNDS, "seconds", candidates)


GROUPS = {
    **{title: (partial(image_group, title), [OURS, "DataLoader, Pillow", DALI]) for title in IMAGES},
    **{title: (partial(video_group, title), [OURS, "DataLoader, PyAV"]) for title in VIDEOS},
    **{title: (partial(sound_group, title), [OURS, "DataLoader, soundfile", *([] if "44.1" in title else [DALI])]) for title in SOUNDS},
}
if machine.IS_TINY:
    GROUPS = {title: GROUPS[title] for title in ("images", "H.264", "WAV, 16 kHz")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # DALI's RandAugment uses names that DALI has given up
@pytest.mark.parametrize(("group", "candidate"), candidate_params(GROUPS), indirect=["group"])
def test_data(group, candidate, benchmark):
    group.enter(candidate, benchmark)
