"""The schedules of PolyViT (arXiv 2111.12993, section 3.2), which plan the tasks of every step before step 0; and the learning rate."""

from __future__ import annotations

import difflib
import math
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyvit_fast.config import Schedule, StepPlan, Train
from polyvit_fast.randomness import key, permutation


def task_by_task(config: Train) -> StepPlan:
    """All U_j steps of one task, then all of the next; the order of the tasks is drawn by the seed."""
    order = permutation(len(config.tasks), config.seed, "task-by-task")
    return _build_plan(config, np.repeat(order, np.array(_list_steps(config))[order]))


def alternating(config: Train) -> StepPlan:
    """The tasks in turn, one step each, ΣU_j steps in all."""
    return _build_plan(config, np.resize(np.arange(len(config.tasks)), sum(_list_steps(config))))


def uniform(config: Train) -> StepPlan:
    """An equal number of steps for each task, ΣU_j in all (the first tasks get one more when it does not divide), permuted."""
    steps, rest = divmod(sum(_list_steps(config)), len(config.tasks))
    return _permute(config, [steps + (j < rest) for j in range(len(config.tasks))])


def weighted(config: Train) -> StepPlan:
    """Exactly U_j steps for task j, permuted by the seed: the paper's best."""
    return _permute(config, _list_steps(config))


def accumulating(config: Train) -> StepPlan:
    """Every update from the mean of all T tasks' gradients; ΣU_j / T updates, rounded down."""
    return [tuple(config.tasks)] * (sum(_list_steps(config)) // len(config.tasks))


SCHEDULES: dict[str, Schedule] = {
    "task-by-task": task_by_task,
    "alternating": alternating,
    "uniform": uniform,
    "weighted": weighted,
    "accumulating": accumulating,
}


def make_step_plan(config: Train, earlier: Sequence[Mapping[str, int]] = ()) -> StepPlan:
    """The tasks of every step. Raises ValueError for an unknown schedule, an empty plan or a plan with unknown tasks.

    `earlier` are the tasks' steps (U_j) that a run had before it was lengthened, once for each time. What was planned stays, and the
    schedule plans the additional steps of each lengthening by themselves.
    """
    before, parts = dict.fromkeys(config.tasks, 0), []
    for number, steps in enumerate([*earlier, count_planned(config)]):
        part = set_steps(config, {name: steps[name] - before[name] for name in config.tasks})
        if number:
            # Another seed, for the tasks of as many additional steps would come in the order of the first. Every generator takes 31 bits.
            object.__setattr__(part, "seed", key(config.seed, "lengthened", number) % 2**31)
        parts.append(_plan_part(part))
        before = steps
    return parts[0] if not earlier else [names for part in parts for names in part]


def count_planned(config: Train) -> dict[str, int]:
    """The steps that each task is to have, its U_j."""
    return {name: task.steps for name, task in config.tasks.items()}


def set_steps(config: Train, steps: Mapping[str, int]) -> Train:
    """The configuration with other steps of its tasks: those of a part of a run, in which a task may have none."""
    # Not by `replace`, which checks what a whole run must have.
    part = copy(config)
    tasks = {name: copy(task) for name, task in config.tasks.items()}
    for name, task in tasks.items():
        object.__setattr__(task, "steps", steps[name])
    object.__setattr__(part, "tasks", tasks)
    return part


def _plan_part(config: Train) -> StepPlan:
    if isinstance(config.schedule, str) and config.schedule not in SCHEDULES:
        close = difflib.get_close_matches(config.schedule, SCHEDULES, 1)
        hint = f"perhaps you meant {close[0]}" if close else f"there are: {', '.join(SCHEDULES)}"
        raise ValueError(f"schedule = {config.schedule!r} is unknown; {hint}")
    plan = SCHEDULES[config.schedule](config) if isinstance(config.schedule, str) else _call_own(config.schedule, config)
    if not plan:
        raise ValueError(f"schedule = {config.schedule!r} plans no step; give the tasks more steps")
    for names in _find_distinct_steps(plan):
        if not isinstance(names, tuple) or not names or not set(names) <= config.tasks.keys():
            step = plan.index(names)
            raise ValueError(f"schedule: step {step} is {names!r}; it must name tasks among {', '.join(config.tasks)}, as a tuple")
    return plan


def _call_own(schedule: Schedule, config: Train) -> list[Any]:
    """The plan of a function of the user's. Raises ValueError with the file and line where it fails."""
    name = getattr(schedule, "__name__", "of your own")
    try:
        plan = schedule(config)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        idle = ", ".join(name for name, task in config.tasks.items() if not task.steps)
        part = f" (in this part, by which the run is lengthened, there are no steps for {idle})" if idle else ""
        reason = f"{where.filename}, line {where.lineno}: {type(error).__name__}: {error}"
        raise ValueError(f"schedule {name} failed: {reason}{part}") from error
    if not isinstance(plan, list):
        raise ValueError(f"schedule {name} gave {plan!r}; it must give the tasks of every step, as a list of tuples of their names")
    return plan


def _find_distinct_steps(plan: list[Any]) -> Iterable[Any]:
    """Each distinct step once, in order of first appearance: few among millions. If there are lists, which are wrong, only those."""
    try:
        return dict.fromkeys(plan)
    except TypeError:
        return [names for names in plan if isinstance(names, list)]


def compute_warmup_steps(config: Train, num_steps: int) -> float:
    """Steps over which the rate rises in a plan of `num_steps`: the same fraction of them as `warmup_steps` is of ΣU_j."""
    return config.optim.warmup_steps * num_steps / sum(_list_steps(config))


def check_warmup(config: Train, num_steps: int) -> str | None:
    """What is wrong with a warm-up that leaves no step of a plan of `num_steps` to the cosine; None when nothing is."""
    warmup = compute_warmup_steps(config, num_steps)
    if warmup < num_steps or not any(task.lr_schedule == "run" for task in config.tasks.values()):
        return None
    return f"The warm-up of {warmup:,.0f} steps does not end within the run of {num_steps:,}: lower --optim.warmup-steps."


@dataclass(frozen=True)
class RateCurve:
    """A learning rate over so many steps, as a fraction of its peak."""

    num_steps: int
    warmup: float
    """Steps over which it rises, from 1 / warmup to 1."""
    falls: bool = True
    """Whether a cosine lowers it afterwards."""

    def find(self, step: int) -> tuple[float, float]:
        """The two factors at `step`: of the warm-up, and of the cosine. Neither the first nor the last step has a rate of 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        progress = min(1.0, max(0, step - self.warmup) / max(1, self.num_steps - self.warmup))
        return rise, 0.5 * (1 + math.cos(math.pi * progress)) if self.falls else 1.0


class LearningRates:
    """The learning rate of every step of a plan: `optim.lr` times the tasks' mean `lr_scale` times the fraction that a `RateCurve` gives.

    The curve is that of the run, or the task's own over its own steps. An update from several tasks has one rate for all of them, hence the
    mean, and the highest of their curves; `weigh` makes up for what is too much for the others. The original code's cosine restarts on the
    last step, this one does not.
    """

    def __init__(self, config: Train, plan: StepPlan) -> None:
        self.config, self.plan = config, plan
        self.of_run = RateCurve(len(plan), compute_warmup_steps(config, len(plan)))
        self.own: dict[str, tuple[np.ndarray, RateCurve]] = {}
        """For each task with a schedule of its own, its steps and its curve."""
        for name, task in config.tasks.items():
            if task.lr_schedule != "run":
                steps = np.flatnonzero(np.fromiter((name in names for names in plan), bool, len(plan)))
                warmup = task.warmup_steps * len(steps) / task.steps
                self.own[name] = steps, RateCurve(len(steps), warmup, task.lr_schedule == "cosine")

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[float]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, step: int) -> float:
        names = self.plan[step]
        rise, fall = max((self._find(name, step) for name in names), key=math.prod) if self.own else self.of_run.find(step)
        scale = sum(self.config.tasks[name].lr_scale for name in names) / len(names)
        return self.config.optim.lr * scale * rise * fall

    def weigh(self, step: int) -> tuple[float, ...]:
        """What to multiply the loss of each of the step's tasks by: what its own curve gives of the highest."""
        names = self.plan[step]
        if not self.own or len(names) == 1:
            return (1.0,) * len(names)
        fractions = [math.prod(self._find(name, step)) for name in names]
        return tuple(fraction / max(fractions) for fraction in fractions)

    def _find(self, name: str, step: int) -> tuple[float, float]:
        if name not in self.own:
            return self.of_run.find(step)
        steps, curve = self.own[name]
        return curve.find(int(np.searchsorted(steps, step)))


def count_steps(plan: Iterable[tuple[str, ...]]) -> Counter[str]:
    """How many minibatches each task has in these steps."""
    counts: Counter[str] = Counter()
    for names, times in Counter(plan).items():
        for name in names:
            counts[name] += times
    return counts


def _list_steps(config: Train) -> list[int]:
    return [task.steps for task in config.tasks.values()]


def _permute(config: Train, counts: list[int]) -> StepPlan:
    tasks = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    return _build_plan(config, tasks[permutation(len(tasks), config.seed, "schedule")])


def _build_plan(config: Train, tasks: np.ndarray) -> StepPlan:
    """The plan of one task per step, from the indices of the tasks. All steps of a task are one and the same tuple: eight bytes a step."""
    single = [(name,) for name in config.tasks]
    return list(map(single.__getitem__, tasks.data))
