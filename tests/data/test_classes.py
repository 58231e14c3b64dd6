import pytest
from tiny_runs import tile_task

from polyvit_fast.data.classes import check_labels


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
