"""The three datasets of pictures: scanned digits, stamps and drawings, as PNG files of 64 x 64 pixels."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from polyvit_fast.experiments.schedules_data.dataset import BrokenMediaError, Dataset, Example, choose, list_files, split_groups

SIZE = 64
MOST_PIXELS = 40_000_000
"""Of a picture."""
DIGITS = tuple("0123456789")
STAMPS = ("animals", "alphabets", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
MOST_STAMPS = 90
"""Of a kind; there are 247 symbols, and 34 things of a household."""
MOST_DRAWINGS = 100
"""Of a topic; there are 1,853 icons, and 40 times fewer toys."""
FEWEST_SERIES = 10
"""Of a class: with fewer, a split might have none of them."""
TOPICS = {
    "animals/birds": "birds",
    "animals/bugs": "bugs",
    "animals/mammals": "mammals",
    "buildings/homes": "homes",
    "computer/buttons": "buttons",
    "computer/hardware": "hardware",
    "computer/icons": "icons",
    "food/beverages": "beverages",
    "food/desserts": "desserts",
    "food/fruit": "fruit",
    "people/clothing": "clothing",
    "people/smilies": "smilies",
    "people/stickmen": "stickmen",
    "plants/flowers": "flowers",
    "recreation/games": "games",
    "recreation/holiday": "holiday",
    "recreation/music": "music",
    "recreation/party": "party",
    "recreation/sports": "sports",
    "shapes/arrows": "arrows",
    "signs_and_symbols/flags": "flags",
    "signs_and_symbols/map_symbols": "map_symbols",
    "special/patterns": "patterns",
    "tools/weapons": "weapons",
    "transportation/roadsigns": "roadsigns",
    "transportation/vehicles": "vehicles",
}


def list_digits(packages: Mapping[str, Path]) -> Iterator[Example]:
    """8 x 8 pixels with 17 levels, enlarged. In the order of the table, which follows the writers: 60 % train, 15 % val, 25 % test."""
    table = packages["scikit-learn"] / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    if not table.is_file():
        return
    with gzip.open(table, "rt") as file:
        rows = [[int(float(cell)) for cell in row] for row in csv.reader(file)]
    for index, row in enumerate(rows):
        fraction = index / len(rows)
        split = "train" if fraction < 0.6 else "val" if fraction < 0.75 else "test"
        pixels = (np.array(row[:64]).reshape(8, 8) * 255 // 16).astype(np.uint8)
        yield Example(split, f"{index:04d}.png", (str(row[64]),), _enlarge(pixels))


def list_stamps(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Photos and drawings by the folder that they lie in."""
    root = packages["tuxpaint-stamps-default"] / "usr" / "share" / "tuxpaint" / "stamps"
    kinds: dict[str, list[str]] = {}
    for file in list_files(root, ".png"):
        path = file.relative_to(root).as_posix()
        kind = "alphabets" if "/alphabets/" in path else path.split("/")[0]
        if kind in STAMPS:
            kinds.setdefault(kind, []).append(path)
    for kind, found in kinds.items():
        chosen = choose(found, MOST_STAMPS, "stamps", kind)
        series = _find_series(chosen)
        splits = split_groups(series.values(), "stamps", kind, test=0.35)
        for path in chosen:
            yield Example(splits[series[path]], path.replace("/", "-"), (kind,), _shrink(root / path))


def list_topics(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Drawings by topic. Those of one series, such as dog_01 and dog_02, are in one split."""
    root = packages["openclipart-png"] / "usr" / "share" / "openclipart" / "png"
    for folder, topic in TOPICS.items():
        found = [file.relative_to(root).as_posix() for file in list_files(root / folder, ".png")]
        chosen = choose(found, MOST_DRAWINGS, "topics", topic)
        series = _find_series(chosen)
        splits = split_groups(series.values(), "topics", topic)
        for path in chosen:
            yield Example(splits[series[path]], path.replace("/", "-"), (topic,), _shrink(root / path))


def _find_series(paths: list[str]) -> dict[str, str]:
    """The series of each picture: the first word of its name, or all but the numbers where too many begin alike."""
    stems = {path: Path(path).stem.lower().lstrip("-_. 0123456789") for path in paths}
    first = {path: re.split(r"[-_. \d]", stem)[0] for path, stem in stems.items()}
    if len(set(first.values())) >= FEWEST_SERIES:
        return first
    return {path: re.sub(r"[-_. \d]+", " ", stem).strip() for path, stem in stems.items()}


def _enlarge(pixels: UInt8[np.ndarray, "8 8"]) -> Callable[[], bytes]:
    from PIL import Image

    return lambda: _to_png(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _shrink(path: Path) -> Callable[[], bytes]:
    """The whole picture on a white square."""

    def content() -> bytes:
        from PIL import Image

        if _count_pixels(path) > MOST_PIXELS:
            raise BrokenMediaError(f"a picture of more than {MOST_PIXELS:,} pixels")
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise BrokenMediaError(f"not a picture that can be read ({type(error).__name__})") from error
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
        return _to_png(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX, reducing_gap=None))

    return content


def _count_pixels(path: Path) -> int:
    """Of a PNG file, as its header says: some of the drawings have 623 million, which take minutes."""
    with path.open("rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


def _to_png(picture: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")  # pyright: ignore[reportAttributeAccessIssue]
    return file.getvalue()


DATASETS = (
    Dataset(
        name="digits",
        question="Which digit is it? The splits are parts of the table, whose writers come one after the other.",
        classes=DIGITS,
        packages=("scikit-learn",),
        list_examples=list_digits,
    ),
    Dataset(
        name="stamps",
        question="What kind of thing does the photo or drawing show? Stamps of one name are in one split.",
        classes=STAMPS,
        packages=("tuxpaint-stamps-default",),
        list_examples=list_stamps,
    ),
    Dataset(
        name="topics",
        question="What is the drawing about? Drawings of one series are in one split.",
        classes=tuple(TOPICS.values()),
        packages=("openclipart-png",),
        list_examples=list_topics,
    ),
)
