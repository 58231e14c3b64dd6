import os
import signal
import time
from dataclasses import dataclass
from multiprocessing import active_children

import av
import numpy as np
import pytest
from PIL import Image as Pillow
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.config import Decoder, Task
from polyvit_fast.data.check import Verdict, check_files, find_broken, scan, write_clean_manifest
from polyvit_fast.data.image import Image
from polyvit_fast.data.manifest import Folder, Manifest
from polyvit_fast.data.shards import Shards
from polyvit_fast.data.synthetic import Synthetic
from polyvit_fast.data.video import Video
from polyvit_fast.media import Media, MediaError, Sample
from polyvit_fast.randomness import generator


def scan_train(task: Task, num_workers: int, deadline_seconds: float):
    return scan("tiles", task, "train", task.train.samples(task), num_workers, deadline_seconds)


@dataclass(frozen=True, kw_only=True)
class Treacherous(Synthetic):
    """Samples whose decoding does what no decoder should; with `build`, already the building of the decoder."""

    build: str = ""

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int) -> Decoder:
        inner = super().decoder(task, batch=batch, train=train, num_threads=num_threads)
        if self.build:
            FAULTS[self.build](None)

        def decode(media, rngs):
            grid = inner(media, rngs)
            FAULTS.get(PLANTED.get(media[0].name, ""), lambda grid: None)(grid)
            return grid

        return decode


def broken(grid):
    raise MediaError("it is broken")


def defective(grid):
    raise ZeroDivisionError("a defect\n\n  of two lines")


FAULTS = {
    "crash": lambda grid: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda grid: os._exit(3),
    "hang": lambda grid: time.sleep(1000),
    "broken": broken,
    "defective": defective,
    "not finite": lambda grid: grid.view(-1)[5:6].fill_(float("nan")),
}
PLANTED = {f"synthetic:{2 * i}": fault for i, fault in enumerate(("broken", "crash", "defective", "exit", "hang", "not finite"))}
REASONS = {
    0: "it is broken",
    2: "the decoder crashed on it (SIGSEGV)",
    4: "ZeroDivisionError: a defect of two lines",
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


@pytest.mark.parametrize(("fault", "message"), [("defective", "ZeroDivisionError: a defect"), ("crash", "SIGSEGV")])
def test_a_decoder_that_cannot_be_built_is_told(fault, message):
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
    assert "not an image that can be decoded" in reasons["blue/2.png"]
    assert len(reasons) == 3


def test_clean_manifests_hold_the_good_files(pictures, tmp_path, capsys):
    folder = Folder(path=str(pictures))
    config = tiny_config(tasks={"pictures": picture_task(folder), "tiles": tile_task()})
    assert check_files(config, tmp_path / "out", 1, 60.0) == 4
    told = capsys.readouterr().out
    assert "pictures train: 4 of 6 files are good" in told
    assert f"{pictures}/red/1.png: the file is empty" in told
    assert sorted(os.listdir(tmp_path / "out")) == ["broken.tsv", "pictures-train.csv", "pictures-val.csv"]
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
    assert os.listdir(tmp_path / "out") == ["p-train.csv"]


def test_members_of_shards_and_odd_names_come_back(tmp_path):
    from test_shards import write_shard

    shard = write_shard(tmp_path / "s.tar", [("a, b.jpg", b"x"), ("a, b.json", b"[2, 0]"), ("1.jpg", b"xy"), ("1.json", b"[]")])
    task = tile_task(loss="sigmoid", multi_label=True)
    samples = Shards(paths=(shard,)).samples(task)
    name = os.fsdecode(b'quote" \xe9\n.jpg')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_bytes(b"x")
    samples = [*samples, *Folder(path=str(tmp_path)).samples(tile_task(num_classes=1))]
    write_clean_manifest(tmp_path / "out" / "list.csv", task, samples, [Verdict(0, "", ""), Verdict(1, "", "")])
    assert Manifest(path=str(tmp_path / "out" / "list.csv")).samples(task) == samples
    write_clean_manifest(tmp_path / "out" / "list.csv", task, samples, [Verdict(0, "", "broken"), Verdict(1, "", "")])
    assert Manifest(path=str(tmp_path / "out" / "list.csv")).samples(task) == samples[1:]


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
    assert video.decoder(batch=1, train=False, num_threads=1)([Media(str(damaged))], [generator(0)]).shape[0] == 1
    samples = [Sample(Media(str(good)), (0,)), Sample(Media(str(damaged)), (1,))]
    verdicts = find_broken("clips", tile_task(modality=video, train=Folder(path="unread")), samples, deadline_seconds=60.0, num_workers=1)
    assert [(verdict.index, verdict.reason[:8]) for verdict in verdicts] == [(1, "damaged:")]
