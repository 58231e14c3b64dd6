"""What a trained model gives back: predictions that print as a table, features, and the inputs that were skipped."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from polyvit_fast.media import printable
from polyvit_fast.train.output.table import build_table


@dataclass(frozen=True)
class Skipped:
    """An input that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one input, the first of them first."""

    name: str
    """Path of the file, or input, input[0], … where it has none."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """The predictions of a task, in the order of the inputs. `print` shows them as a table."""

    task: str
    rows: list[Prediction]
    skipped: list[Skipped] = field(default_factory=list)
    """Broken inputs, which are not among the rows."""

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def build_table(self) -> Table:
        """A line for each input: its most probable class, and the others after it."""
        folder = _find_folder([row.name for row in self.rows])
        table = build_table(["input", self.task], [""], title=f"in {printable(folder)}" if folder else "")
        if any(len(row.classes) > 1 for row in self.rows):
            table.add_column("then")
        for row in self.rows:
            (first, *others), (probability, *less) = row.classes, row.probabilities
            then = ", ".join(f"{name} {value:.1%}" for name, value in zip(others, less, strict=True))
            name = os.path.relpath(row.name, folder) if folder else row.name
            table.add_row(printable(name), first, f"{probability:.1%}", *([then] if others else []))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, no_color=True, force_terminal=False)
        if self.rows:
            console.print(self.build_table())
        for one in self.skipped:
            console.print(f"skipped {printable(one.name)}: {one.reason}", markup=False, highlight=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) or "no inputs"


def _find_folder(names: Sequence[str]) -> str:
    """The folder that all of several files are in, which a table then names once; empty where there is none."""
    folders = {os.path.dirname(name) for name in names}
    return os.path.commonpath(folders) if len(names) > 1 and all(folders) else ""


@dataclass(frozen=True)
class Features:
    """Features of the inputs, in their order."""

    tensor: Float[Tensor, "inputs dim"] | Float[Tensor, "inputs views tokens dim"]
    """On the CPU, float32."""
    names: list[str]
    """Path of each file, or input, input[0], … where it has none."""
    skipped: list[Skipped] = field(default_factory=list)
    """Broken inputs, which are not in the tensor."""
