"""Samples listed by folders (one per class) or by a table (CSV or TSV)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from polyvit_fast.config import ConfigError, Source, Task
from polyvit_fast.data.sources.classes import check_labels, class_list, normalise, remark_uncompared, shorten
from polyvit_fast.data.sources.label_cells import LabelCells
from polyvit_fast.data.sources.listing import Listing, count_names, leads_back, list_media, scan
from polyvit_fast.data.sources.shards import read_index
from polyvit_fast.data.sources.table import open_text, read_rows, renamed_columns
from polyvit_fast.files import absolute
from polyvit_fast.media import Media, Sample


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """A folder per class. The training split's folders, sorted by name, are classes 0, 1, …; other splits may lack some.

    Every file in a class folder and below is a sample, except where its name begins with a dot or is not that of a file of the task's
    modality (Thumbs.db, .txt, .json …). Files outside the class folders are no samples. Links to folders are followed, each folder once.
    """

    path: str
    """Folder with the class folders. A relative path starts from the folder in which the command runs."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", "path is empty: name the folder with the class folders")

    def samples(self, task: Task) -> Sequence[Sample]:
        """Class by class, files in sorted order. Raises ValueError when class names do not match `num_classes`, or a class is empty."""
        return [Sample(Media(file), (label,)) for label, listing in self._listings(task) for file in listing.files]

    def class_names(self, task: Task) -> tuple[str, ...]:
        """The class folders' names, sorted by their composed Unicode form, which is the same on every machine."""
        return tuple(sorted(self._class_folders()[0], key=normalise))

    def describe_classes(self, names: Sequence[str]) -> str:
        """The folder, and its class folders."""
        return f"{self.path}: {len(names)} class folders ({shorten(names)})"

    def remarks(self, task: Task) -> list[str]:
        """Classes without a folder, names that no other split confirms, files that were left out, and links that lead back."""
        names = class_list(task, self) or ()
        folders, outside, again = self._class_folders()
        lacking = [name for name in names if name not in set(map(normalise, folders))]
        left_out = Counter[str]()
        for _, listing in self._listings(task):
            left_out += listing.left_out
            again += listing.again
        remarks = remark_uncompared(task, self, names)
        if lacking:
            remarks.append(f"{self.path} has no folder for {len(lacking)} of the task's {len(names)} classes: {shorten(lacking)}")
        if left_out:
            remarks.append(f"{self.path}: left out, as their names are not those of {task.modality.name} files: {count_names(left_out)}")
        if outside:
            remarks.append(f"{self.path}: left out, because they are in no class folder: {count_names(outside)}")
        if again:
            remarks.append(f"{self.path}: {len(again)} links or folders lead to what is already listed ({shorten(again)}): counted once")
        return remarks

    def _listings(self, task: Task) -> Iterator[tuple[int, Listing]]:
        names = class_list(task, self) or ()
        folders = {normalise(name): os.path.join(self.path, name) for name in self._class_folders()[0]}
        owners: dict[str, str] = {}
        for label, name in enumerate(names):
            if name not in folders:
                continue
            listing = list_media(folders[name], task.modality.name, owners)
            if not listing.files:
                rest = f" of media; left out because of their names: {count_names(listing.left_out)}" if listing.left_out else ""
                raise ValueError(f"class folder {folders[name]} is empty{rest}")
            yield label, listing

    def _class_folders(self) -> tuple[list[str], Counter[str], list[str]]:
        """(names of the class folders, files outside them by ending, links to this folder or one that contains it)."""
        names, outside, again = [], Counter[str](), []
        real = os.path.realpath(self.path)
        for entry in scan(self.path, "", Counter()):
            if not entry.is_dir():
                outside[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
            elif leads_back(entry, real):
                again.append(entry.path)
            else:
                names.append(entry.name)
        return names, outside, again


@dataclass(frozen=True, kw_only=True)
class Manifest(Source):
    """A table with a line per sample: `path` and `label`, or `path` and `labels` (separated by ; or spaces, where there are several).

    The first line names the columns; further columns are ignored. A file named .tsv has tabs, any other commas. A path may name a member of
    a tar shard, such as train-0000.tar:000017.jpg.
    """

    path: str
    """The table. A relative path starts from the folder in which the command runs."""
    root: str = ""
    """Folder that relative paths in the table start from, itself relative to the folder in which the command runs.
    Empty: the table's own folder."""
    classes: str = ""
    """Text file with the class names, one a line, in the order of their numbers. Labels are then names; without it, numbers from 0, or the
    names that the task's other split has. A relative path starts from the folder in which the command runs."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", "path is empty: name the table")

    def samples(self, task: Task) -> Sequence[Sample]:
        """Line by line. Raises ValueError that names file and line. Whether the files exist becomes known when they are read."""
        samples = [line.sample for line in self._lines(task)]
        if not samples:
            raise ValueError(f"manifest {self.path}: it lists no samples")
        return samples

    def class_names(self, task: Task) -> tuple[str, ...] | None:
        """The lines of `classes`. Raises ValueError when it cannot be read or names a class twice."""
        if not self.classes:
            return None
        with open_text(self.classes, "classes") as file:
            try:
                names = [line.strip() for line in file if line.strip()]
            except (OSError, UnicodeError) as error:
                raise ValueError(f"classes {absolute(self.classes)}: {getattr(error, 'strerror', None) or error}") from None
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"classes {self.classes}: {twice!r} appears twice")
        return tuple(names)

    def describe_classes(self, names: Sequence[str]) -> str:
        """The file with the names, and how many it lists."""
        return f"classes {self.classes}: it lists {len(names)} names"

    def remarks(self, task: Task) -> list[str]:
        """Paths that look mistaken, lines that repeat an earlier one, and classes that no line names."""
        odd: dict[str, list[_TableLine]] = {}
        seen, everywhere, count = set[int](), True, 0
        for line in self._lines(task):
            for reason in _find_oddities(line):
                odd.setdefault(reason, []).append(line)
            seen.update(line.sample.labels)
            everywhere, count = everywhere and len(line.sample.labels) == task.num_classes > 1, count + 1
        remarks = remark_uncompared(task, self, class_list(task, self) or ()) if self.classes else []
        remarks += [
            f"{self.path}, line 1: column {name} is not read; two columns may have had one name" for name in renamed_columns(self.path)
        ]
        remarks += [f"{self.path}, {_name_lines(lines)}: {reason} ({lines[0].path!r})" for reason, lines in odd.items()]
        lacking = [str(label) for label in range(task.num_classes) if label not in seen]
        if lacking:
            remarks.append(f"{self.path} names {len(seen)} of the task's {task.num_classes} classes; none has {shorten(lacking)}")
        if everywhere and count:
            remarks.append(f"{self.path} gives every class to every sample: labels are a list of classes, not a flag for each")
        return remarks

    def _lines(self, task: Task) -> Iterator[_TableLine]:
        """The table's lines. Raises ValueError when one is faulty, or gives a file other labels than an earlier one."""
        cells = LabelCells(class_list(task, self), task.num_classes, self.classes)
        root = self.root or os.path.dirname(self.path)
        members: dict[str, dict[str, Media]] = {}
        first: dict[str, _TableLine] = {}
        for number, path, cell in read_rows(self.path):
            where = f"{self.path}, line {number}"
            try:
                media = _find_media(os.path.join(root, path), members)
                labels = cells.read(cell)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            check_labels(labels, task, where)
            line = _TableLine(number, path, Sample(media, labels))
            # A path with ".." behind a link is not what it looks like, so it is left as it is.
            earlier = first.setdefault(media.name if ".." in media.name else os.path.normpath(media.name), line)
            if set(earlier.sample.labels) != set(labels):
                raise ValueError(f"{where}: {path} has other labels than on line {earlier.number}; a file's labels stand on one line")
            line.repeats = earlier is not line
            yield line


@dataclass(slots=True)
class _TableLine:
    """A line of a table."""

    number: int
    path: str
    """As it stands in the table."""
    sample: Sample
    repeats: bool = False
    """Whether an earlier line names the same file."""


def _find_oddities(line: _TableLine) -> Iterator[str]:
    """Possible mistakes in a line."""
    if line.repeats:
        yield "it repeats an earlier line, so that its sample counts once more"
    if line.path != line.path.strip():
        yield "its path begins or ends with blanks, which belong to the file's name"
    if "\n" in line.path or "\r" in line.path:
        yield "its path holds a line break: a double quote may be missing"
    if "\\" in line.path:
        yield "its path holds a backslash, which separates no folders here; use /"
    if line.path.startswith("~"):
        yield "its path begins with ~, which is not replaced by the home folder"


def _name_lines(lines: Sequence[_TableLine]) -> str:
    return f"line {lines[0].number}" + (f" and {len(lines) - 1} more" if len(lines) > 1 else "")


def _find_media(path: str, members: dict[str, dict[str, Media]]) -> Media:
    """A file, or a member of a shard, whose index is kept in `members`."""
    shard = _find_shard(path, members)
    if not shard:
        return Media(path)
    member = path[len(shard) + 1 :]
    if shard not in members:
        members[shard] = {media.member: media for example in read_index(shard) for media in example.media}
    if member not in members[shard]:
        raise ValueError(f"shard {shard} has no media member {member!r}")
    return members[shard][member]


def _find_shard(path: str, known: Container[str]) -> str:
    """The shard in a path like shard.tar:member; empty when the path is that of a file."""
    prefixes = [path[:end] for end, character in enumerate(path) if character == ":"]
    if not prefixes:
        return ""
    found = next((prefix for prefix in prefixes if prefix in known), None)
    if found is None and not os.path.exists(path):
        found = next((prefix for prefix in prefixes if os.path.isfile(prefix)), None)
        found = found or next((prefix for prefix in prefixes if prefix.endswith(".tar")), None)
    return found or ""
