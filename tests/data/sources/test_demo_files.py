import csv
import io
import os
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from numpy._core import _multiarray_umath as cpu
from PIL import Image
from tiny_runs import tile_task

from polyvit_fast import experiments
from polyvit_fast.data.sources import demo_files
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.data.sources.demo_files import MOTIONS, RECIPES, SAMPLE_RATE_HZ, SHAPES, TONES, VOICES_HZ, DemoFiles
from polyvit_fast.data.video import encode
from polyvit_fast.randomness import generator

KINDS = tuple(RECIPES)


def samples(folder: Path, kind, split="train", num_samples=12):
    task = tile_task(num_classes=6, loss="sigmoid", multi_label=True) if RECIPES[kind].multi_label else tile_task(num_classes=6)
    return DemoFiles(kind=kind, split=split, num_samples=num_samples, root=str(folder)).samples(task)


def contents(folder: Path, kind, **more):
    return [Path(sample.media.path).read_bytes() for sample in samples(folder, kind, **more)]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_equal_everywhere_and_differ_from_each_other(tmp_path, kind):
    here, there = contents(tmp_path / "here", kind), contents(tmp_path / "there", kind)
    assert here == there
    held_out = contents(tmp_path / "here", kind, split="val")
    assert len({*here, *held_out}) == 24


ELSEWHERE = """
import ctypes, sys, av
from tests.data.sources.test_demo_files import KINDS, Path, contents, encode
(library,) = {line.split()[-1] for line in open("/proc/self/maps") if "/libavutil" in line}
ctypes.CDLL(library).av_force_cpu_flags(0)
for kind in KINDS:
    contents(Path(sys.argv[1]), kind)
encode.VIDEO_ENCODERS = ("mpeg4",)
encode._video_encoder.cache_clear()
contents(Path(sys.argv[1]) / "without x264", "motion")
"""


def test_files_do_not_depend_on_the_instructions_of_the_cpu(tmp_path, monkeypatch):
    """FFmpeg, libjpeg-turbo and NumPy without their vector instructions, as on the oldest CPU; x264 uses none anywhere."""
    optional = [name for name in cpu.__cpu_dispatch__ if cpu.__cpu_features__[name]]
    path = os.pathsep.join(sys.path)
    without = {"JSIMD_FORCENONE": "1", "NPY_DISABLE_CPU_FEATURES": " ".join(optional), "PYTHONPATH": path}
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(there)], env=os.environ | without, check=True)
    for kind in KINDS:
        assert contents(here, kind) == contents_as_they_are(there, kind)
    monkeypatch.setattr(encode, "_video_encoder", lambda: "mpeg4")
    assert contents(here / "without x264", "motion") == contents_as_they_are(there / "without x264", "motion")


def contents_as_they_are(folder: Path, kind):
    files = sorted((folder / kind / "train").glob("[0-9]*"))
    assert len(files) == 12
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_of_the_kind_that_their_names_say(tmp_path, kind):
    first = contents(tmp_path, kind, num_samples=1)[0]
    magic = {"shapes": b"\xff\xd8", "textures": b"\xff\xd8", "motion": b"ftyp", "tones": b"fLaC", "chords": b"RIFF"}[kind]
    assert magic in first[:12]
    if kind == "motion":
        with av.open(io.BytesIO(first)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert container.streams.video[0].frames == demo_files.NUM_FRAMES


def test_the_demo_takes_less_than_fifty_megabytes(tmp_path):
    mean_bytes = {kind: np.mean([len(content) for content in contents(tmp_path, kind)]) for kind in KINDS}
    numbers = {name: task.train.num_samples + task.val.num_samples for name, task in experiments.load("demo").tasks.items()}
    assert numbers.keys() == mean_bytes.keys()
    assert sum(numbers[kind] * size for kind, size in mean_bytes.items()) < 50e6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not RECIPES[kind].multi_label])
def test_classes_are_equally_frequent(tmp_path, kind):
    assert Counter(sample.labels[0] for sample in samples(tmp_path, kind, num_samples=18)) == dict.fromkeys(range(6), 3)


def test_what_is_there_is_left_and_what_is_missing_is_made(tmp_path):
    files = [Path(sample.media.path) for sample in samples(tmp_path, "chords")]
    files[3].unlink()
    before = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert contents(tmp_path, "chords", num_samples=14)[3]
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert len(os.listdir(files[0].parent)) == 15  # with the stamp


def test_counting_and_naming_classes_makes_no_file(tmp_path):
    for kind in KINDS:
        source = DemoFiles(kind=kind, num_samples=12, root=str(tmp_path / "files"))
        task = tile_task(num_classes=6, train=source, val=source)
        assert (source.count(task), source.class_names(task), source.remarks(task)) == (12, RECIPES[kind].classes, [])
        assert class_list(task) == RECIPES[kind].classes
    assert os.listdir(tmp_path) == []


def test_files_of_another_version_are_made_anew(tmp_path, monkeypatch):
    old = contents(tmp_path, "shapes")
    monkeypatch.setattr(demo_files, "VERSION", 0)
    assert not set(old) & set(contents(tmp_path, "shapes"))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"demo files cannot be written to .*file/shapes: Not a directory"):
        samples(tmp_path / "file", "shapes")


def test_the_manifest_names_the_classes(tmp_path):
    samples(tmp_path, "motion")
    with open(tmp_path / "motion" / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["labels"] for row in rows[:6]] == list(MOTIONS)


def test_nothing_but_the_shape_differs_between_shapes():
    pictures = [demo_files._encode_shape((label,), generator("same")) for label in range(len(SHAPES))]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture)), int) for picture in pictures])
    spread = np.ptp(pixels, axis=0).max(-1)
    assert (spread < 40).mean() > 0.4  # the ground and the inside that shapes have in common, but for JPEG's noise
    assert (spread > 60).mean() > 0.05


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_first_frame_does_not_tell_the_motion(motion):
    first, other = (demo_files._draw_clip(name, generator("same"))[0] for name in (motion, "left"))
    assert np.array_equal(first, other)


def test_the_last_frames_of_all_motions_have_one_distribution():
    def describe(motion, i):
        frame = demo_files._draw_clip(motion, generator("distribution", motion, i))[-1].astype(float).mean(-1)
        down, right = np.gradient(frame)
        return frame.mean(), frame.std(), (down**2).mean() ** 0.5, (right**2).mean() ** 0.5, (down * right).mean()

    numbers = np.array([[describe(motion, i) for i in range(30)] for motion in MOTIONS])
    means, stds = numbers.mean(1), numbers.std(1) / 30**0.5
    overall = numbers.mean((0, 1))
    assert (abs(means - overall) < 4 * stds).all()


def test_patterns_move_as_their_class_says():
    for motion, (right, down, clockwise) in MOTIONS.items():
        clip = demo_files._draw_clip(motion, generator("flow")).astype(float).mean(-1)
        down_slope, right_slope = np.gradient(clip[:-1], axis=(1, 2))
        change = np.diff(clip, axis=0)
        y, x = np.mgrid[:72, :72] - 35.5
        # Optical flow by least squares: change = - slope · velocity; clockwise turns move a point (x, y), y down, by (-y, x).
        slopes = [right_slope, down_slope, right_slope * -y + down_slope * x]
        right_found, down_found, turn_found = np.linalg.lstsq(np.stack([s.ravel() for s in slopes], 1), -change.ravel(), rcond=None)[0]
        assert np.sign(np.round([right_found, down_found, turn_found * 20])).tolist() == [right, down, clockwise], motion


def loud_frequencies(time_hz):
    """The strongest frequency of each of 30 chunks of a sound, 0 where it is nearly silent."""
    chunks = np.array_split(time_hz.astype(float), 30)
    spectra = [np.abs(np.fft.rfft(chunk * np.hanning(len(chunk)), 8192)) for chunk in chunks]
    loudest = max(spectrum.max() for spectrum in spectra)
    return np.array([spectrum.argmax() * SAMPLE_RATE_HZ / 8192 if spectrum.max() > 0.3 * loudest else 0 for spectrum in spectra])


def test_tones_go_on_as_their_class_says():
    for i in range(5):
        pitches = {tone: loud_frequencies(demo_files._draw_tone(tone, generator("tone", i))) for tone in TONES}
        assert np.ptp(pitches["steady"]) < 40
        assert pitches["rising"][-3:].mean() > 1.5 * pitches["rising"][:3].mean() > 0
        assert pitches["falling"][:3].mean() > 1.5 * pitches["falling"][-3:].mean() > 0
        assert (pitches["pulses"] == 0).sum() >= 5
        heard = pitches["warble"]
        assert np.ptp(heard) > 0.2 * heard.mean()
        assert (np.diff(np.sign(heard - np.median(heard))) != 0).sum() >= 4
        steps = pitches["steps"]
        assert 1.25 < np.percentile(steps, 90) / np.percentile(steps, 10) < 1.6


def test_chords_hold_exactly_the_voices_of_their_labels(tmp_path):
    counts = Counter()
    for sample in samples(tmp_path, "chords", num_samples=60):
        with wave.open(sample.media.path) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        hertz = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE_HZ)
        heard = [voice for voice, hz in enumerate(VOICES_HZ) if spectrum[abs(hertz - hz) < 3].max() > 12 * np.median(spectrum)]
        assert tuple(heard) == sample.labels
        counts[len(heard)] += 1
    assert set(counts) == {0, 1, 2, 3, 4}
