from dataclasses import replace

import pytest

from polyvit_fast import experiments
from polyvit_fast.inference.files import find_files

SMOKE = experiments.load("smoke")
NAMES = ("a.jpg", "b.mp4", "c.wav", "deep/er/d.PNG", "deep/e.gif", "f", "notes.txt", ".hidden.jpg", "deep/__MACOSX/g.jpg")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(paths, *tasks):
    return find_files([str(path) for path in paths], SMOKE, tasks)


def test_a_folder_has_the_files_of_each_modality(folder):
    files = {task: [path.removeprefix(f"{folder}/") for path in paths] for task, paths in found([folder]).of_task.items()}
    assert files == {
        "pictures": ["a.jpg", "f", "deep/e.gif", "deep/er/d.PNG"],
        "clips": ["b.mp4", "f", "deep/e.gif"],
        "sounds": ["b.mp4", "c.wav", "f"],
    }


def test_files_that_are_named_go_to_the_tasks_that_their_names_fit(folder):
    found_files = found([folder / "a.jpg", folder / "c.wav", folder / "notes.txt", "gone.mp4"])
    assert found_files.of_task == {
        "pictures": [str(folder / "a.jpg")],
        "clips": ["gone.mp4"],
        "sounds": [str(folder / "c.wav"), "gone.mp4"],
    }
    assert found_files.unfit == [str(folder / "notes.txt")]
    named = found([folder / "a.jpg", folder / "notes.txt"], "pictures")
    assert named.of_task == {"pictures": [str(folder / "a.jpg"), str(folder / "notes.txt")]}
    assert named.unfit == []


def test_a_file_counts_once(folder):
    assert len(found([folder, folder / "a.jpg", folder]).of_task["pictures"]) == 4


def test_no_file_at_all_is_an_error(folder):
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match=r"there is no file of image, video, audio in .*void$"):
        found([folder / "void"])
    (folder / "void" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"there is no file of image in .*void; left out because of their names: 1 \.txt"):
        found([folder / "void"], "pictures")


def test_tasks_of_one_modality_have_the_same_files(folder):
    config = replace(SMOKE, tasks={"one": SMOKE.tasks["pictures"], "two": SMOKE.tasks["pictures"]})
    of_task = find_files([str(folder)], config).of_task
    assert of_task["one"] == of_task["two"]
