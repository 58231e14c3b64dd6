"""The classes of a task: one list of names for all its splits and sources, and the check that labels belong to it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from polyvit_fast.config import Source, Task
from polyvit_fast.media import Sample


def class_list(task: Task, source: Source | None = None) -> tuple[str, ...] | None:
    """The names of the task's classes in the order of their numbers, one list for all its splits; None where no source knows names.

    It is the training source's list, else the validation source's, else that of `source`. The other sources may lack classes. Raises
    ValueError when one has an additional name, when two names differ only in their Unicode form, or when there are not `num_classes`.
    Names are in Unicode's composed form (NFC), without blanks at their ends.
    """
    decisive, names, known = None, (), frozenset[str]()
    for one in _distinct(task.train, task.val, source):
        own = _own_names(one, task)
        if own is None:
            continue
        if decisive is None:
            decisive, names, known = one, own, frozenset(own)
            if len(names) != task.num_classes:
                raise ValueError(f"{one.describe_classes(names)} where num_classes = {task.num_classes}")
        other = next((name for name in own if name not in known), None)
        if other is not None:
            alike = next((f", which has {name!r}" for name in names if name.casefold() == other.casefold()), "")
            raise ValueError(
                f"{one.describe_classes(own)}, but {other!r} is not in the task's list{alike}: {decisive.describe_classes(names)}. "
                "Classes are identified by their names: the training split must have all of them, with the same spelling in every split"
            )
    return names if decisive else None


def remark_uncompared(task: Task, source: Source, names: Sequence[str]) -> list[str]:
    """A remark where only this source knows `names`, so that nothing shows whether the training split has the same numbers."""
    if source == task.train or source != task.val or task.train.class_names(task) is not None:
        return []
    order = ", ".join(f"{number} is {name}" for number, name in enumerate(names[:3])) + (", …" if len(names) > 3 else "")
    return [f"class numbers of the training split were compared with no names; {source.describe_classes(names)} sets their order: {order}"]


def _distinct(*sources: Source | None) -> list[Source]:
    found: list[Source] = []
    for source in sources:
        if source is not None and source not in found:
            found.append(source)
    return found


def _own_names(source: Source, task: Task) -> tuple[str, ...] | None:
    names = source.class_names(task)
    if names is None:
        return None
    normalised = tuple(map(normalise, names))
    alike = next((name for name, count in Counter(normalised).items() if count > 1), None)
    if alike is not None:
        forms = " and ".join(ascii(name) for name in names if normalise(name) == alike)
        raise ValueError(f"{source.describe_classes(names)}, but {forms} are one name to Unicode (NFC): give each class a name of its own")
    return normalised


def normalise(name: str) -> str:
    """A class name in the form in which names are compared."""
    return unicodedata.normalize("NFC", name).strip()


def shorten(names: Sequence[str]) -> str:
    """The first three names, for messages."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def first_difference(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    """The first difference between a checkpoint's class list and today's; empty when there is none, or the checkpoint had no names."""
    if before is None or tuple(before) == now:
        return ""
    if now is None:
        return f"its classes had names ({shorten(before)}) and have none now"
    if len(before) != len(now):
        return f"it had {len(before)} classes and has {len(now)} now"
    number = next(number for number, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1])
    return f"class {number} was {before[number]!r} and is {now[number]!r} now"


def recall_classes(task: Task, names: Sequence[str] | None, where: str) -> Task:
    """The task with the class list that is stored at `where`. Its training source is not read, and need not exist any more."""
    return replace(task, train=_StoredClasses(names=None if names is None else tuple(names), where=where))


@dataclass(frozen=True, kw_only=True)
class _StoredClasses(Source):
    """Class names without samples."""

    names: tuple[str, ...] | None
    where: str

    def samples(self, task: Task) -> Sequence[Sample]:
        return []

    def class_names(self, task: Task) -> tuple[str, ...] | None:
        return self.names

    def describe_classes(self, names: Sequence[str]) -> str:
        return f"{self.where}: it was trained on {len(names)} classes ({shorten(names)})"


def check_labels(labels: Sequence[int], task: Task, where: str) -> None:
    """Raise ValueError, beginning with `where`, when a sample's labels are not classes of the task, or not as many as it allows.

    `labels` are as the source has them: where a class is named twice, they are most likely not classes but flags, one for each class.
    """
    for label in labels:
        if not 0 <= label < task.num_classes:
            raise ValueError(f"{where}: label {label} is out of range; num_classes = {task.num_classes} allows 0 to {task.num_classes - 1}")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if list(labels).count(label) > 1)
        raise ValueError(f"{where}: class {twice} is named twice among {len(labels)} labels; list each class once (0/1 flags are not read)")
    if not task.multi_label and not labels:
        raise ValueError(f"{where}: it has no label")
    if not task.multi_label and len(labels) > 1:
        raise ValueError(f"{where}: {len(labels)} labels where the task has one per sample; set multi_label = True to allow several")
