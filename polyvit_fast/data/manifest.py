"""Samples listed by folders (one per class) or by a table (CSV or TSV)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyvit_fast.config import Source, Task
from polyvit_fast.data.classes import check_labels
from polyvit_fast.data.shards import read_index
from polyvit_fast.media import Media, Sample

LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A folder per class, whose names in sorted order are classes 0, 1, …

    Every file in a class folder and below is a sample, but for names that begin with a dot; files beside the class folders are not.
    """

    path: str
    """Holds the class folders."""

    def samples(self, task: Task) -> Sequence[Sample]:
        """Class by class, files in sorted order. Raises ValueError when there are not `num_classes` folders or one is empty."""
        folders = self._class_folders()
        if len(folders) != task.num_classes:
            raise ValueError(f"{self.path}: {len(folders)} class folders ({_shorten(folders)}) where num_classes = {task.num_classes}")
        samples = []
        for label, name in enumerate(folders):
            files = list(_files(os.path.join(self.path, name)))
            if not files:
                raise ValueError(f"class folder {os.path.join(self.path, name)} is empty")
            samples += [Sample(Media(file), (label,)) for file in files]
        return samples

    def _class_folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        except OSError as error:
            raise ValueError(f"folder {self.path}: {error.strerror}") from None


def _files(folder: str) -> Iterator[str]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


@dataclass(frozen=True, kw_only=True)
class Manifest(Source):
    """A table with a line per sample: `path` and `label`, or `path` and `labels` (separated by ; or spaces, where there are several).

    The first line names the columns; further columns are ignored. A .tsv file has tabs, any other commas. A path may name a member of a
    tar shard, as train-0000.tar:000017.jpg.
    """

    path: str
    """The table."""
    root: str = ""
    """Folder that relative paths start from; empty: the table's own."""
    classes: str = ""
    """Text file with the class names, one a line, in the order of their numbers. Labels are then names; without it, numbers from 0."""

    def samples(self, task: Task) -> Sequence[Sample]:
        """Line by line. Raises ValueError that names file and line. Whether the files exist shows when they are read."""
        read_label = _ClassNames(self.classes, task).numbers if self.classes else _class_numbers
        root = self.root or os.path.dirname(self.path)
        members: dict[str, dict[str, Media]] = {}
        samples = []
        for line, path, cell in self._rows():
            where = f"{self.path}, line {line}"
            try:
                media = _media(os.path.join(root, path), members)
                labels = read_label(cell, task)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            check_labels(labels, task, where)
            samples.append(Sample(media, labels))
        if not samples:
            raise ValueError(f"manifest {self.path}: it lists no samples")
        return samples

    def _rows(self) -> Iterator[tuple[int, str, str]]:
        """(line, path, label cell) of every line but the first and empty ones."""
        try:
            file = open(self.path, newline="", encoding="utf-8-sig", errors="surrogateescape")  # noqa: SIM115 - closed below
        except OSError as error:
            raise ValueError(f"manifest {self.path}: {error.strerror}") from None
        with file:
            rows = csv.reader(file, delimiter="\t" if self.path.endswith(".tsv") else ",", strict=True)
            try:
                header = next(rows, [])
                columns = _find_columns([name.strip().lower() for name in header], self.path)
                for row in rows:
                    if row:
                        yield rows.line_num, *_pick(row, columns, len(header), f"{self.path}, line {rows.line_num}")
            except csv.Error as error:
                raise ValueError(f"{self.path}, line {rows.line_num}: {error}") from None


def _find_columns(header: list[str], path: str) -> tuple[int, int]:
    labels = [name for name in LABEL_COLUMNS if name in header]
    if "path" not in header or len(labels) != 1:
        named = ", ".join(header) or "none"
        raise ValueError(f"{path}, line 1: the columns must be named, among them path and either label or labels; it names {named}")
    return header.index("path"), header.index(labels[0])


def _pick(row: list[str], columns: tuple[int, int], width: int, where: str) -> tuple[str, str]:
    if len(row) != width:
        fault = "too few" if len(row) < width else "too many; put a path that holds the separator in double quotes"
        raise ValueError(f"{where}: {len(row)} columns where the first line names {width}: {fault}")
    path, cell = row[columns[0]], row[columns[1]].strip()
    if not path or "\0" in path:
        raise ValueError(f"{where}: the path {path!r} is empty or holds a NUL character")
    return path, cell


def _split(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(";") if part.strip()] if ";" in cell else cell.split()


def _class_numbers(cell: str, task: Task) -> tuple[int, ...]:
    parts = _split(cell)
    if not all(re.fullmatch("-?[0-9]+", part) for part in parts):
        raise ValueError(f"label {cell!r} is not a class number; to use names, set classes to a file that lists them")
    return tuple(dict.fromkeys(map(int, parts)))


class _ClassNames:
    """The names in a `classes` file."""

    def __init__(self, path: str, task: Task) -> None:
        try:
            names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"classes {path}: {getattr(error, 'strerror', None) or error}") from None
        self.path = path
        self.index = {name: number for number, name in enumerate(names)}
        if len(self.index) < len(names):
            raise ValueError(f"classes {path}: {next(n for n in names if names.count(n) > 1)!r} appears twice")
        if len(names) != task.num_classes:
            raise ValueError(f"classes {path}: it lists {len(names)} names where num_classes = {task.num_classes}")

    def numbers(self, cell: str, task: Task) -> tuple[int, ...]:
        """The classes that a cell names. A whole cell that is a name counts as one, so that names may hold spaces."""
        names = [cell] if cell in self.index else _split(cell)
        unknown = [name for name in names if name not in self.index]
        if unknown:
            raise ValueError(f"label {unknown[0]!r} is not among the {len(self.index)} names in {self.path}")
        return tuple(dict.fromkeys(self.index[name] for name in names))


def _media(path: str, members: dict[str, dict[str, Media]]) -> Media:
    """A file, or a member of a shard whose index `members` keeps."""
    shard, colon, member = path.partition(".tar:")
    if not colon:
        return Media(path)
    shard += ".tar"
    if shard not in members:
        members[shard] = {media.member: media for example in read_index(shard) for media in example.media}
    if member not in members[shard]:
        raise ValueError(f"shard {shard} has no media member {member!r}")
    return members[shard][member]
