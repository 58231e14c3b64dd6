"""Three tasks that `schedules` does not train, to probe what its trunks know: spoken letters, drums, the arrow of time.

Files: python -m polyvit_fast.experiments.schedules_data
Command: polyvit-fast train schedules_transfer, or on a frozen trunk:
    polyvit-fast probe runs/schedules --experiment schedules_transfer --random
Cost: about a minute on two CPU cores for either.
Result: docs/schedules.md has those of trunks that were trained on one modality, on all, and of random ones.
"""

from dataclasses import replace

from polyvit_fast.config import Task, Train
from polyvit_fast.experiments import schedules


def _held_out(name: str, like: str, num_classes: int) -> Task:
    """A task that is evaluated on its test files: a head that is probed is chosen on training files alone."""
    modality = schedules.config.tasks[like].modality
    task = schedules.task(name, modality, num_classes, steps=200)
    assert task.test is not None
    return replace(task, val=task.test, test=None)


config = Train(
    tasks={
        "letters": _held_out("letters", "language", 26),
        "drums": _held_out("drums", "language", 6),
        "arrow": _held_out("arrow", "camera", 2),
    },
    model=schedules.config.model,
    optim=schedules.config.optim,
)
