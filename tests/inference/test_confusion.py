import numpy as np
import pytest
import torch
from long_forms import mark_long
from PIL import Image

from polyvit_fast.inference.confusion import MOST, OTHERS, _choose_classes, plot_confusion
from polyvit_fast.train.output.colours import task_colour, to_rgb


@pytest.mark.parametrize("count", [1, 2, 12, 30, 31, 400])
def test_pictures_of_few_and_of_many_classes(tmp_path, count):
    confusion = torch.randint(0, 5, (count, count), generator=torch.Generator().manual_seed(0)) + 20 * torch.eye(count, dtype=torch.int64)
    names = [f"class number {number} with a long name" for number in range(count)]
    path = tmp_path / "new" / "confusion.png"
    plot_confusion(path, "a run", names, confusion)
    with Image.open(path) as picture:
        assert 200 < picture.width < 2000
        assert 200 < picture.height < 2000
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 10


@pytest.mark.parametrize("index", mark_long(range(20), [1]))
def test_a_picture_has_the_colour_of_its_task_and_numbers_that_can_be_read(tmp_path, index):
    confusion = torch.tensor([[60, 30, 10], [0, 100, 0], [0, 0, 1]])
    plot_confusion(tmp_path / "confusion.png", "a run", ["a", "$1 and $2", "c"], confusion, colour=task_colour(index))
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - to_rgb(task_colour(index))) <= 3).all(2))  # of 60 % of the files, and in the scale
    first = rows[columns < columns.min() + 20]
    cell = pixels[first.min() : first.max() + 1, columns.min() : columns.min() + np.ptp(first) + 1]
    assert len(first) > 200
    assert np.ptp(cell @ [0.2126, 0.7152, 0.0722]) > 75  # its number


def test_all_of_few_classes_are_shown():
    counts = np.arange(9).reshape(3, 3)
    names, shown = _choose_classes(["a", "b", "c"], counts)
    assert names == ["a", "b", "c"]
    np.testing.assert_array_equal(shown, counts)


def test_of_many_classes_the_worst_are_shown_and_no_file_is_lost():
    counts = np.diag(np.full(100, 50))
    counts[70, 3] = counts[3, 70] = 9
    counts[5, 99] = 4
    names, shown = _choose_classes(list(map(str, range(100))), counts)
    assert len(names) == MOST
    assert {"3", "5", "70", "99"} <= set(names)
    assert names[-1] == OTHERS
    assert names[:-1] == sorted(names[:-1], key=int)
    assert shown.sum() == counts.sum()
    assert shown[names.index("70"), names.index("3")] == 9
    assert shown[names.index("5"), names.index("99")] == 4
    assert shown[-1, -1] == 50 * (100 - MOST + 1)
