"""The schedules of PolyViT (arXiv 2111.12993, section 3.2): the tasks of every step, known before step 0; and the learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from polyvit_fast.config import Plan, Schedule, Train
from polyvit_fast.randomness import permutation


def task_by_task(config: Train) -> Plan:
    """All U_j steps of one task, then all of the next; the order of the tasks is drawn by the seed."""
    names = list(config.tasks)
    order = permutation(len(names), config.seed, "task-by-task")
    return [(names[j],) for j in order for _ in range(config.tasks[names[j]].steps)]


def alternating(config: Train) -> Plan:
    """The tasks in turn, one step each, ΣU_j steps in all."""
    turns = [(name,) for name in config.tasks]
    return [turns[step % len(turns)] for step in range(_total(config))]


def uniform(config: Train) -> Plan:
    """An equal number of steps for each task, ΣU_j in all (the first tasks get one more when it does not divide), permuted."""
    share, rest = divmod(_total(config), len(config.tasks))
    return _permuted(config, [share + (j < rest) for j in range(len(config.tasks))])


def weighted(config: Train) -> Plan:
    """Exactly U_j steps for task j, permuted by the seed: the paper's best."""
    return _permuted(config, [task.steps for task in config.tasks.values()])


def accumulating(config: Train) -> Plan:
    """Every update from the mean of all T tasks' gradients; ΣU_j / T updates, rounded down."""
    return [tuple(config.tasks)] * (_total(config) // len(config.tasks))


SCHEDULES: dict[str, Schedule] = {
    "task-by-task": task_by_task,
    "alternating": alternating,
    "uniform": uniform,
    "weighted": weighted,
    "accumulating": accumulating,
}


def make_plan(config: Train) -> Plan:
    """The tasks of every step. Raises ValueError for an unknown schedule, an empty plan or a plan with unknown tasks."""
    if isinstance(config.schedule, str) and config.schedule not in SCHEDULES:
        raise ValueError(f"schedule = {config.schedule!r} is unknown; there are: {', '.join(SCHEDULES)}")
    plan = (SCHEDULES[config.schedule] if isinstance(config.schedule, str) else config.schedule)(config)
    if not plan:
        raise ValueError(f"schedule = {config.schedule!r} plans no step; give the tasks more steps")
    for step, names in enumerate(plan):
        if not names or not set(names) <= config.tasks.keys():
            raise ValueError(f"schedule: step {step} is {names!r}; it must name tasks among {', '.join(config.tasks)}")
    return plan


def learning_rate(config: Train, plan: Plan, step: int) -> float:
    """Rate of `step`: linear warm-up from 0, cosine to 0 without the restart of the original code, times the tasks' mean `lr_scale`.

    An update from several tasks has one rate for all of them, hence the mean.
    """
    warmup, total = config.optim.warmup_steps, len(plan)
    rise = min(1.0, step / warmup) if warmup else 1.0
    progress = min(1.0, max(0, step - warmup) / max(1, total - warmup))
    scale = sum(config.tasks[name].lr_scale for name in plan[step]) / len(plan[step])
    return config.optim.lr * scale * rise * 0.5 * (1 + math.cos(math.pi * progress))


def count_steps(plan: Iterable[tuple[str, ...]]) -> Counter[str]:
    """How many minibatches each task has in these steps."""
    counts: Counter[str] = Counter()
    for names, times in Counter(plan).items():
        for name in names:
            counts[name] += times
    return counts


def _total(config: Train) -> int:
    return sum(task.steps for task in config.tasks.values())


def _permuted(config: Train, counts: list[int]) -> Plan:
    single = [(name,) for name in config.tasks]
    tasks = np.repeat(np.arange(len(single)), counts)
    return [single[j] for j in tasks[permutation(len(tasks), config.seed, "schedule")].tolist()]
