import pytest
from rich.cells import cell_len

from polyvit_fast.train.output.words import break_words, shorten


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("short", 10, ["short"]),
        ("", 10, [""]),
        ("moments_in_time-v2", 11, ["moments_in_", "time-v2"]),
        ("two words", 9, ["two words"]),
        ("two words", 8, ["two", "words"]),
        ("data/train/cats", 11, ["data/train/", "cats"]),
        ("cat 93.1%, dog 2,000", 10, ["cat 93.1%,", "dog 2,000"]),
        ("-3 at -1", 5, ["-3 at", "-1"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
        ("a_unbreakable", 4, ["a_", "unbr", "eaka", "ble"]),
        ("猫の写真", 4, ["猫の", "写真"]),
        ("ab", 0, ["a", "b"]),
    ],
)
def test_lines_end_where_words_do(text, width, lines):
    assert break_words(text, width) == lines


@pytest.mark.parametrize("text", ["imagenet_21k_winter_release", "猫と犬の写真データセット", "ab"])
@pytest.mark.parametrize("width", [3, 8, 9, 24, 40])
def test_a_shortened_name_keeps_its_beginning_and_its_end(text, width):
    short = shorten(text, width)
    assert cell_len(short) <= width
    if cell_len(text) <= width:
        assert short == text
    else:
        begin, end = short.split("…")
        assert text.startswith(begin)
        assert text.endswith(end)
        assert cell_len(short) >= width - 2  # letters of two cells leave some room
