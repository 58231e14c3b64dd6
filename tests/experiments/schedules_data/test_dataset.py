import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import tile_task

from polyvit_fast.data.sources.manifest import Manifest
from polyvit_fast.experiments.schedules_data import dataset as module
from polyvit_fast.experiments.schedules_data.dataset import (
    BrokenMediaError,
    Dataset,
    Example,
    choose,
    list_files,
    read_record,
    split_groups,
    write,
)
from polyvit_fast.experiments.schedules_data.packages import PackageError

SPLITS = ("train", "val", "test")


def example(split, number, label, content=None):
    return Example(split, f"{number}.bin", (label,), content or (lambda: f"{split} {number}".encode()))


def fail(error):
    def content():
        raise error

    return content


def dataset(*more, version=1, classes=("cat", "dog")):
    def list_examples(packages):
        for split in SPLITS:
            for number in range(4):
                yield example(split, number, ("cat", "dog")[number % 2])
        yield from more

    return Dataset(name="pets", question="?", classes=classes, packages=("media",), list_examples=list_examples, version=version)


def write_into(out, recipe):
    out.mkdir(exist_ok=True)
    return write(recipe, {"media": out}, out, lambda count: None)


def test_a_dataset_is_what_a_run_reads(tmp_path):
    written = write_into(tmp_path, dataset())
    assert written.counts == dict.fromkeys(SPLITS, 4)
    for split in SPLITS:
        folder = tmp_path / "pets"
        task = tile_task(num_classes=2)
        samples = Manifest(path=str(folder / f"{split}.csv"), classes=str(folder / "classes.txt")).samples(task)
        assert [sample.labels for sample in samples] == [(0,), (1,), (0,), (1,)]
        assert [Path(sample.media.path).read_text() for sample in samples] == [f"{split} {number}" for number in range(4)]
    assert read_record(tmp_path / "pets") == written
    assert os.listdir(tmp_path) == ["pets"]


def test_all_packages_of_a_dataset_and_no_others_are_handed_on(tmp_path):
    handed = []
    recipe = replace(
        dataset(), list_examples=lambda packages: handed.append(packages) or [example("train", 1, "cat"), example("val", 1, "dog")]
    )
    write(recipe, {"media": tmp_path, "other": tmp_path}, tmp_path, lambda count: None)
    assert handed == [{"media": tmp_path}]


def test_progress_counts_files(tmp_path):
    counts = []
    write(dataset(), {"media": tmp_path}, tmp_path, counts.append)
    assert counts == list(range(12))


def test_the_digest_is_that_of_names_labels_and_contents(tmp_path):
    digests = [
        write_into(tmp_path / str(index), dataset(example("test", 9, label, content))).digest
        for index, (label, content) in enumerate(
            [("cat", lambda: b"a"), ("cat", lambda: b"a"), ("dog", lambda: b"a"), ("cat", lambda: b"b")],
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_broken_media_are_left_out_and_counted(tmp_path):
    broken = [example("train", number, "dog", fail(BrokenMediaError("silent"))) for number in (7, 8)]
    written = write_into(tmp_path, dataset(*broken, example("train", 9, "cat", fail(BrokenMediaError("huge")))))
    assert written.left_out == {"silent": 2, "huge": 1}
    assert written.counts["train"] == 4
    assert (tmp_path / "pets" / "train.csv").read_text().splitlines() == [
        "path,labels",
        *(f"train/{number}.bin,{('cat', 'dog')[number % 2]}" for number in range(4)),
    ]
    assert sorted(os.listdir(tmp_path / "pets" / "train")) == [f"{number}.bin" for number in range(4)]
    assert written.digest == write_into(tmp_path / "without", dataset()).digest


def test_what_is_there_twice_is_in_one_split_alone(tmp_path):
    again = [example(split, 9, label, lambda: b"val 1") for split, label in (("train", "dog"), ("test", "cat"))]
    written = write_into(tmp_path, dataset(*again))
    assert written.left_out == {"equal to another file": 2}
    assert written.counts == dict.fromkeys(SPLITS, 4)
    contents = [path.read_bytes() for path in (tmp_path / "pets").rglob("*.bin")]
    assert len(set(contents)) == len(contents) == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), PackageError("not there")], ids=repr)
def test_a_stopped_call_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)):
        write_into(tmp_path, dataset(example("val", 9, "cat", fail(error))))
    assert os.listdir(tmp_path) == []


def test_the_files_of_an_earlier_version_stay_until_the_new_ones_are_complete(tmp_path):
    old = write_into(tmp_path, dataset())
    with pytest.raises(KeyboardInterrupt):
        write_into(tmp_path, dataset(example("val", 9, "cat", fail(KeyboardInterrupt())), version=2))
    assert read_record(tmp_path / "pets") == old
    new = write_into(tmp_path, dataset(example("val", 9, "cat"), version=2))
    assert read_record(tmp_path / "pets") == new
    assert (new.version, new.counts["val"]) == (2, 5)
    assert os.listdir(tmp_path) == ["pets"]


def test_what_a_killed_call_left_is_no_dataset_and_is_cleared_away(tmp_path):
    killed = tmp_path / ".pets.making" / "train"
    killed.mkdir(parents=True)
    (killed / "99.bin").touch()
    assert read_record(tmp_path / "pets") is None
    assert write_into(tmp_path, dataset()).counts["train"] == 4
    assert sorted(os.listdir(tmp_path / "pets" / "train")) == [f"{number}.bin" for number in range(4)]
    assert os.listdir(tmp_path) == ["pets"]


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "mine.txt").write_text("dear to me")
    with pytest.raises(OSError, match=r"it holds other files than those of this command.*pets"):
        write_into(tmp_path, dataset())
    assert (tmp_path / "pets" / "mine.txt").read_text() == "dear to me"


def test_a_class_without_a_file_is_named(tmp_path):
    with pytest.raises(PackageError, match=r"^media: no file of bird, fish in it; another version may have them$"):
        write_into(tmp_path, dataset(classes=("bird", "cat", "dog", "fish")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "counts": {}, "digest": "", "else": 0}'])
def test_a_record_that_is_none_is_no_dataset(tmp_path, text):
    (tmp_path / module.RECORD).write_text(text)
    assert read_record(tmp_path) is None


def test_a_record_is_json(tmp_path):
    written = write_into(tmp_path, dataset())
    stored = json.loads((tmp_path / "pets" / "dataset.json").read_text())
    assert stored == {"version": 1, "counts": dict.fromkeys(SPLITS, 4), "digest": written.digest, "left_out": {}}


def test_groups_are_split_alike_everywhere_and_by_the_ratios():
    groups = [f"speaker {number}" for number in range(40)]
    splits = split_groups(groups, "one")
    assert splits == split_groups(reversed(groups * 2), "one")
    assert set(splits) == set(groups)
    assert [list(splits.values()).count(split) for split in SPLITS] == [24, 6, 10]
    assert splits != split_groups(groups, "two")
    assert [list(split_groups(groups, val=0.1, test=0.5).values()).count(split) for split in SPLITS] == [16, 4, 20]


def test_the_split_of_known_groups_stays_as_it_is():
    known = {"c": "test", "d": "val", "g": "test"}  # published results are of such splits
    assert split_groups("abcdefgh", "one") == dict.fromkeys("abcdefgh", "train") | known


def test_some_items_are_drawn_in_any_order_alike():
    items = [f"{number:02d}" for number in range(50)]
    drawn = choose(items, 10, "one")
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn) == choose(items[::-1], 10, "one")
    assert drawn != choose(items, 10, "two")
    assert choose(items, 60, "one") == items


def test_files_are_listed_in_one_order(tmp_path):
    for name in ("b/one.PNG", "a/two.png", "a/b.png", "a.png", "c.txt", "folder.png/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, ".png")] == [
        "a.png",
        "a/b.png",
        "a/two.png",
        "b/one.PNG",
    ]
    assert list(list_files(tmp_path / "missing", ".png")) == []
