import os
import shutil
import unicodedata

import pytest
from tiny_runs import tile_task

from polyvit_fast.data.sources.classes import check_labels, class_list, first_difference, recall_classes
from polyvit_fast.data.sources.manifest import Folder, Manifest

NFD = unicodedata.normalize("NFD", "café")


def folders(path, *names):
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "1.jpg").write_bytes(b"content")
    return Folder(path=str(path))


def table(path, text, names=None):
    path.write_text(text)
    if names is None:
        return Manifest(path=str(path))
    path.with_suffix(".txt").write_text("".join(f"{name}\n" for name in names))
    return Manifest(path=str(path), classes=str(path.with_suffix(".txt")))


def labels(source, task):
    return [(os.path.relpath(sample.media.path, os.path.dirname(source.path)), sample.labels) for sample in source.samples(task)]


def test_another_name_in_validation_is_refused_with_both_folders(tmp_path):
    train, val = folders(tmp_path / "train", "a", "b", "c"), folders(tmp_path / "val", "b", "c", "d")
    task = tile_task(train=train, val=val)
    message = (
        rf"{tmp_path}/val: 3 class folders \(b, c, d\), but 'd' is not in the task's list: {tmp_path}/train: 3 class folders \(a, b, c\). "
        "Classes are identified by their names"
    )
    for source in (train, val):
        with pytest.raises(ValueError, match=message):
            source.samples(task)


def test_names_that_differ_in_case_are_two(tmp_path):
    task = tile_task(train=folders(tmp_path / "train", "Dog", "cat"), val=folders(tmp_path / "val", "dog", "cat"), num_classes=2)
    with pytest.raises(ValueError, match=r"'dog' is not in the task's list, which has 'Dog': .*train: 2 class folders \(Dog, cat\)"):
        class_list(task)


def test_unicode_forms_are_one_name_in_one_order(tmp_path):
    # In their order on disk, NFD's "cafe…" stands before "cafz" and NFC's "café" behind it.
    for train, val in (("café", NFD), (NFD, "café")):
        task = tile_task(train=folders(tmp_path / "train", train, "cafz"), val=folders(tmp_path / "val", val, "cafz"), num_classes=2)
        assert class_list(task) == ("cafz", "café")
        assert labels(task.train, task) == [("train/cafz/1.jpg", (0,)), (f"train/{train}/1.jpg", (1,))]
        assert labels(task.val, task) == [("val/cafz/1.jpg", (0,)), (f"val/{val}/1.jpg", (1,))]
        shutil.rmtree(tmp_path / "train")
        shutil.rmtree(tmp_path / "val")


def test_two_forms_of_a_name_in_one_split_are_refused(tmp_path):
    task = tile_task(train=folders(tmp_path, "café", NFD, "x"))
    with pytest.raises(ValueError, match=r"3 class folders .*, but 'cafe\\u0301' and 'caf\\xe9' are one name to Unicode \(NFC\)"):
        task.train.samples(task)


def test_a_class_that_validation_lacks_keeps_its_number_and_is_remarked(tmp_path):
    task = tile_task(train=folders(tmp_path / "train", "a", "b", "c"), val=folders(tmp_path / "val", "a", "c"))
    assert labels(task.val, task) == [("val/a/1.jpg", (0,)), ("val/c/1.jpg", (2,))]
    assert task.val.remarks(task) == [f"{tmp_path}/val has no folder for 1 of the task's 3 classes: b"]
    assert task.train.remarks(task) == []


def test_the_ruling_list_has_as_many_names_as_the_task_classes(tmp_path):
    train, val = folders(tmp_path / "train", "a", "b"), folders(tmp_path / "val", "a", "b", "c")
    with pytest.raises(ValueError, match=r"train: 2 class folders \(a, b\) where num_classes = 3"):
        class_list(tile_task(train=train, val=val))
    with pytest.raises(ValueError, match=r"train: 2 class folders \(a, b\) where num_classes = 3"):
        class_list(tile_task(val=train))


def test_a_classes_file_of_another_order_means_the_same_names(tmp_path):
    train = table(tmp_path / "train.csv", "path,label\nx,a\ny,b\n", ["b", "c", "a"])
    val = table(tmp_path / "val.csv", "path,label\nx,a\ny,b\n", ["a", "b", "c"])
    task = tile_task(train=train, val=val)
    assert class_list(task) == ("b", "c", "a")
    assert labels(train, task) == labels(val, task) == [("x", (2,)), ("y", (0,))]
    other = table(tmp_path / "other.csv", "path,label\nx,a\n", ["a", "b", "d"])
    with pytest.raises(ValueError, match=r"classes .*other.txt: it lists 3 names, but 'd' is not in the task's list: classes .*train.txt"):
        val.samples(tile_task(train=train, val=other))


def test_folders_and_tables_have_one_list(tmp_path):
    train = folders(tmp_path / "train", "a", "b", "c")
    for text in ("path,label\nx,c\ny,a\n", "path,label\nx,2\ny,0\n"):
        val = table(tmp_path / "val.csv", text)
        assert labels(val, tile_task(train=train, val=val)) == [("x", (2,)), ("y", (0,))]
        assert labels(val, tile_task(train=val, val=train)) == [("x", (2,)), ("y", (0,))]
    named = table(tmp_path / "named.csv", "path,label\nx,c\n", ["c", "b", "a"])
    assert labels(train, tile_task(train=named, val=train)) == [("train/c/1.jpg", (0,)), ("train/b/1.jpg", (1,)), ("train/a/1.jpg", (2,))]
    with pytest.raises(ValueError, match=r"val.csv, line 2: label 'd' is neither a number nor among the task's 3 classes \(a, b, c\)"):
        table(tmp_path / "val.csv", "path,label\nx,d\n").samples(tile_task(train=train))


def test_a_source_that_is_not_the_tasks_own_has_its_list(tmp_path):
    task = tile_task(train=folders(tmp_path / "train", "a", "b", "c"))
    assert labels(folders(tmp_path / "more", "c"), task) == [("more/c/1.jpg", (2,))]
    with pytest.raises(ValueError, match=r"other: 1 class folders \(d\), but 'd' is not in the task's list: .*train"):
        folders(tmp_path / "other", "d").samples(task)
    assert labels(folders(tmp_path / "alone", "x", "y", "z"), tile_task())[2] == ("alone/z/1.jpg", (2,))


def test_without_names_there_is_no_list(tmp_path):
    assert class_list(tile_task()) is None
    assert class_list(tile_task(train=table(tmp_path / "t.csv", "path,label\nx,1\n"))) is None


def test_blanks_at_a_names_ends_do_not_count(tmp_path):
    task = tile_task(train=folders(tmp_path / "train", "a", "b", "c"), val=folders(tmp_path / "val", "b "))
    assert labels(task.val, task) == [("val/b /1.jpg", (1,))]


def test_a_stored_list_rules_and_its_training_files_may_be_gone(tmp_path):
    task = tile_task(train=folders(tmp_path / "train", "a", "b", "c"), val=folders(tmp_path / "val", "b", "d"))
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(ValueError, match=r"folder .*train: No such file"):
        task.val.samples(task)
    assert labels(task.val, recall_classes(task, ["d", "c", "b"], "step_9")) == [("val/d/1.jpg", (0,)), ("val/b/1.jpg", (2,))]
    with pytest.raises(ValueError, match=r"val: .*, but 'd' is not in the task's list: step_9: it was trained on 3 classes \(a, b, c\)"):
        task.val.samples(recall_classes(task, ["a", "b", "c"], "step_9"))
    assert class_list(recall_classes(tile_task(), None, "step_9")) is None


def test_the_first_difference_of_two_lists():
    assert first_difference(["a", "b"], ("a", "b")) == first_difference(None, ("a",)) == first_difference(None, None) == ""
    assert first_difference(["a", "b", "c"], ("a", "c", "b")) == "class 1 was 'b' and is 'c' now"
    assert first_difference(["a", "b"], ("a", "b", "c")) == "it had 2 classes and has 3 now"
    assert first_difference(["a", "b"], None) == "its classes had names (a, b) and have none now"


@pytest.mark.parametrize(
    ("labels", "multi_label", "message"),
    [
        ([3], False, "here: label 3 is out of range; num_classes = 3 allows 0 to 2"),
        ([0, -1], True, "here: label -1 is out of range"),
        ([], False, "here: it has no label"),
        ([0, 1], False, "here: 2 labels where the task has one per sample; set multi_label = True to allow several"),
        ([0, 0, 1, 0, 1], True, r"here: class 0 is named twice among 5 labels; list each class once \(0/1 flags are not read\)"),
        ([2, 1, 1], True, "here: class 1 is named twice"),
        ([1, 1], False, "here: class 1 is named twice"),
    ],
)
def test_labels_that_are_no_list_of_the_tasks_classes(labels, multi_label, message):
    task = tile_task(loss="sigmoid", multi_label=multi_label)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_labels(labels, task, "here")


@pytest.mark.parametrize(("labels", "multi_label"), [([2], False), ([], True), ([2, 0], True)])
def test_labels_in_the_tasks_list(labels, multi_label):
    check_labels(labels, tile_task(loss="sigmoid", multi_label=multi_label), "here")
