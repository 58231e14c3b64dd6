import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvit_fast.data.sources.classes import normalise
from polyvit_fast.data.sources.label_cells import LabelCells, format_classes, format_labels

NAMES = ("Dog", "Male speech, man speaking", "a;b", "café", "7")


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("0", (0,)),
        ("0 4", (0, 4)),
        ("3;1", (3, 1)),
        ("", ()),
        ("1;", (1,)),
        ("0;0;1", (0, 0, 1)),
        ("[0, 2]", (0, 2)),
        ("[]", ()),
        ("01", (1,)),
        ("-1", (-1,)),
    ],
)
def test_numbers(cell, labels):
    assert LabelCells(None, 5).read(cell) == labels


@pytest.mark.parametrize(
    "cell",
    [
        "-0",
        "[-0]",
        "+1",
        "9" * 19,
        "9" * 5000,
        f"[{'9' * 5000}]",
        "dog",
        "1.0",
        "1_0",
        "١",
        "[true]",
        "[1.0]",
        "[[1]]",
        '["dog"]',
        "['dog']",
        "[0 1]",
        "{}",
        "1,2",
        "0;dog",
    ],
)
def test_what_is_no_number(cell):
    with pytest.raises(ValueError, match=r"label .{,70} is not a class number; to use names, set classes to a file that lists them"):
        LabelCells(None, 5).read(cell)


@pytest.mark.parametrize("classes", ["", "classes.txt"])
@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("Dog", (0,)),
        ("Male speech, man speaking", (1,)),
        ("Dog;Male speech, man speaking", (0, 1)),
        ("Dog café", (0, 3)),
        ("a;b", (2,)),
        ('["a;b", "7"]', (2, 4)),
        ("cafe\u0301", (3,)),
        ("café;cafe\u0301", (3, 3)),
        ("Dog;Dog;", (0, 0)),
        ("7", (4,)),
        ("[4]", (4,)),
    ],
)
def test_names(cell, labels, classes):
    assert LabelCells(NAMES, 5, classes).read(cell) == labels


def test_numbers_count_in_the_list_of_another_split():
    assert LabelCells(NAMES, 5).read("3;0") == (3, 0)
    with pytest.raises(ValueError, match=r"label '3' is not among the 5 names in classes.txt"):
        LabelCells(NAMES, 5, "classes.txt").read("3")
    with pytest.raises(ValueError, match=r"label 'dgo' is neither a number nor among the task's 5 classes \(Dog, .*, …\)"):
        LabelCells(NAMES, 5).read("dgo")


def test_a_number_that_is_also_a_name_is_refused():
    cells = LabelCells(("1", "2", "10"), 3)
    with pytest.raises(ValueError, match=r"label '1' may be a number, that of class '2', or the name of class number 0; set classes"):
        cells.read("1")
    assert cells.read('["1"]') == (0,)
    assert cells.read("[1]") == (1,)
    assert cells.read("10") == (2,)
    assert LabelCells(("0", "1", "2"), 3).read("1") == (1,)


@given(
    st.lists(st.text("aé;, \"'[]01-\n", min_size=1, max_size=4).map(normalise).filter(bool), min_size=1, max_size=6, unique=True), st.data()
)
def test_every_list_of_labels_comes_back_with_classes_set_or_not(names, data):
    labels = tuple(data.draw(st.lists(st.sampled_from(range(len(names))), unique=True)))
    cell = format_labels(labels, names, len(names))
    table = io.StringIO()
    csv.writer(table).writerow(("path", cell))
    [[_, again]] = csv.reader(io.StringIO(table.getvalue(), newline=""), strict=True)
    for classes in ("", "classes.txt"):
        assert LabelCells(names, len(names), classes).read(again.strip()) == labels


def test_cells_are_plain_where_they_can_be():
    assert format_labels((0, 1), NAMES, 5) == "Dog;Male speech, man speaking"
    assert format_labels((0, 2), NAMES, 5) == '["Dog", "a;b"]'
    assert format_labels((3, 1), None, 5) == "3 1"
    assert format_labels((), NAMES, 5) == ""


def test_a_list_of_classes():
    assert format_classes(NAMES) == "Dog\nMale speech, man speaking\na;b\ncafé\n7\n"
    with pytest.raises(ValueError, match=r"class 'a\\nb': a name that is empty or holds a line break cannot stand in a list"):
        format_classes(["a\nb"])
