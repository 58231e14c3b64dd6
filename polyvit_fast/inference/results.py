"""What a trained model gives back: predictions that print as a table, features, and the inputs that were skipped."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from polyvit_fast.media import printable


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
        """A line for each input, with its classes side by side."""
        from polyvit_fast.train.output.table import build_table

        count = max((len(row.classes) for row in self.rows), default=0)
        headers = [self.task, "second", "third"][:count] + [f"{number}th" for number in range(4, count + 1)]
        table = build_table(["input", *headers], [])
        for row in self.rows:
            cells = [f"{name} {probability:.1%}" for name, probability in zip(row.classes, row.probabilities, strict=True)]
            table.add_row(printable(row.name), *cells)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, no_color=True, force_terminal=False)
        if self.rows:
            console.print(self.build_table(), markup=False)
        for one in self.skipped:
            console.print(f"skipped {printable(one.name)}: {one.reason}", markup=False, highlight=False, soft_wrap=True)
        return text.getvalue().rstrip("\n") or "no input"


@dataclass(frozen=True)
class Features:
    """Features of the inputs, in their order."""

    tensor: Float[Tensor, "inputs dim"] | Float[Tensor, "inputs views tokens dim"]
    """On the CPU, float32."""
    names: list[str]
    """Path of each file, or input, input[0], … where it has none."""
    skipped: list[Skipped] = field(default_factory=list)
    """Broken inputs, which are not in the tensor."""
