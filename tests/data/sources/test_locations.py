import pytest
from tiny_runs import tile_task

from polyvit_fast.data.sources.demo_files import DemoFiles
from polyvit_fast.data.sources.locations import advise_location, find_locations, name_location
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.train.run_folder.config_json import to_json


def move_back(name: str, before, now) -> set[str]:
    """What a path of now may have been called, by all guesses."""
    guesses = find_locations(to_json(before), to_json(now))
    return {next((a + name[len(b) :] for a, b in guess if name.startswith(b)), name) for guess in guesses}


@pytest.mark.parametrize(
    ("before", "now", "name", "was"),
    [
        (Folder(path="old/train"), Folder(path="/new/disk/train"), "/new/disk/train/a/1.jpg", "old/train/a/1.jpg"),
        (Folder(path="old/train/"), Folder(path="other"), "other/a/1.jpg", "old/train/a/1.jpg"),
        (Folder(path="photos"), Folder(path="/mnt/photos"), "/mnt/photos/a/1.jpg", "photos/a/1.jpg"),
        (Folder(path="/mnt/photos"), Folder(path="photos"), "photos/a/1.jpg", "/mnt/photos/a/1.jpg"),
        (Folder(path="."), Folder(path="/mnt"), "/mnt/a/1.jpg", "./a/1.jpg"),
        (Manifest(path="old/train.csv"), Manifest(path="new/all.csv"), "new/a/1.jpg", "old/a/1.jpg"),
        (Manifest(path="train.csv"), Manifest(path="new/train.csv"), "new/a/1.jpg", "a/1.jpg"),
        (Manifest(path="t.csv", root="old"), Manifest(path="t.csv", root="new/er"), "new/er/a/1.jpg", "old/a/1.jpg"),
        (Manifest(path="old/t.csv"), Manifest(path="old/t.csv", root="new"), "new/a/1.jpg", "old/a/1.jpg"),
        (Shards(paths=("old/a-{0..9}.tar", "old/b.tar")), Shards(paths=("new/a-{0..9}.tar", "new/b.tar")), "new/b.tar:1", "old/b.tar:1"),
        (Folder(path="same"), Folder(path="same"), "same/a/1.jpg", "same/a/1.jpg"),
    ],
)
def test_a_path_is_found_where_it_was(before, now, name, was):
    assert was in move_back(name, before, now)


def test_many_shards_in_one_folder_are_one_guess():
    before, now = (Shards(paths=tuple(f"{folder}/{n}.tar" for n in range(500))) for folder in ("old", "new"))
    assert [len(guess) for guess in find_locations(to_json(before), to_json(now))] == [0, 1, 1]


def test_a_source_of_another_kind_or_without_files_has_no_location():
    assert name_location("a", "train", Synthetic()) == ""
    assert find_locations(to_json(Synthetic(seed=1)), to_json(Synthetic(seed=2))) == [(), (), ()]
    assert name_location("a", "val", DemoFiles(kind="tones")) == "--tasks.a.val.root"
    assert name_location("a", "test", Folder(path="x")) == "--tasks.a.test.path"
    assert name_location("a", "test", Shards(paths=("x.tar",))) == "--tasks.a.test.paths"


def test_advice_names_the_first_location_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    task = tile_task(train=Folder(path="here"), val=Folder(path="gone/val"))
    expected = ". If the files have moved, say where they are with --tasks.a.val.path"
    assert advise_location("a", {"train": task.train, "val": task.val}) == expected
    assert advise_location("a", {"train": task.train, "test": task.val}).endswith("--tasks.a.test.path")
    assert advise_location("a", {"train": task.train, "val": Synthetic()}) == ""
    assert "--tasks.a.val.paths" in advise_location("a", {"val": Shards(paths=("here/x.tar", "gone/x-*.tar"))})
    assert advise_location("a", {"val": Shards(paths=("here/x-*.tar",))}) == ""
    (tmp_path / "t.csv").touch()
    assert "--tasks.a.val.classes" in advise_location("a", {"val": Manifest(path="t.csv", classes="gone.txt")})
