import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path

import av
import numpy as np
import pytest
from long_forms import mark_long
from PIL import Image as Pillow
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.config import Decoder, Task
from polyvit_fast.data.checking import check
from polyvit_fast.data.checking.check import Verdict, check_files, find_broken, scan
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media, MediaError, Sample
from polyvit_fast.randomness import generator


def scan_train(task: Task, num_workers: int, deadline_seconds: float):
    return scan("tiles", task, "train", task.train.samples(task), num_workers, deadline_seconds)


@dataclass(frozen=True, kw_only=True)
class Treacherous(Synthetic):
    """Samples whose decoding does what no decoder should; with `build`, already the building of the decoder."""

    build: str = ""

    def decoder(self, task: Task, **options) -> Decoder:
        inner = super().decoder(task, **options)
        if self.build:
            FAULTS[self.build](None)

        def decode(media, rngs):
            grid = inner(media, rngs)
            FAULTS.get(PLANTED.get(media[0].name, ""), lambda grid: None)(grid)
            return grid

        return decode


def broken(grid):
    raise MediaError("it is broken")


def unusable(grid):
    raise ZeroDivisionError("a fault\n\n  of two lines")


def defective(grid):
    return grid.no_such_attribute


FAULTS = {
    "crash": lambda grid: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda grid: os._exit(3),
    "hang": lambda grid: time.sleep(1000),
    "broken": broken,
    "unusable": unusable,
    "defective": defective,
    "not finite": lambda grid: grid.view(-1)[5:6].fill_(float("nan")),
}
PLANTED = {"synthetic:20": "defective"} | {
    f"synthetic:{2 * i}": fault for i, fault in enumerate(("broken", "crash", "unusable", "exit", "hang", "not finite"))
}
REASONS = {
    0: "it is broken",
    2: "the decoder crashed on it (SIGSEGV)",
    4: "ZeroDivisionError: a fault of two lines",
    6: "the decoder crashed on it (exit code 3)",
    8: "it was not decoded within 2 seconds",
    10: "some of its numbers are not finite",
}


def test_every_fault_is_named_and_the_rest_goes_on():
    task = tile_task(train=Treacherous(num_samples=13))
    verdicts = list(scan_train(task, 2, 2.0))
    assert verdicts == [Verdict(i, f"synthetic:{i}", REASONS.get(i, "")) for i in range(13)]
    samples = task.train.samples(task)[3:6]
    assert find_broken("tiles", task, samples, deadline_seconds=2.0, num_workers=1) == [Verdict(1, "synthetic:4", REASONS[4])]


def test_a_defect_of_the_decoder_is_no_broken_file_and_ends_the_check():
    task = tile_task(train=Treacherous(num_samples=21))
    verdicts = scan("tiles", task, "train", task.train.samples(task)[19:], 1, 60.0)
    message = r"(?s)task tiles, file synthetic:20: the decoder has a bug, and the file is not to blame; .*grid.no_such_attribute"
    assert next(verdicts) == Verdict(0, "synthetic:19")
    with pytest.raises(RuntimeError, match=message):
        next(verdicts)
    assert not active_children()


@pytest.mark.parametrize(("fault", "message"), [("defective", "AttributeError: .*no_such_attribute"), ("crash", "SIGSEGV")])
def test_a_decoder_that_cannot_be_built_is_reported(fault, message):
    task = tile_task(train=Treacherous(num_samples=2, build=fault))
    with pytest.raises(RuntimeError, match=f"task tiles: a process that checks its files did not start: {message}"):
        list(scan_train(task, 1, 60.0))


def test_a_class_of_a_function_cannot_be_sent():
    class Local(Tile):
        pass

    with pytest.raises(ValueError, match=r"task tiles: it cannot be sent to the processes .*; define its classes in an importable module"):
        list(scan_train(tile_task(modality=Local()), 1, 60.0))


def test_a_scan_that_is_not_read_to_its_end_leaves_no_process():
    verdicts = scan_train(tile_task(modality=Tile(views=3)), 1, 60.0)
    assert next(verdicts) == Verdict(0, "synthetic:0")
    assert len(active_children()) == 1
    verdicts.close()
    assert not active_children()


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three PNGs: one of them empty, one truncated."""
    folder = tmp_path / "pictures"
    for label in ("blue", "red"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Pillow.new("RGB", (40, 40), label).save(folder / label / f"{i}.png")
    (folder / "red" / "1.png").write_bytes(b"")
    (folder / "blue" / "2.png").write_bytes((folder / "blue" / "0.png").read_bytes()[:-30])
    return folder


def picture_task(source):
    return tile_task(modality=Image(size=32), train=source, val=source, num_classes=2)


def test_a_slow_picture_misses_a_short_deadline(pictures):
    Pillow.new("L", (9400, 9400)).save(pictures / "blue" / "1.png", compress_level=1)
    task = picture_task(Folder(path=str(pictures)))
    samples = task.train.samples(task)
    verdicts = find_broken("pictures", task, samples, deadline_seconds=0.5)
    reasons = {os.path.relpath(verdict.name, pictures): verdict.reason for verdict in verdicts}
    assert reasons["blue/1.png"] == "it was not decoded within 0.5 seconds"
    assert reasons["red/1.png"] == "the file is empty"
    assert reasons["blue/2.png"] == "truncated: the PNG's end is missing"
    assert len(reasons) == 3


def test_clean_manifests_hold_the_good_files(pictures, tmp_path, capsys):
    folder = Folder(path=str(pictures))
    config = tiny_config(tasks={"pictures": picture_task(folder), "tiles": tile_task()})
    assert check_files(config, tmp_path / "out", 1, 60.0) == 4
    lines = capsys.readouterr().out
    assert "pictures train: 4 of 6 files are good" in lines
    assert f"{pictures}/red/1.png: the file is empty" in lines
    assert "pictures: its validation files are its training files" in lines
    files = ["broken.tsv", "pictures-classes.txt", "pictures-train.csv", "pictures-train.sha256", "pictures-val.csv", "pictures-val.sha256"]
    assert sorted(os.listdir(tmp_path / "out")) == files
    rows = [line.split("\t") for line in (tmp_path / "out" / "broken.tsv").read_text().splitlines()]
    assert rows[0] == ["task", "split", "path", "reason"]
    assert [row[:3] for row in rows[1:3]] == [
        ["pictures", "train", str(pictures / "blue" / "2.png")],
        ["pictures", "train", f"{pictures}/red/1.png"],
    ]
    task = config.tasks["pictures"]
    bad = {row[2] for row in rows[1:]}
    expected = [sample for sample in folder.samples(task) if sample.media.name not in bad]
    assert Manifest(path=str(tmp_path / "out" / "pictures-train.csv")).samples(task) == expected


def test_without_broken_files_there_is_no_list_of_them(tmp_path):
    (tmp_path / "files" / "a").mkdir(parents=True)
    Pillow.new("RGB", (8, 8)).save(tmp_path / "files" / "a" / "x.png")
    config = tiny_config(tasks={"p": tile_task(modality=Image(size=32), train=Folder(path=str(tmp_path / "files")), num_classes=1)})
    assert check_files(config, tmp_path / "out", 1, 60.0) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["p-classes.txt", "p-train.csv", "p-train.sha256"]
    (tmp_path / "out" / "broken.tsv").write_text("of an earlier check")
    assert check_files(config, tmp_path / "out", 1, 60.0) == 0
    assert not (tmp_path / "out" / "broken.tsv").exists()


def test_a_video_is_looked_at_all_over(tmp_path):
    good = tmp_path / "good.mp4"
    with av.open(str(good), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(100):
            frame = np.random.default_rng(number).integers(0, 255, (48, 64, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(good.read_bytes())
    start = content.index(b"mdat") + len(content) // 50
    content[start : start + len(content) // 40] = bytes(len(content) // 40)  # in the first frames, far from the middle clip
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    video = Video(size=32, short_side=32, frames=4, tubelet_frames=2)
    assert build_decoder(video, batch=1, train=False, num_threads=1)([Media(str(damaged))], [generator(0)]).shape[0] == 1
    samples = [Sample(Media(str(good)), (0,)), Sample(Media(str(damaged)), (1,))]
    verdicts = find_broken("clips", tile_task(modality=video, train=Folder(path="unread")), samples, deadline_seconds=60.0, num_workers=1)
    assert [(verdict.index, verdict.reason[:8]) for verdict in verdicts] == [(1, "damaged:")]


def colour_folder(path, names, colours=("red", "blue")):
    """A class for each colour, with pictures of all names, each of a size of its own."""
    for label in colours:
        (path / label).mkdir(parents=True)
        for number, name in enumerate(names):
            with open(path / label / name, "wb") as file:
                Pillow.new("RGB", (40 + number, 40), label).save(file, "PNG")
    return Folder(path=str(path))


ODD_NAMES = [b"plain.png", b"caf\xe9.png", b"new\nline.png", b"car\rriage.png", b'quote".png', b"com,ma.png", b"tab\t.png", b" blank.png "]
ODD_NAMES += [
    "猫 🐱.png".encode(),
    b"\x1b[31mred.png",
    b"semi;colon.png",
    b"back\\slash.png",
    b"l" * 240 + b".png",
    b"#x%41.png",
    b"\xff\xfe",
]


def test_files_of_any_name_are_checked_listed_and_read_back(tmp_path, capsys):
    source = colour_folder(tmp_path / "files", [os.fsdecode(name) for name in ODD_NAMES])
    task = picture_task(source)
    config = tiny_config(tasks={"p": replace(task, val=Synthetic())})
    assert check_files(config, tmp_path / "out", 1, 60.0) == 0
    manifest = Manifest(path=str(tmp_path / "out" / "p-train.csv"))
    assert manifest.samples(task) == source.samples(task)
    assert manifest.samples(picture_task(replace(manifest, classes=str(tmp_path / "out" / "p-classes.txt")))) == source.samples(task)
    for sample in source.samples(task):
        with open(sample.media.path, "wb") as file:
            file.write(b"broken")
    capsys.readouterr()
    assert check_files(config, tmp_path / "out", 1, 60.0) == 2 * len(ODD_NAMES)
    lines = capsys.readouterr().out
    assert "p train: " + str(tmp_path / "files" / "blue" / "caf\\xe9.png") + ": " in lines
    assert "new\\nline.png: " in lines
    assert "\x1b" not in lines
    with open(tmp_path / "out" / "broken.tsv", newline="", errors="surrogateescape") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert [row[2] for row in rows[1:]] == [sample.media.name for sample in source.samples(task)]


def test_equal_files_are_named_where_they_should_not_be(tmp_path, capsys):
    train = colour_folder(tmp_path / "train", ["a.png", "b.png"])
    val = colour_folder(tmp_path / "val", ["c.png"])
    os.replace(tmp_path / "val" / "red" / "c.png", tmp_path / "val" / "red" / "other.png")
    (tmp_path / "val" / "red" / "c.png").write_bytes((tmp_path / "train" / "blue" / "b.png").read_bytes())
    (tmp_path / "train" / "red" / "d.png").write_bytes((tmp_path / "train" / "blue" / "a.png").read_bytes())
    for folder in ("train", "val"):
        (tmp_path / folder / "red" / "empty.png").write_bytes(b"")
    task = replace(picture_task(train), val=val)
    assert check_files(tiny_config(tasks={"p": task}), tmp_path / "out", 1, 60.0) == 2
    lines = capsys.readouterr().out
    assert f"p train: 1 files are equal to another one with other labels: {tmp_path}/train/red/d.png = {tmp_path}/train/blue/a.png" in lines
    assert f"p val: 3 files are in the training split too, by their bytes: {tmp_path}/val/blue/c.png = {tmp_path}/train/blue/a.png" in lines
    rows = [line.split("\t") for line in (tmp_path / "out" / "duplicates.tsv").read_text().splitlines()]
    assert rows[1] == ["p", "train", f"{tmp_path}/train/red/d.png", "1", "train", f"{tmp_path}/train/blue/a.png", "0"]
    assert [row[2].removeprefix(f"{tmp_path}/") for row in rows[2:]] == ["val/blue/c.png", "val/red/c.png", "val/red/other.png"]


def test_test_files_are_checked_like_validation_files(tmp_path, capsys):
    train, val = colour_folder(tmp_path / "train", ["a.png"]), colour_folder(tmp_path / "val", ["b.png"])
    test = colour_folder(tmp_path / "test", ["c.png", "d.png"])
    (tmp_path / "test" / "red" / "d.png").write_bytes(b"")
    config = tiny_config(tasks={"p": replace(picture_task(train), val=val, test=test)})
    assert check_files(config, tmp_path / "out", 1, 60.0) == 1
    lines = capsys.readouterr().out
    assert f"p test: {tmp_path}/test/red/d.png: the file is empty" in lines
    assert "p test: 3 of 4 files are good" in lines
    assert "p test: 2 files are in the training split too, by their bytes" in lines
    assert {"p-test.csv", "p-val.csv", "p-train.csv", "p-classes.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_changed_bytes_are_named_by_the_next_check(tmp_path, capsys):
    config = tiny_config(tasks={"p": replace(picture_task(colour_folder(tmp_path / "files", ["a.png", "b.png"])), val=Synthetic())})
    check_files(config, tmp_path / "out", 1, 60.0)
    changed = tmp_path / "files" / "red" / "b.png"
    status = changed.stat()
    other = bytearray(changed.read_bytes())
    other[-9] ^= 1  # in the last chunk's checksum, which decoders do not look at
    changed.write_bytes(other)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    check_files(config, tmp_path / "out", 1, 60.0)
    assert f"p train: 1 files have other bytes than at the last check: {changed}" in capsys.readouterr().out
    check_files(config, tmp_path / "out", 1, 60.0)
    assert "other bytes" not in capsys.readouterr().out


def test_a_split_that_cannot_be_listed_does_not_keep_the_others_from_being_checked(tmp_path, capsys):
    good = picture_task(colour_folder(tmp_path / "files", ["a.png"]))
    missing = Folder(path=str(tmp_path / "missing"))
    (tmp_path / "files" / "red" / "b.png").write_bytes(b"")
    config = tiny_config(tasks={"first": replace(good, train=missing), "p": replace(good, val=Manifest(path=str(tmp_path / "no.csv")))})
    message = "^3 splits could not be checked, for the reasons above: task first, train; task first, val; task p, val$"
    with pytest.raises(ValueError, match=message):
        check_files(config, tmp_path / "out", 1, 60.0)
    lines = capsys.readouterr().out
    assert f"task first, train: folder {tmp_path}/missing: No such file or directory" in lines
    assert "task first, val: its files were not checked: its labels need the class list of train, which cannot be read" in lines
    assert f"task p, val: manifest {tmp_path}/no.csv: No such file or directory" in lines
    assert "p train: 2 of 3 files are good" in lines
    assert f"p train: {tmp_path}/files/red/b.png: the file is empty" in lines
    assert sorted(os.listdir(tmp_path / "out")) == ["broken.tsv", "p-classes.txt", "p-train.csv", "p-train.sha256"]


def test_where_nothing_could_be_listed_nothing_more_is_reported(tmp_path, capsys):
    config = tiny_config(tasks={"p": picture_task(Folder(path=str(tmp_path / "missing")))})
    with pytest.raises(ValueError, match=r"^2 splits could not be checked, for the reasons above: task p, train; task p, val$"):
        check_files(config, tmp_path / "out", 1, 60.0)
    lines = capsys.readouterr().out
    assert lines.splitlines()[-1] == "no split was checked completely"
    assert "its validation files are its training files" not in lines
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True, kw_only=True)
class Commented(Synthetic):
    """Samples of a source that has something to say. Not `Synthetic` by name, so that they are checked."""

    def remarks(self, task: Task) -> list[str]:
        return ["line 3 repeats line 2"]


def test_remarks_of_a_source_are_reported_with_its_task_and_split(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "Synthetic", type(None))
    check_files(tiny_config(tasks={"t": tile_task(train=Commented(num_samples=1))}), tmp_path / "out", 1, 60.0)
    assert "t train: line 3 repeats line 2" in capsys.readouterr().out.splitlines()


STOPPED = """
import sys
from pathlib import Path
from polyvit_fast import cli
sys.argv[1:] = ["check", "stopped.py", "--manifests", "out", "--num-workers", "1", "--deadline-seconds", "120"]
cli.main()
"""
HANGING = """
import time
from dataclasses import dataclass
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.sources.manifest import Folder

@dataclass(frozen=True, kw_only=True)
class Hanging(Folder):
    def decoder(self, task, **options):
        decode = build_decoder(task.modality, **options)
        def hang(media, rngs):
            if media[0].path.endswith("z.png"):
                time.sleep(15)
            return decode(media, rngs)
        return hang
"""
EXPERIMENT = """
from hanging_source import Hanging
from polyvit_fast.config import Model, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder

done, hanging = Folder(path="done"), Hanging(path="hanging")
config = Train(
    tasks={"t": Task(modality=Image(size=32), train=done, val=hanging, num_classes=2, steps=1, batch=1)},
    model=Model(dim=32, depth=1, num_heads=2, mlp_dim=64),
)
"""


@pytest.mark.parametrize(
    ("number", "code"), mark_long([(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)], [(signal.SIGTERM, 75)])
)
def test_a_check_that_is_stopped_keeps_what_it_found(tmp_path, number, code):
    for folder in ("done", "hanging"):
        colour_folder(tmp_path / folder, ["a.png", "b.png"])
        (tmp_path / folder / "blue" / "b.png").write_bytes(b"")
    (tmp_path / "hanging" / "red" / "z.png").write_bytes(b"x")
    (tmp_path / "hanging_source.py").write_text(HANGING)
    (tmp_path / "stopped.py").write_text(EXPERIMENT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t-val.csv").write_text("of an earlier check")
    found = tmp_path / "out" / "broken.tsv"
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(tmp_path), *sys.path])
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STOPPED], **options) as process:
        deadline = time.monotonic() + 120
        while not found.exists() or "hanging" not in found.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        lines = process.communicate(timeout=60)[0]
    assert process.returncode == code
    rows = [line.split("\t")[:3] for line in found.read_text().splitlines()[1:]]
    assert rows == [["t", "train", "done/blue/b.png"], ["t", "val", "hanging/blue/b.png"]]
    assert (tmp_path / "out" / "t-train.csv").read_text().count("\n") == 4
    assert (tmp_path / "out" / "t-val.csv").read_text() == "of an earlier check"
    assert "t val: hanging/blue/b.png: the file is empty" in lines
    if code > 0:
        assert "stopped; so far 2 broken files, listed in out/broken.tsv; manifests" in lines
