import json

import pytest

from polyvit_fast.data.sources.shard_labels import MAX_BYTES, is_name, parse_labels


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("12", 12), (" 3\n", 3), ("\r\n007\t", 7), ("\ufeff5", 5), ("9" * 18, int("9" * 18))]
)
def test_numbers_are_ascii_digits(text, number):
    assert parse_labels(text.encode(), "cls") == (number,)


NEITHER = [
    "1.0",
    "1_000",
    "+3",
    "-1",
    "٣",
    "３",
    "²",
    "1e3",
    "",
    " ",
    "0x1",
    "0b1",
    "1 2",
    "1,2",
    "0;1",
    "[1]",
    "nan",
    "Infinity",
    "1/2",
    "?",
    "tensor(1)",
    "tensor([1, 2])",
    "torch.tensor(1)",
    "np.int64(1)",
    "array([1])",
    "b'1'",
    "b'cat'",
    '"cat"',
    "['cat']",
    "[tensor(1)]",
    '{"label": 1}',
    "None",
    "True",
    "false",
    "null",
    "<NA>",
]


@pytest.mark.parametrize("text", [*NEITHER, "two\nlines", "a\tb", "nul\0"])
def test_nothing_between_a_number_and_a_name(text):
    with pytest.raises(ValueError, match=r"is not a class number \(digits 0 to 9 alone\) or a class name"):
        parse_labels(text.encode(), "cls")
    assert not is_name(text)


@pytest.mark.parametrize("count", [19, 5000])
def test_a_number_of_too_many_digits(count):
    with pytest.raises(ValueError, match=f"^it has {count} digits, too many for a class number$"):
        parse_labels(b"9" * count, "cls")
    assert not is_name("9" * count)


@pytest.mark.parametrize(
    "text",
    [
        "cat",
        "polar bear",
        "n01440764",
        "3d-printer",
        "3d_model",
        "1a",
        "none",
        "[noise]",
        "jump (2)",
        "truth",
        "0_tench",
        "A",
        "猫",
        "кот",
        "🐱",
        "C++",
        "e3",
        "a/b",
    ],
)
def test_names(text):
    assert parse_labels(f"\n{text}\r\n".encode(), "cls") == (text,)


def test_names_are_in_the_composed_form():
    assert parse_labels("cafe\u0301".encode(), "cls") == parse_labels("caf\u00e9".encode(), "cls") == ("caf\u00e9",)
    assert parse_labels(json.dumps(["cafe\u0301"]).encode(), "json") == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (5, (5,)),
        ("cat", ("cat",)),
        ([], ()),
        ([2, 0], (2, 0)),
        ({"label": 3, "caption": "x"}, (3,)),
        ({"label": [3, 4]}, (3, 4)),
        ({"labels": ["a", "b"]}, ("a", "b")),
        ({"labels": []}, ()),
        ({"label": 3, "labels": None}, (3,)),
        ({"label": 3, "labels": [3]}, (3,)),
        ({"label": None}, None),
        ({"caption": "x"}, None),
        ({"label": 1, "id": 10**30}, (1,)),
        ([-1], (-1,)),
    ],
)
def test_labels_in_json(content, labels):
    assert parse_labels(json.dumps(content).encode(), "json") == labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "'{' is not JSON"),
        ('{"label": 0, "label": 1}', '"label" appears twice in it'),
        ('{"labels": [0], "id": 1, "labels": [0]}', '"labels" appears twice in it'),
        ("9" * 5000, r"'9{56}\.\.\. is not a class number or name"),
        ('{"label": %s}' % ("9" * 5000), r"'9{56}\.\.\. is not a class number or name"),
        ("[-0]", r"\['-0'\] is not"),
        ('"None"', "'None' is not"),
        ("[" * 100_000, "is not JSON"),
        ("1.0", "1.0 is not a class number or name, or a list of them"),
        ("true", "True is not a class number or name"),
        ("[0, true]", r"\[0, True\] is not a class number or name, or a list of them"),
        ("[[0], [1]]", r"\[\[0\], \[1\]\] is not"),
        ("[null]", r"\[None\] is not"),
        ("null", "None is not"),
        ("NaN", "nan is not"),
        ('{"label": "1"}', "'1' is not a class number but a text; write it without quotes"),
        ('["cat", "1.0"]', r"\['cat', '1.0'\] is not"),
        ('{"label": {"id": 1}}', "{'id': 1} is not"),
        ('{"label": 1, "labels": [1, 2]}', r'"label" is 1 but "labels" is \[1, 2\]'),
        ('{"label": ' + "[0]," * 200 + "}", "is not JSON"),
    ],
)
def test_json_that_tells_no_classes(content, message):
    with pytest.raises(ValueError, match=f"^{message}|.*{message}"):
        parse_labels(content.encode(), "json")


def test_what_is_no_text_or_too_long():
    with pytest.raises(ValueError, match="it is not UTF-8"):
        parse_labels("3".encode("utf-16"), "cls")
    with pytest.raises(ValueError, match="more than 1048576 bytes are too many for a label"):
        parse_labels(b" " * MAX_BYTES + b"1", "json")
