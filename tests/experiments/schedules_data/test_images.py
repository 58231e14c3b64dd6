import csv
import gzip
import io
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from image_files import png_header
from image_kinds import saved
from PIL import Image

from polyvit_fast.experiments.schedules_data.dataset import BrokenMediaError
from polyvit_fast.experiments.schedules_data.images import MOST_STAMPS, STAMPS, TOPICS, list_digits, list_stamps, list_topics

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def pixels_of(example):
    picture = Image.open(io.BytesIO(example.content()))
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    return np.asarray(picture)


def write_png(path, size=(8, 8), colour=RED, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(Image.new(mode, size, colour), "PNG"))


def write_digits(root, rows):
    text = io.StringIO()
    csv.writer(text).writerows([f"{cell:.1f}" for cell in row] for row in rows)
    path = root / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def test_digits_are_split_in_the_order_of_the_table(tmp_path):
    write_digits(tmp_path, [[0] * 64 + [index % 10] for index in range(40)])
    examples = list(list_digits({"scikit-learn": tmp_path}))
    assert [example.split for example in examples] == ["train"] * 24 + ["val"] * 6 + ["test"] * 10
    assert [example.labels for example in examples] == [(str(index % 10),) for index in range(40)]
    assert len({example.name for example in examples}) == 40


def test_a_digit_is_its_pixels_enlarged(tmp_path):
    write_digits(tmp_path, [[16, 0, 0, 0, 0, 0, 0, 8] * 8 + [3], [0, 16] * 32 + [4]])
    first, _ = list_digits({"scikit-learn": tmp_path})
    pixels = pixels_of(first)
    assert pixels.shape == (64, 64)
    assert (pixels[:, :3] > 245).all()  # the first column of eight
    assert (pixels[:, 24:40] == 0).all()
    assert (abs(pixels[:, -3:].astype(int) - 127) < 20).all()
    assert np.array_equal(pixels[0], pixels[-1])


def test_a_package_without_the_table_holds_no_digit(tmp_path):
    assert list(list_digits({"scikit-learn": tmp_path})) == []


@pytest.fixture
def stamps(tmp_path):
    root = tmp_path / "usr" / "share" / "tuxpaint" / "stamps"
    for name in "abcdefghijklmnopqrst":
        for kind in ("birds", "insects"):
            write_png(root / "animals" / kind / f"{name * 3}_{kind}.png")
            write_png(root / "animals" / kind / f"{name * 3}-2.png")
    for number in range(130):
        write_png(root / "symbols" / f"sign{number}.png")
    for letter in "abcdefghijkl":
        write_png(root / "symbols" / "alphabets" / f"{letter}.png")
    write_png(root / "hats" / "one.png")  # too few of their kind in the real package
    (root / "animals" / "name.dat").write_text("no picture")
    return root, {"tuxpaint-stamps-default": tmp_path}


def test_stamps_are_of_the_kind_of_their_folder(stamps):
    counts = Counter(example.labels for example in list_stamps(stamps[1]))
    assert counts == {("animals",): 80, ("symbols",): MOST_STAMPS, ("alphabets",): 12}
    assert {label for (label,) in counts} <= set(STAMPS)


def test_stamps_of_one_name_are_in_one_split(stamps):
    splits = defaultdict(set)
    for example in list_stamps(stamps[1]):
        if example.labels == ("animals",):
            splits[re.split("[-_]", example.name)[2]].add(example.split)
    assert len(splits) == 20
    assert Counter(split for (split,) in splits.values()) == {"train": 10, "val": 3, "test": 7}


def test_stamps_are_listed_alike_each_time(stamps):
    first, second = ([(example.split, example.name) for example in list_stamps(stamps[1])] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)


@pytest.fixture
def drawings(tmp_path):
    root = tmp_path / "usr" / "share" / "openclipart" / "png"
    for folder in TOPICS:
        for series in "abcdefghijklmnopqrst":
            for number in (1, 2):
                write_png(root / folder / "more" / f"{series * 3}_{number:02d}.png")
    write_png(root / "unsorted" / "one.png")
    return root, {"openclipart-png": tmp_path}


def test_drawings_have_the_topic_of_their_folder_and_series_one_split(drawings):
    splits, counts = defaultdict(set), Counter()
    for example in list_topics(drawings[1]):
        counts[example.labels] += 1
        splits[example.name.rsplit("_", 1)[0]].add(example.split)
    assert counts == {(topic,): 40 for topic in TOPICS.values()}
    assert len(splits) == 20 * len(TOPICS)
    assert Counter(split for (split,) in splits.values()) == {split: number * len(TOPICS) for split, number in SERIES.items()}


SERIES = {"train": 12, "val": 3, "test": 5}


def test_where_all_names_begin_alike_what_follows_is_the_series(tmp_path):
    root = tmp_path / "usr" / "share" / "openclipart" / "png" / "animals" / "birds"
    for name in ("crow", "duck", "eagle", "finch", "goose", "hawk", "ibis", "jay", "kiwi", "lark"):
        for number in (1, 2):
            write_png(root / f"bird_{name}_{number}.png")
    splits = defaultdict(set)
    for example in list_topics({"openclipart-png": tmp_path}):
        splits[example.name.rsplit("_", 1)[0]].add(example.split)
    assert len(splits) == 10
    assert Counter(split for (split,) in splits.values()) == {"train": 6, "val": 2, "test": 2}


def first_drawing(tmp_path, write):
    path = tmp_path / "usr" / "share" / "openclipart" / "png" / "animals" / "birds" / "crow.png"
    path.parent.mkdir(parents=True)
    write(path)
    (example,) = list_topics({"openclipart-png": tmp_path})
    return example


def test_a_wide_picture_is_whole_on_a_white_square(tmp_path):
    pixels = pixels_of(first_drawing(tmp_path, lambda path: write_png(path, (128, 64), GREEN)))
    assert (pixels[:16] == WHITE).all()
    assert (pixels[16:48] == GREEN).all()
    assert (pixels[48:] == WHITE).all()


def test_what_is_transparent_is_white(tmp_path):
    pixels = pixels_of(first_drawing(tmp_path, lambda path: write_png(path, (30, 30), (255, 0, 0, 0), "RGBA")))
    assert (pixels == WHITE).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>", "not a picture that can be read"),
        (b"", "not a picture that can be read"),
        (saved(Image.effect_noise((99, 99), 50), "PNG")[:4000], "not a picture that can be read"),
        (png_header(10_000, 5_000), "a picture of more than 40,000,000 pixels"),
    ],
    ids=["text", "empty", "cut", "huge"],
)
def test_what_is_no_picture_is_left_out(tmp_path, content, reason):
    with pytest.raises(BrokenMediaError, match=reason):
        first_drawing(tmp_path, lambda path: path.write_bytes(content)).content()
