"""Labels as a cell of a table holds them: class numbers, or names where the task has a list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from polyvit_fast.data.sources.classes import normalise, shorten

NUMBER = re.compile("[0-9]{1,18}|-0*[1-9][0-9]{0,17}")
"""Integers; negative ones are read as well, so that the message can say that they are out of range."""


class LabelCells:
    """Reads cells: numbers or names, separated by ; or else by blanks, or a JSON list of them (["Speech; loud", "Music"]).

    A cell that is a name as a whole means that class, so names may contain blanks and semicolons.
    """

    def __init__(self, names: Sequence[str] | None, num_classes: int, classes: str = "") -> None:
        self.names, self.num_classes, self.classes = names, num_classes, classes
        self.index = {name: number for number, name in enumerate(names or ())}
        self.seen: dict[str, tuple[int, ...]] = {}

    def read(self, cell: str) -> tuple[int, ...]:
        """All class numbers in a cell. Raises ValueError for what is neither a number nor a name, or may be both."""
        if cell not in self.seen:
            self.seen[cell] = self._read(cell)
        return self.seen[cell]

    def _read(self, cell: str) -> tuple[int, ...]:
        if normalise(cell) in self.index:
            return (self._number(cell, cell),)
        parts = _json_list(cell)
        if parts is None:
            return tuple(self._number(part, cell) for part in _split(cell))
        return tuple(self._name(part, cell) if isinstance(part, str) else part for part in parts)

    def _number(self, part: str, cell: str) -> int:
        """The class that a word means, which may be a number or a name."""
        if self.classes or not NUMBER.fullmatch(part):
            return self._name(part, cell)
        number, named = int(part), self.index.get(normalise(part))
        if named is None or named == number:
            return number
        if not 0 <= number < self.num_classes:
            return named
        raise ValueError(
            f"label {part!r} may be a number, that of class {(self.names or ())[number]!r}, or the name of class number {named}; "
            f'set classes to a file that lists the names, or write ["{part}"] for the name and [{part}] for the number'
        )

    def _name(self, name: str, cell: str) -> int:
        number = self.index.get(normalise(name))
        if number is not None:
            return number
        if self.classes:
            raise ValueError(f"label {_brief(name)} is not among the {len(self.index)} names in {self.classes}")
        if self.names:
            listed = f"the task's {len(self.names)} classes ({shorten(self.names)})"
            raise ValueError(f"label {_brief(name)} is neither a number nor among {listed}")
        raise ValueError(f"label {_brief(cell)} is not a class number; to use names, set classes to a file that lists them")


def format_labels(labels: Sequence[int], names: Sequence[str] | None, num_classes: int) -> str:
    """A cell that `Manifest` reads as these labels, whether its `classes` is set or not: names where the task has a list of them."""
    if names is None:
        return " ".join(map(str, labels))
    words = [names[label] for label in labels]
    plain = ";".join(words)
    readers = (LabelCells(names, num_classes), LabelCells(names, num_classes, "classes"))
    try:
        if all(reader.read(plain) == tuple(labels) for reader in readers):
            return plain
    except ValueError:
        pass
    return json.dumps(words, ensure_ascii=False, allow_nan=False)


def format_classes(names: Sequence[str]) -> str:
    """The text of a file for `classes` of `Manifest`. Raises ValueError for a name that no line of it can hold."""
    odd = next((name for name in names if not name or "\n" in name or "\r" in name), None)
    if odd is not None:
        raise ValueError(f"class {odd!r}: a name that is empty or holds a line break cannot stand in a list of classes")
    return "".join(f"{name}\n" for name in names)


def _json_list(cell: str) -> list[str | int] | None:
    """The words and numbers of a cell that is a JSON list of them."""
    if not cell.startswith("["):
        return None
    try:
        parts = json.loads(cell, parse_int=_whole_number)
    except (ValueError, RecursionError):
        return None
    return parts if isinstance(parts, list) and all(type(part) in (str, int) for part in parts) else None


def _split(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(";") if part.strip()] if ";" in cell else cell.split()


def _whole_number(digits: str) -> int:
    if not NUMBER.fullmatch(digits):
        raise ValueError(f"{_brief(digits)} is not a class number")
    return int(digits)


def _brief(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."
