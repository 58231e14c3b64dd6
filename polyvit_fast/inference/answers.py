"""What an evaluation answered, sample by sample: results of each class, who was taken for whom, and a table of all predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polyvit_fast.config import Task
from polyvit_fast.data.stream import Loader
from polyvit_fast.inference.tables import AddRows
from polyvit_fast.inference.trained_model import PROBABILITIES
from polyvit_fast.train.loss import Labels
from polyvit_fast.train.metrics import average_precisions

TOP = 5
ANSWER_COLUMNS: dict[str, type] = {"file": str, "task": str, "labels": str, "rank": int, "class": str, "probability": float}
"""As those of predictions, with the names of the file's classes, separated by semicolons."""


@dataclass(frozen=True)
class ClassResult:
    """How well a class is known. NaN where it has no file, or was never the answer."""

    name: str
    num_files: int
    recall: float
    """Fraction of its files that were taken for it; of several labels, with a probability of at least one half."""
    precision: float
    """Fraction of the files taken for it that are its own."""
    average_precision: float | None = None
    """Of tasks with several labels."""


@dataclass
class TaskAnswers:
    """The answers to one task's samples."""

    task: Task
    classes: tuple[str, ...]
    confusion: Int[Tensor, "classes classes"]
    """How many files of the class of the row were taken for that of the column; of several labels, the diagonal counts right answers."""
    answered: Int[Tensor, " classes"]
    """How many files were taken for each class."""
    present: Int[Tensor, " classes"]
    """How many files have each class."""
    several: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of several labels: the logits and labels of each batch, as their order takes all together."""

    @classmethod
    def begin(cls, task: Task, classes: Sequence[str] | None) -> TaskAnswers:
        """Without any answer yet."""
        count = task.num_classes
        names, per_class = tuple(classes or map(str, range(count))), torch.zeros(count, dtype=torch.int64)
        return cls(task, names, torch.diag(per_class), per_class.clone(), per_class)

    def add(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> None:
        """Count a batch."""
        if labels.is_floating_point():
            yes, has = logits > 0, labels > 0.5
            self.several.append((logits, labels))
            self.confusion += torch.diag((yes & has).sum(0))
        else:
            yes, has = (torch.nn.functional.one_hot(index, len(self.classes)) > 0 for index in (logits.argmax(1), labels))
            self.confusion += has.t().long() @ yes.long()
        self.answered += yes.sum(0)
        self.present += has.sum(0)

    def summarise(self) -> list[ClassResult]:
        """The results of each class."""
        right = self.confusion.diag().double()
        columns = [self.present.tolist(), (right / self.present).tolist(), (right / self.answered).tolist()]
        if self.several:
            precisions = average_precisions(*map(torch.cat, zip(*self.several, strict=True))).tolist()
            return [ClassResult(*row) for row in zip(self.classes, *columns, precisions, strict=True)]
        return [ClassResult(*row) for row in zip(self.classes, *columns, strict=True)]


class Answers:
    """Collects the answers of an evaluation: a call of it is the evaluation's `keep`.

    `open_table`, called for the first answer, gives the function that adds rows to a table with `ANSWER_COLUMNS`.
    """

    def __init__(self, open_table: Callable[[], AddRows] | None = None) -> None:
        self.tasks: dict[str, TaskAnswers] = {}
        self.open_table = open_table
        self.add_rows: AddRows | None = None

    def __call__(self, loader: Loader, indices: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        answers = self.tasks.setdefault(loader.name, TaskAnswers.begin(loader.task, loader.classes))
        if not len(logits):
            return
        answers.add(logits, labels)
        if self.open_table:
            self.add_rows = add_rows = self.add_rows or self.open_table()
            probabilities = PROBABILITIES[loader.task.loss](logits)
            order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :TOP].tolist()
            for index, numbers, values in zip(indices, order, probabilities.tolist(), strict=True):
                sample = loader.samples[index]
                names = ";".join(answers.classes[label] for label in sample.labels)
                begin = (sample.media.name, loader.name, names)
                add_rows((*begin, rank, answers.classes[number], values[number]) for rank, number in enumerate(numbers, 1))
