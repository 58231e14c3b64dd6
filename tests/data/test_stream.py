import io
import os
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from tiny_runs import change, tile_task, tiny_config

from polyvit_fast.config import Task, Train
from polyvit_fast.data.device import GpuDecoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import DataError, Loader, prefetch, request_batches, request_validation_batches, sample_index

COLOURS = [(230, 20, 20), (20, 230, 20), (20, 20, 230)]


def colour_folders(path, per_class=8):
    """JPEGs whose colour is their class, so that a label of other pixels shows."""
    for label, colour in enumerate(COLOURS):
        folder = path / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            Pillow.new("RGB", (40 + i, 48), colour).save(folder / f"{i}.jpg", quality=95)
    return path


def colour_config(path, **changes) -> Train:
    folder = Folder(path=str(path))
    task = Task(modality=Image(size=32, patch=16), train=folder, val=folder, num_classes=3, steps=10, batch=6)
    return change(Train(tasks={"colours": task}), **({"max_bad_ratio": 0.5} | changes))


def colour_of(grid):
    return grid.float().mean((-4, -3, -2)).argmax(-1)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 99))
def test_every_epoch_holds_every_sample_once(num_samples, epoch, seed):
    positions = range(epoch * num_samples, (epoch + 1) * num_samples)
    assert sorted(sample_index(seed, "t", p, num_samples) for p in positions) == list(range(num_samples))


def test_epochs_tasks_and_seeds_have_orders_of_their_own():
    def order(seed, task, epoch):
        return tuple(sample_index(seed, task, epoch * 20 + i, 20) for i in range(20))

    assert len({order(0, "a", 0), order(0, "a", 1), order(0, "b", 0), order(1, "a", 0)}) == 4


@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 6), st.integers(0, 60), st.sampled_from([1, 2, 4]))
def test_ranks_together_see_the_batch_of_one_process(num_samples, quarter, step, world_size):
    config = tiny_config(tasks={"t": tile_task(batch=quarter * 4)})
    whole = Loader("t", config, train=True).positions(step)
    positions = [Loader("t", config, train=True, rank=rank, world_size=world_size).positions(step) for rank in range(world_size)]
    assert [p for own in positions for p in own] == list(whole)


def test_batch_must_divide_by_the_ranks():
    with pytest.raises(ValueError, match=r"tasks.t.batch = 8 does not divide by the 3 processes"):
        Loader("t", tiny_config(tasks={"t": tile_task()}), train=True, world_size=3)


def test_a_source_that_cannot_be_listed_is_reported_with_its_task(tmp_path):
    config = colour_config(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^task colours: folder .*none: No such file or directory"):
        Loader("colours", config, train=True)


def test_what_is_odd_about_a_source_is_reported_once(tmp_path):
    folder = colour_folders(tmp_path / "train")
    (folder / "class1" / "Thumbs.db").write_bytes(b"no picture")
    val = Folder(path=str(colour_folders(tmp_path / "val")))
    shutil.rmtree(tmp_path / "val" / "class1")
    reports = []
    same = colour_config(folder)
    for config in (same, replace(same, tasks={"colours": replace(same.tasks["colours"], val=val)})):
        for train, rank in ((True, 0), (True, 1), (False, 0), (False, 1)):
            loader = Loader("colours", config, train=train, rank=rank, world_size=2, report=reports.append)
            assert loader.classes == ("class0", "class1", "class2")
    left_out = f"task colours: {folder}: left out, as their names are not those of image files: 1 Thumbs.db"
    assert reports == [left_out, left_out, f"task colours: {val.path} has no folder for 1 of the task's 3 classes: class1"]


def test_a_batch_is_a_pure_function_of_the_step(tmp_path):
    config = colour_config(colour_folders(tmp_path))
    forward, backward = Loader("colours", config, train=True), Loader("colours", change(config, num_threads=1), train=True)
    batches = [forward.load(step) for step in range(5)]
    for step in reversed(range(5)):
        again = backward.load(step)
        assert torch.equal(again.grid, batches[step].grid)
        assert torch.equal(again.labels, batches[step].labels)


def test_labels_are_those_of_the_pixels(tmp_path):
    loader = Loader("colours", colour_config(colour_folders(tmp_path)), train=True)
    for step in range(4):
        batch = loader.load(step)
        assert batch.grid.shape == (6, 1, 32, 32, 3)
        assert torch.equal(colour_of(batch.grid), batch.labels)


BREAK = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "text": lambda path: path.write_text("<html>not found</html>" * 20),
}


@pytest.mark.parametrize("kind", BREAK)
def test_a_broken_file_is_replaced_by_its_own_task_with_its_own_label(tmp_path, kind):
    path = colour_folders(tmp_path)
    clean = Loader("colours", colour_config(path), train=True)
    before = [clean.load(step) for step in range(4)]
    reports: list[str] = []
    loader = Loader("colours", colour_config(path), train=True, report=reports.append)
    again = Loader("colours", colour_config(path), train=True)
    broken = path / "class1" / "3.jpg"
    BREAK[kind](broken)
    after = [loader.load(step) for step in range(4)]
    same = [torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x.grid, y.grid, strict=True)]
    assert same.count(False) == 1  # one epoch is 24 samples = 4 batches: all others are bit-equal
    assert all(torch.equal(colour_of(batch.grid), batch.labels) for batch in after)
    assert [str(broken) in line and line.startswith("task colours: broken file ") for line in reports] == [True]
    for step in (3, 0, 2, 1):
        assert torch.equal(again.load(step).grid, after[step].grid)  # the stand-in does not depend on what was loaded before


def test_a_broken_substitute_is_replaced_too_whenever_it_is_found(tmp_path):
    config = colour_config(colour_folders(tmp_path), max_bad_ratio=0.5)
    forward, backward = Loader("colours", config, train=True), Loader("colours", config, train=True)
    first = 5
    for index in (first, forward._choose_substitute(first, 1)):
        Path(forward.samples[index].media.path).write_bytes(b"broken")
    batches = [forward.load(step) for step in range(4)]
    for step in reversed(range(4)):
        assert torch.equal(backward.load(step).grid, batches[step].grid)
    assert forward.broken.keys() == backward.broken.keys()
    assert len(forward.broken) == 2


def test_a_task_without_a_single_good_file_stops_the_run(tmp_path):
    path = colour_folders(tmp_path)
    loader = Loader("colours", colour_config(path, max_bad_ratio=1.0), train=True)
    for sample in loader.samples:
        Path(sample.media.path).write_bytes(b"broken")
    with pytest.raises(DataError, match="24 of 24 files are broken"):
        [loader.load(step) for step in range(4)]


def test_too_many_broken_files_stop_the_run(tmp_path):
    path = colour_folders(tmp_path)
    for i in range(4):
        (path / "class0" / f"{i}.jpg").write_bytes(b"broken")
    loader = Loader("colours", colour_config(path, max_bad_ratio=0.1), train=True)
    with pytest.raises(DataError, match=r"task colours: 3 of 24 files are broken, more than max_bad_ratio = 0.1.*polyvit-fast check"):
        [loader.load(step) for step in range(4)]


def test_validation_holds_every_sample_once_and_leaves_broken_ones_out(tmp_path):
    path = colour_folders(tmp_path)
    (path / "class2" / "0.jpg").write_bytes(b"broken")
    config = colour_config(path)
    loader = Loader("colours", config, train=False)
    batches = [batch for _, batch in prefetch(request_validation_batches(loader), depth=2, timeout_seconds=60)]
    labels = torch.cat([batch.labels for batch in batches])
    assert Counter(labels.tolist()) == {0: 8, 1: 8, 2: 7}
    assert torch.equal(torch.cat([colour_of(batch.grid[:, 0]) for batch in batches]), labels)
    assert list(loader.broken) == [16]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 30])
def test_ranks_together_validate_every_sample_once_in_equally_many_batches(world_size):
    config = tiny_config(tasks={"t": tile_task(batch=4, val=Synthetic(num_samples=30))})
    loader = Loader("t", config, train=False, rank=1, world_size=world_size)
    dealt = [[request.run() for request in request_validation_batches(loader, rank, world_size)] for rank in range(world_size)]
    assert {len(batches) for batches in dealt} == {-(-8 // world_size)}
    in_order = [batch for batches in zip(*dealt, strict=True) for batch in batches]
    assert torch.cat([batch.labels for batch in in_order]).tolist() == [sample.labels[0] for sample in loader.samples]
    assert all(batch.grid.shape == (len(batch.labels), 1, 1, 16, 16, 3) for batch in in_order)
    alone = [request.run() for request in request_validation_batches(loader)]
    assert all(torch.equal(ours.grid, theirs.grid) for ours, theirs in zip(in_order, alone, strict=False))


@pytest.mark.parametrize(("batch", "world_size", "size"), [(6, 2, 3), (12, 4, 3), (2, 2, 1)])
def test_mixup_needs_whole_pairs_in_every_process(batch, world_size, size):
    with pytest.raises(
        ValueError, match=rf"tasks.t: mixup pairs neighbours, but each of the {world_size} processes gets {size} examples .*; choose"
    ):
        Loader("t", tiny_config(tasks={"t": tile_task(mixup=0.2, batch=batch)}), train=True, world_size=world_size)
    with pytest.raises(ValueError, match=r"tasks\.t: CutMix pairs neighbours"):
        Loader("t", tiny_config(tasks={"t": tile_task(cutmix=1.0, batch=batch)}), train=True, world_size=world_size)
    for changes in ({}, {"mixup": 0.2, "mixup_pairs": "reversed"}):  # without mixup anything goes, and any number can be reversed
        Loader("t", tiny_config(tasks={"t": tile_task(batch=batch, **changes)}), train=True, world_size=world_size)


@pytest.mark.parametrize(("batch", "micro_batches", "world_size"), [(7, 1, 1), (6, 2, 1), (8, 2, 2), (8, 4, 2), (8, 1, 4), (4, 1, 2)])
def test_mixup_of_a_whole_batch_or_of_whole_pairs(batch, micro_batches, world_size):
    task = tile_task(mixup=0.2, batch=batch, micro_batches=micro_batches)
    assert Loader("t", tiny_config(tasks={"t": task}), train=True, world_size=world_size).size == batch // world_size


def test_a_processs_examples_must_divide_into_micro_batches():
    with pytest.raises(ValueError, match=r"each of the 4 processes gets 2 examples of a batch, which do not divide into micro_batches = 4"):
        Loader("t", tiny_config(tasks={"t": tile_task(batch=8, micro_batches=4)}), train=True, world_size=4)


@dataclass(frozen=True, kw_only=True)
class Noting(Synthetic):
    """Notes the device that its decoder is asked for, in the decoder's note."""

    def decoder(self, task, *, device, **options):
        decode = super().decoder(task, device=device, **options)

        def noted(media, rngs):
            return decode(media, rngs)

        noted.note = f"decoded on {device}"
        return noted


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, "cpu"),
        ({"device": "cuda"}, "cuda"),
        ({"device": "cuda", "decoding": "gpu"}, "cuda"),
        ({"device": "cuda", "decoding": "cpu"}, "cpu"),
    ],
    ids=str,
)
def test_decoders_get_the_device_and_their_note_is_reported(changes, device):
    reports: list[str] = []
    Loader("t", tiny_config(tasks={"t": tile_task(train=Noting())}, **changes), train=True, report=reports.append)
    assert reports == [f"task t: decoded on {device}"]


def test_the_grids_dtype_is_known_before_the_first_batch(tmp_path):
    path = colour_folders(tmp_path)
    loader = Loader("colours", colour_config(path), train=True)
    Path(loader.step_samples(0)[0].media.path).write_bytes(b"broken")  # the one that is tried first
    assert loader.grid_dtype() == torch.uint8
    assert Loader("a", tiny_config(), train=True).grid_dtype() == torch.float32


def test_mixup_ratio_is_drawn_by_the_step():
    loader = Loader("t", tiny_config(tasks={"t": tile_task(mixup=0.3)}), train=True)
    ratios = [loader.load(step).mixup_ratio for step in range(100)]
    assert ratios == [loader.load(step).mixup_ratio for step in range(100)]
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.15)
    assert Loader("t", tiny_config(tasks={"t": tile_task()}), train=True).load(0).mixup_ratio == 1.0


def test_prefetch_follows_the_plan_from_any_step(config):
    plan = [("a",), ("b",), ("a",), ("b", "a"), ("a",)]
    loaders = {name: Loader(name, config, train=True) for name in config.tasks}
    batches = list(prefetch(request_batches(loaders, plan, 2), depth=2, timeout_seconds=60))
    assert [name for name, _ in batches] == ["a", "b", "a", "a"]
    for (name, batch), local in zip(batches, (1, 1, 2, 3), strict=True):
        assert torch.equal(batch.grid, loaders[name].load(local).grid)


def test_prefetch_works_ahead_and_ends_with_its_reader(config):
    loader = Loader("a", config, train=True)
    batches = prefetch(request_batches({"a": loader}, [("a",)] * 1000, 0), depth=3, timeout_seconds=60)
    next(batches)
    thread = next(t for t in threading.enumerate() if t.name == "prefetch")
    batches.close()
    thread.join(5)
    assert not thread.is_alive()


def test_batches_are_made_on_the_gpu_of_their_process(config, monkeypatch):
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device)))
    list(prefetch(request_batches({"a": Loader("a", config, train=True)}, [("a",)], 0), depth=1, timeout_seconds=60))
    assert chosen == [("prefetch", 3)]


def test_prefetch_raises_when_its_turn_comes(tmp_path):
    path = colour_folders(tmp_path)
    config = colour_config(path, max_bad_ratio=0.0)
    loader = Loader("colours", config, train=True)
    bad_step = next(step for step in range(4) if any("class1/3" in s.media.name for s in loader.step_samples(step)))
    (path / "class1" / "3.jpg").unlink()
    batches = prefetch(request_batches({"colours": loader}, [("colours",)] * 4, 0), depth=4, timeout_seconds=60)
    for _ in range(bad_step):
        next(batches)
    with pytest.raises(DataError, match=r"class1/3.jpg \(the file is missing\)"):
        next(batches)


def test_a_decoder_that_takes_too_long_is_ended_with_the_files_name(tmp_path):
    path = colour_folders(tmp_path, per_class=2)
    Pillow.new("L", (9400, 9400)).save(path / "class0" / "slow.png", compress_level=1)
    config = colour_config(path, decode_timeout_seconds=0.3)
    loader = Loader("colours", config, train=True)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"not decoded within decode_timeout_seconds = 0.3 .*slow.png"):
        list(prefetch(request_batches({"colours": loader}, [("colours",)] * 3, 0), depth=1, timeout_seconds=0.3))
    assert time.monotonic() - started < 60


def test_an_empty_source_is_reported(tmp_path):
    (tmp_path / "class0").mkdir()
    with pytest.raises(ValueError, match="class0"):
        Loader("colours", colour_config(tmp_path), train=True)


def test_gif_and_jpeg_stand_side_by_side(tmp_path):
    path = colour_folders(tmp_path, per_class=4)
    content = io.BytesIO()
    Pillow.new("RGB", (44, 48), COLOURS[2]).save(content, "GIF")
    (path / "class2" / "0.jpg").write_bytes(content.getvalue())
    loader = Loader("colours", colour_config(path), train=True)
    for step in range(2):
        batch = loader.load(step)
        assert torch.equal(colour_of(batch.grid), batch.labels)


@dataclass(frozen=True, kw_only=True)
class Partly(Synthetic):
    """Grids that hold their sample's number; one file in three is broken for half of the random draws."""

    def decoder(self, task, **options):
        def decode(media, rngs):
            numbers = [int(one.path.partition(":")[2]) for one in media]
            if any(number % 3 == 0 and rng.random() < 0.5 for number, rng in zip(numbers, rngs, strict=True)):
                raise ValueError("damaged there")
            return torch.tensor(numbers).float().view(-1, 1, 1, 1, 1, 1).expand(-1, 1, *task.modality.grid)

        return decode


def test_a_partly_broken_file_is_judged_where_it_is_used():
    task = tile_task(train=Partly(num_samples=12), batch=8)  # so that a batch may hold a sample twice
    config = tiny_config(tasks={"a": task}, max_bad_ratio=0.9)
    forward, backward = Loader("a", config, train=True), Loader("a", config, train=True)
    batches = [forward.load(step) for step in range(20)]
    for step in reversed(range(20)):
        again = backward.load(step)
        assert torch.equal(again.grid, batches[step].grid)
        assert torch.equal(again.labels, batches[step].labels)
    for batch in batches:
        assert torch.equal(batch.grid[:, 0, 0, 0, 0].long() % 3, batch.labels)
    kept = sum((batch.grid[:, 0, 0, 0, 0] % 3 == 0).sum() for batch in batches)
    assert 15 < kept < 60  # of 53: some were used at positions where they are good


@dataclass(frozen=True, kw_only=True)
class NeverDecoding(Synthetic):
    """The device fails for batches (with `batches`), or for single files of batches that hold a broken one."""

    error: Exception
    batches: bool

    def decoder(self, task, **options):
        def decode(media, rngs):
            decode.sizes.append(len(media))
            raise self.error if self.batches or len(media) == 1 else ValueError("damaged there")

        decode.sizes = []
        return decode


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error")], ids=repr)
def test_the_devices_own_errors_pass_and_no_file_is_called_broken(error, batches):
    source = NeverDecoding(num_samples=12, error=error, batches=batches)
    reports: list[str] = []
    for train in (True, False):
        loader = Loader("a", tiny_config(tasks={"a": tile_task(train=source, val=source)}), train=train, report=reports.append)
        with pytest.raises(type(error)) as raised:
            loader.load(0) if train else loader.load_validation(0)
        assert raised.value is error
        assert (loader.broken, reports) == ({}, [])
        assert loader.decoder.sizes == [loader.size, 1][: 1 if batches else 2]


class Kept(GpuDecoder):
    """A decoder that says when it gives its memory back."""

    def __init__(self, name: str, said: list[str]) -> None:
        super().__init__(None, torch.device("cpu"))
        self.name, self.said = name, said

    def decode(self, media, rngs):
        return torch.zeros(len(media), 1, 1, 16, 16, 3)

    def release(self) -> None:
        super().release()
        self.said.append(self.name)


def test_a_task_whose_batches_are_all_made_gives_its_memory_back():
    config, said = tiny_config(), []
    loaders = {name: Loader(name, config, train=True) for name in config.tasks}
    for name, loader in loaders.items():
        loader.decoder = Kept(name, said)
    for request in request_batches(loaders, [("a",), ("b", "a"), ("b",), ("b",)], 0):
        request.run()
        said.append(request.task.upper())
    assert said == ["A", "B", "A", "a", "B", "B", "b"]


DEFECTS = [
    AttributeError("nonzero"),
    NameError("x"),
    TypeError("no"),
    ImportError("av"),
    AssertionError("a"),
    KeyError("k"),
    IndexError("i"),
]


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("error", [*DEFECTS, UnboundLocalError("x"), ModuleNotFoundError("av"), NotImplementedError("later")], ids=repr)
def test_a_defect_of_the_decoder_passes_with_the_names_of_its_files(error, batches):
    source = NeverDecoding(num_samples=12, error=error, batches=batches)
    reports: list[str] = []
    for train in (True, False):
        loader = Loader("a", tiny_config(tasks={"a": tile_task(train=source, val=source)}), train=train, report=reports.append)
        with pytest.raises(type(error), match=re.escape(str(error))) as raised:
            loader.load(0) if train else loader.load_validation(0)
        notes = "".join(raised.value.__notes__)
        assert "task a: while decoding synthetic:" in notes
        assert "It is a bug in the decoder, not a broken file: please report it" in notes
        assert (loader.broken, reports) == ({}, [])


@dataclass(frozen=True, kw_only=True)
class OneSided(Synthetic):
    """A decoder with a defect that one file brings out, or only several of them together."""

    fault: str

    def decoder(self, task, **options):
        inner = super().decoder(task, **options)

        def decode(media, rngs):
            if (self.fault == "together" and len(media) > 1) or self.fault in [one.path for one in media]:
                media.nonsense  # noqa: B018
            return inner(media, rngs)

        return decode


def test_the_file_that_brings_a_defect_out_is_found_in_its_batch():
    def message(fault):
        task = tile_task(train=OneSided(num_samples=8, fault=fault))
        with pytest.raises(AttributeError) as raised:
            Loader("a", tiny_config(tasks={"a": task}), train=True).load(0)
        return raised.value.__notes__[0]

    assert "while decoding synthetic:5. It is" in message("synthetic:5")
    assert message("together").count("synthetic:") == 8


USERS_FAULTS = [ValueError("bad"), RuntimeError("bad"), OSError(5, "bad"), EOFError("bad"), ZeroDivisionError("bad"), UnicodeError("bad")]


@pytest.mark.parametrize("error", USERS_FAULTS, ids=repr)
def test_what_ones_own_decoder_raises_for_a_file_is_the_files_fault(error):
    source = NeverDecoding(num_samples=12, error=error, batches=False)
    reports: list[str] = []
    loader = Loader("a", tiny_config(tasks={"a": tile_task(train=source)}, max_bad_ratio=0.3), train=True, report=reports.append)
    with pytest.raises(DataError, match=r"4 of 12 files are broken"):
        loader.load(0)
    assert len(reports) == 4
    assert all("bad" in line for line in reports)


def test_names_that_no_log_can_hold_are_reported_in_escapes(tmp_path):
    path = colour_folders(tmp_path)
    name = os.fsdecode(b"caf\xe9\n\x1b[31m.jpg")
    (path / "class1" / "3.jpg").rename(path / "class1" / name)
    reports: list[str] = []
    config = colour_config(path)
    loader = Loader("colours", config, train=True, report=reports.append)
    before = [loader.load(step) for step in range(4)]
    assert (reports, loader.broken) == ([], {})
    assert [Loader("colours", config, train=True).load(step).labels.tolist() for step in range(4)] == [b.labels.tolist() for b in before]
    (path / "class1" / name).write_bytes(b"broken")
    [loader.load(step) for step in range(4)]
    assert len(reports) == 1
    assert reports[0].isprintable()
    assert "class1/caf\\xe9\\n\\x1b[31m.jpg: " in reports[0]
    os.remove(path / "class1" / name)
    strict = Loader("colours", colour_config(path, max_bad_ratio=0.0), train=True)
    strict.samples = loader.samples
    with pytest.raises(DataError, match=r"the last one is .*caf\\xe9\\n.* \(the file is missing\)"):
        [strict.load(step) for step in range(4)]


def test_the_fingerprint_is_of_the_files_as_they_are_now(tmp_path):
    path = colour_folders(tmp_path)
    loader = Loader("colours", colour_config(path), train=True)
    before = loader.fingerprint()
    assert loader.fingerprint() == before
    (path / "class0" / "1.jpg").write_bytes((path / "class2" / "1.jpg").read_bytes())
    assert loader.fingerprint() != before


def test_all_processes_cut_the_same_box():
    config = tiny_config(tasks={"t": tile_task(cutmix=1.0)})
    parts = [[Loader("t", config, train=True, rank=rank, world_size=2).load(step) for step in range(20)] for rank in range(2)]
    mixes = [[(batch.mixup_ratio, batch.cutmix_box) for batch in batches] for batches in parts]
    assert mixes[0] == mixes[1]
    assert len(set(mixes[0])) > 15
    assert Loader("t", tiny_config(tasks={"t": tile_task(mixup=0.3)}), train=True).load(0).cutmix_box is None
