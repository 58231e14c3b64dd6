"""The classes of a task: one list of names for all its splits and sources, and labels that lie in it."""

from __future__ import annotations

from collections.abc import Sequence

from polyvit_fast.config import Task


def check_labels(labels: Sequence[int], task: Task, where: str) -> None:
    """Raise ValueError, beginning with `where`, when a sample's labels are not classes of the task, or not as many as it allows.

    `labels` are as the source has them: a class that is named twice is no list of classes, but most likely flags, one for each class.
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
