"""What every dataset of `schedules_data` is: `Example`s in three splits, written as files with a manifest for each split."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from polyvit_fast.experiments.schedules_data.packages import PackageError
from polyvit_fast.files import write_atomically
from polyvit_fast.randomness import permutation
from polyvit_fast.strict_json import dumps

SPLITS = ("train", "val", "test")
RECORD = "dataset.json"


@dataclass(frozen=True)
class Example:
    """A file of a dataset."""

    split: str
    name: str
    """Of its file, with a suffix."""
    labels: tuple[str, ...]
    content: Callable[[], bytes]
    """Makes the file's content."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset: which packages hold its media, and how they become files."""

    name: str
    question: str
    """What a model is to find out, and what the splits do not have in common."""
    classes: tuple[str, ...]
    packages: tuple[str, ...]
    """Names of the packages that it needs."""
    list_examples: Callable[[Mapping[str, Path]], Iterable[Example]]
    """All examples, from the folders of the unpacked packages."""
    version: int = 1
    """Of the recipe; files of another version are made again."""


@dataclass(frozen=True)
class Written:
    """What became of a dataset: dataset.json in its folder."""

    version: int
    counts: dict[str, int]
    """Files of each split."""
    digest: str
    """Of the manifests and of every file: two machines with the same digest have the same data."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many files of the packages could not be used, by reason."""


class BrokenMediaError(Exception):
    """A file of a package cannot be used; it is left out and counted."""


def split_groups(names: Iterable[str], *parts: str, val: float = 0.15, test: float = 0.25) -> dict[str, str]:
    """The split of each group of examples, drawn by its name's hash order: the same on every machine."""
    groups = sorted(set(names))
    order = permutation(len(groups), "schedules_data", *parts)
    num_test, num_val = round(test * len(groups)), round(val * len(groups))
    splits = ["test"] * num_test + ["val"] * num_val + ["train"] * (len(groups) - num_test - num_val)
    return {groups[index]: split for index, split in zip(order.tolist(), splits, strict=True)}


def choose(items: list[str], count: int, *parts: str) -> list[str]:
    """`count` of the sorted items at most, drawn by `parts`, in sorted order."""
    items = sorted(items)
    return sorted(items[index] for index in permutation(len(items), "schedules_data", *parts)[:count].tolist())


def write(dataset: Dataset, packages: Mapping[str, Path], out: Path, advance: Callable[[int], None]) -> Written:
    """Write a dataset into `out`/NAME: a folder and a CSV for each split, and classes.txt. Calls `advance(files so far)`.

    The folder appears when it is complete; a stopped call leaves nothing behind. Raises PackageError when the packages hold nothing of a
    class, and OSError when the files cannot be written, or the folder holds something else.
    """
    folder, making, old = out / dataset.name, out / f".{dataset.name}.making", out / f".{dataset.name}.old"
    if folder.exists() and not (folder / RECORD).is_file():
        raise OSError(errno.EEXIST, "it holds other files than those of this command", str(folder))
    for rest in (making, old):
        shutil.rmtree(rest, ignore_errors=True)
    try:
        written = _write_files(dataset, packages, making, advance)
        if folder.exists():
            os.rename(folder, old)
        os.rename(making, folder)
    finally:
        for rest in (making, old):
            shutil.rmtree(rest, ignore_errors=True)
    return written


def _write_files(dataset: Dataset, packages: Mapping[str, Path], folder: Path, advance: Callable[[int], None]) -> Written:
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    left_out: Counter[str] = Counter()
    absent, seen = set(dataset.classes), set[str]()
    digest = hashlib.sha256()
    for index, example in enumerate(dataset.list_examples({name: packages[name] for name in dataset.packages})):
        advance(index)
        try:
            content = example.content()
        except BrokenMediaError as error:
            left_out[str(error)] += 1
            continue
        own = hashlib.sha256(content).hexdigest()
        if own in seen:  # packages hold many pictures twice, under other names and topics: they must not be in two splits
            left_out["equal to another file"] += 1
            continue
        seen.add(own)
        path = f"{example.split}/{example.name}"
        (folder / path).write_bytes(content)
        digest.update(f"{path}\x1f{' '.join(example.labels)}\x1f{own}\n".encode())
        rows[example.split].append((path, " ".join(example.labels)))
        absent.difference_update(example.labels)
    if absent:
        names = ", ".join(name for name in dataset.classes if name in absent)
        raise PackageError(f"{', '.join(dataset.packages)}: no file of {names} in it; another version may have them")
    for split, lines in rows.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("path", "labels"), *sorted(lines)])
        write_atomically(folder / f"{split}.csv", text.getvalue())
    write_atomically(folder / "classes.txt", "\n".join(dataset.classes) + "\n")
    written = Written(
        version=dataset.version,
        counts={split: len(lines) for split, lines in rows.items()},
        digest=digest.hexdigest()[:16],
        left_out=dict(left_out),
    )
    write_atomically(folder / RECORD, dumps(asdict(written), 1) + "\n")
    return written


def read_record(folder: Path) -> Written | None:
    """What a dataset's folder holds; None: there is no complete one."""
    try:
        return Written(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def list_files(folder: Path, *suffixes: str) -> Iterator[Path]:
    """All files below a folder with one of these suffixes, in the same order everywhere."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())
