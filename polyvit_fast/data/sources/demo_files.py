"""The demo's media files, drawn from seeds: real JPEG, H.264, FLAC and WAV for five small tasks. Each can be solved in one way only.

| kind | file | question | what does not help |
|---|---|---|---|
| shapes | JPEG | which shape? | position, size, angle, texture and colours, which are the same for all classes |
| textures | JPEG | what covers the shape? | the same: the pictures are of the same kind |
| motion | H.264 | how does the pattern move? | a single frame: the frames of all classes have the same distribution |
| tones | FLAC | how does the tone go on? | its pitch, loudness and timbre, and the noise |
| chords | WAV | which of six voices sound? | their number, loudness and phase, and the noise |
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8

from polyvit_fast.config import Source, Task
from polyvit_fast.config.record import check_range
from polyvit_fast.data.sources.manifest import Manifest
from polyvit_fast.data.video.encode import encode_h264
from polyvit_fast.extras import require
from polyvit_fast.files import absolute, write_atomically
from polyvit_fast.media import Sample
from polyvit_fast.randomness import generator

VERSION = 2  # of the recipes below; files of another version are made again
PICTURE_SIZE = 72
NUM_FRAMES, FRAMES_PER_SECOND = 12, 12
SAMPLE_RATE_HZ, SOUND_SECONDS = 8_000, 1.05
VOICES_HZ = (233.0, 377.0, 610.0, 987.0, 1597.0, 2584.0)  # neighbours in the ratio 1.618: no harmonic of one is another

Kind = Literal["shapes", "textures", "motion", "tones", "chords"]
Rng = np.random.Generator
Plane = Float[np.ndarray, "rows columns"]


@dataclass(frozen=True, kw_only=True)
class DemoFiles(Source):
    """The demo's own files. Missing ones are made first, from seeds: the same bytes on every CPU, with the same encoder versions."""

    kind: Kind
    """What the files show."""
    split: Literal["train", "val"] = "train"
    """The two have no file in common."""
    num_samples: int = 500
    """Files of this split."""
    root: str = "demo-files"
    """Folder that holds the files of all kinds. A relative path starts from the folder in which the command runs."""

    def __post_init__(self) -> None:
        check_range(self, "[1, 1000000]", "num_samples")

    def samples(self, task: Task) -> Sequence[Sample]:
        """The files, as the manifest in their folder lists them. Raises ValueError when they cannot be written."""
        manifest = Path(self.root) / self.kind / f"{self.split}.csv"
        try:
            self._complete(manifest)
        except OSError as error:
            raise ValueError(f"demo files cannot be written to {absolute(manifest.parent)}: {error.strerror or error}") from error
        return Manifest(path=str(manifest), classes=str(manifest.with_name("classes.txt"))).samples(task)

    def count(self, task: Task) -> int:
        """Files of this split, whether they exist already or not."""
        return self.num_samples

    def class_names(self, task: Task) -> tuple[str, ...]:
        """What the files show."""
        return RECIPES[self.kind].classes

    def describe_classes(self, names: Sequence[str]) -> str:
        """The kind of demo files, and how many classes it has."""
        return f"demo files of {self.kind}: they have {len(names)} classes"

    def _complete(self, manifest: Path) -> None:
        """Make what is missing. The stamp holds the version of the existing files."""
        recipe, folder = RECIPES[self.kind], manifest.with_suffix("")
        stamp = folder / "VERSION"
        if not stamp.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{absolute(folder)} holds other files than demo files; choose another root, or move them away")
        if not stamp.is_file() or stamp.read_text() != str(VERSION):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomically(stamp, str(VERSION))
        existing = set(os.listdir(folder))
        names = [f"{index:04d}{recipe.suffix}" for index in range(self.num_samples)]
        missing = [index for index, name in enumerate(names) if name not in existing]
        if missing:
            self._make(recipe, missing, [folder / names[index] for index in missing])
        write_atomically(manifest.with_name("classes.txt"), "\n".join(recipe.classes))
        labels = [" ".join(recipe.classes[label] for label in self._draw(recipe, index)[0]) for index in range(self.num_samples)]
        rows = [("path", "labels"), *((f"{self.split}/{name}", label) for name, label in zip(names, labels, strict=True))]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(manifest, text.getvalue())

    def _make(self, recipe: Recipe, indices: Sequence[int], paths: Sequence[Path]) -> None:
        from rich.console import Console
        from rich.progress import Progress

        from polyvit_fast.data.threads import map_in_threads

        require("making the demo's files", "PIL", "av")

        def make(item: tuple[int, Path]) -> None:
            index, path = item
            write_atomically(path, recipe.encode(*self._draw(recipe, index)))
            progress.advance(bar)

        console = Console(stderr=True)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task(f"making {paths[0].parent}", total=len(indices))
            map_in_threads(make, list(zip(indices, paths, strict=True)), 2)
        console.print(f"made {len(indices)} files in {paths[0].parent}", highlight=False)

    def _draw(self, recipe: Recipe, index: int) -> tuple[tuple[int, ...], Rng]:
        """A file's labels, and the generator that determines the rest of it."""
        rng = generator("demo", VERSION, self.kind, self.split, index)
        if not recipe.multi_label:
            return (index % len(recipe.classes),), rng
        present = rng.permutation(len(recipe.classes))[: rng.integers(0, 5)]
        return tuple(sorted(present.tolist())), rng


@dataclass(frozen=True)
class Recipe:
    """How the files of one kind are made."""

    classes: tuple[str, ...]
    suffix: str
    encode: Callable[[tuple[int, ...], Rng], bytes]
    """The file's content, from its labels."""
    multi_label: bool = False


# Pictures: a textured shape in two colours on a plain background of a third.

SHAPES: dict[str, Callable[[Plane, Plane], Bool[np.ndarray, "rows columns"]]] = {
    "circle": lambda x, y: x**2 + y**2 < 0.85,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.77) < 0.23,
    "crescent": lambda x, y: (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.55),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
    "triangle": lambda x, y: (y > -0.6) & (y < 1.1 - 1.8 * abs(x)),
}
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {  # of coordinates with the period 2 pi; the second colour is above 0
    "plain": lambda x, y: -np.ones_like(x),
    "across": lambda x, y: np.sin(y),
    "down": lambda x, y: np.sin(x),
    "slash": lambda x, y: np.sin((x + y) * 0.7071),
    "backslash": lambda x, y: np.sin((x - y) * 0.7071),
    "checks": lambda x, y: np.sin(x) * np.sin(y),
}


def _encode_picture(shape: str, texture: str, rng: Rng) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_draw_picture(shape, texture, rng)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _draw_picture(shape: str, texture: str, rng: Rng) -> UInt8[np.ndarray, "rows columns 3"]:
    fine = 2  # drawn this much larger and then averaged, for smooth edges
    axis = (np.arange(PICTURE_SIZE * fine) + 0.5) / fine - PICTURE_SIZE / 2
    radius, angle, period = rng.uniform(20, 28), rng.uniform(-0.35, 0.35), rng.uniform(8, 13)
    left, up = rng.uniform(radius - 33, 33 - radius, 2)
    x, y = np.meshgrid(axis - left, -axis - up)
    turned = (x * np.cos(angle) + y * np.sin(angle)) / radius, (y * np.cos(angle) - x * np.sin(angle)) / radius
    inside = SHAPES[shape](*turned)
    phase = rng.uniform(0, 2 * np.pi, 2)
    second = TEXTURES[texture](2 * np.pi / period * x + phase[0], 2 * np.pi / period * y + phase[1]) > 0
    colours = _draw_colours(rng)
    drawn = colours[np.where(inside, 1 + second, 0)]
    drawn = drawn.reshape(PICTURE_SIZE, fine, PICTURE_SIZE, fine, 3).mean((1, 3)) + rng.normal(0, 5, (PICTURE_SIZE, PICTURE_SIZE, 3))
    return drawn.clip(0, 255).astype(np.uint8)


def _draw_colours(rng: Rng) -> Float[np.ndarray, "3 3"]:
    """Three colours, from dark to light or from light to dark."""
    levels = np.array([45, 150, 205]) + rng.uniform(-15, 15, 3)
    hues = rng.uniform(-35, 35, (3, 3))
    colours = levels[:, None] + hues - hues.mean(1, keepdims=True)
    return colours if rng.random() < 0.5 else 255 - colours


def _encode_shape(labels: tuple[int, ...], rng: Rng) -> bytes:
    return _encode_picture(tuple(SHAPES)[labels[0]], str(rng.choice(list(TEXTURES))), rng)


def _encode_texture(labels: tuple[int, ...], rng: Rng) -> bytes:
    return _encode_picture(str(rng.choice(list(SHAPES))), tuple(TEXTURES)[labels[0]], rng)


# Clips: an endless pattern that drifts, or turns around the middle of the picture.

MOTIONS: dict[str, tuple[float, float, float]] = {  # (to the right, down, clockwise)
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "clockwise": (0, 0, 1),
    "anticlockwise": (0, 0, -1),
}


def _encode_motion(labels: tuple[int, ...], rng: Rng) -> bytes:
    return encode_h264(_draw_clip(tuple(MOTIONS)[labels[0]], rng), FRAMES_PER_SECOND)


def _draw_clip(motion: str, rng: Rng) -> UInt8[np.ndarray, "frames rows columns 3"]:
    """A sum of plane waves with random directions and phases, in two colours.

    Such a pattern has the same distribution after any shift and any rotation, so a single frame says nothing about its class.
    """
    right, down, clockwise = MOTIONS[motion]
    speed, turn = rng.uniform(2.0, 3.5), rng.uniform(0.09, 0.15)  # pixels and radians per frame
    num_waves = 16
    length, direction, phase = rng.uniform(14, 28, num_waves), *rng.uniform(0, 2 * np.pi, (2, num_waves))
    axis = np.arange(PICTURE_SIZE) - (PICTURE_SIZE - 1) / 2
    dark, _, light = _draw_colours(rng)
    frames = []
    for time in range(NUM_FRAMES):
        angle = direction + clockwise * turn * time
        along_x, along_y = 2 * np.pi / length * np.cos(angle), 2 * np.pi / length * np.sin(angle)
        shifted = phase - speed * time * (right * along_x + down * along_y)
        # cos(a + b) for all pixels at once: the real part of a product of a column and a row for every wave. By einsum, because the
        # threads of matrix products would get in each other's way here, and their rounding differs between CPUs.
        rows, columns = np.exp(1j * np.outer(axis, along_y)), np.exp(1j * (np.outer(along_x, axis) + shifted[:, None]))
        field = np.einsum("yw,wx->yx", rows, columns).real / np.sqrt(num_waves / 2)
        brightness = (0.5 + 1.2 * field).clip(0, 1)[..., None]
        frames.append(dark + brightness * (light - dark))
    clip = np.stack(frames)
    return (clip + rng.normal(0, 4, clip.shape)).clip(0, 255).astype(np.uint8)


# Sounds: a tone that develops in one of six ways, or up to four of six voices at once.

Wave = Float[np.ndarray, " time"]
TONES: dict[str, Callable[[Wave, Rng], tuple[Wave, Wave]]] = {  # from seconds to (octaves above the pitch, loudness)
    "steady": lambda t, rng: (0 * t, 0 * t + 1),
    "rising": lambda t, rng: (rng.uniform(1.0, 1.8) * t, 0 * t + 1),
    "falling": lambda t, rng: (rng.uniform(1.0, 1.8) * -t, 0 * t + 1),
    "warble": lambda t, rng: (0.3 * np.sin(2 * np.pi * (rng.uniform(3, 5) * t + rng.random())), 0 * t + 1),
    "pulses": lambda t, rng: (0 * t, ((rng.uniform(5, 8) * t + rng.random()) % 1 < 0.5).astype(float)),
    "steps": lambda t, rng: (0.5 * (np.floor(rng.uniform(3, 4.5) * t + rng.random()) % 2), 0 * t + 1),
}


def _encode_tone(labels: tuple[int, ...], rng: Rng) -> bytes:
    return _encode_flac(_draw_tone(tuple(TONES)[labels[0]], rng))


def _draw_tone(tone: str, rng: Rng) -> Int16[np.ndarray, " time"]:
    time = np.arange(round(SAMPLE_RATE_HZ * SOUND_SECONDS)) / SAMPLE_RATE_HZ
    octaves, loudness = TONES[tone](time, rng)
    octaves = octaves - octaves.mean()
    pitch_hz = 2 ** (rng.uniform(np.log2(200), np.log2(700)) + octaves)  # its third harmonic stays below 4 kHz
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    sound = np.sin(phase) + rng.uniform(0, 0.7) * np.sin(2 * phase) + rng.uniform(0, 0.5) * np.sin(3 * phase)
    return _add_noise(sound * loudness, rng)


def _encode_chord(labels: tuple[int, ...], rng: Rng) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(SAMPLE_RATE_HZ)
        wav.writeframes(_draw_chord(labels, rng).astype("<i2").tobytes())
    return file.getvalue()


def _draw_chord(voices: tuple[int, ...], rng: Rng) -> Int16[np.ndarray, " time"]:
    time = np.arange(round(SAMPLE_RATE_HZ * SOUND_SECONDS)) / SAMPLE_RATE_HZ
    sound = np.zeros_like(time)
    for voice in voices:
        phase = 2 * np.pi * (VOICES_HZ[voice] * time + rng.random())
        sound += rng.uniform(0.4, 1) * (np.sin(phase) + 0.3 * np.sin(2 * phase))
    return _add_noise(sound, rng)


def _add_noise(sound: Wave, rng: Rng) -> Int16[np.ndarray, " time"]:
    noisy = sound + rng.normal(0, 10 ** rng.uniform(-1.5, -0.5), len(sound))
    return (noisy * rng.uniform(0.2, 1) * 32767 / np.abs(noisy).max()).astype(np.int16)


def _encode_flac(sound: Int16[np.ndarray, " time"]) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="flac", options={"metadata_header_padding": "0"}) as container:
        # Fixed predictors are integers; fitted ones come from floating point, which may differ between CPUs.
        stream = container.add_stream("flac", rate=SAMPLE_RATE_HZ, layout="mono", options={"lpc_type": "fixed"})
        frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


RECIPES = {
    "shapes": Recipe(tuple(SHAPES), ".jpg", _encode_shape),
    "textures": Recipe(tuple(TEXTURES), ".jpg", _encode_texture),
    "motion": Recipe(tuple(MOTIONS), ".mp4", _encode_motion),
    "tones": Recipe(tuple(TONES), ".flac", _encode_tone),
    "chords": Recipe(tuple(f"{hz:.0f}Hz" for hz in VOICES_HZ), ".wav", _encode_chord, multi_label=True),
}
