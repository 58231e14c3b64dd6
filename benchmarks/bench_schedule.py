"""Planning ten million steps over a hundred tasks, and what each step then costs, against drawing tasks from their weights.

Run: pytest benchmarks/bench_schedule.py. Plans are checked before they are timed: each task has exactly its steps, as in numpy's shuffle.
Where tasks are drawn, all ahead or one at a time, the counts only come near. Ours is the same list with every version of every library.
"""

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import machine
import numpy as np
import pytest
import torch
from harness import OURS, Group, Run, Runner, candidate_params, time_on_host
from torch.utils.data import WeightedRandomSampler

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.experiments import smoke
from polyvit_fast.train.schedule import SCHEDULES, LearningRates, count_steps, make_step_plan

SHUFFLE, NUMPY, PYTHON = "numpy shuffle", "numpy choice", "random.choices"
SAMPLER, MULTINOMIAL = "WeightedRandomSampler", "torch.multinomial"
NUM_TASKS, MEAN_STEPS = 100, 2_000 if machine.IS_TINY else 100_000
WEIGHTS = MEAN_STEPS + MEAN_STEPS * 9 // 1000 * (np.arange(NUM_TASKS) - NUM_TASKS // 2) + MEAN_STEPS * 9 // 2000  # steps of the tasks
NUM_STEPS = int(WEIGHTS.sum())
PROBABILITIES = WEIGHTS / NUM_STEPS
STEPS_OF_A_CALL = range(1000)


def config_of(schedule: str) -> Train:
    tasks = {f"task{index}": replace(smoke.config.tasks["pictures"], steps=int(steps)) for index, steps in enumerate(WEIGHTS)}
    optim = replace(smoke.config.optim, warmup_steps=NUM_STEPS // 1000)
    return replace(smoke.config, tasks=tasks, schedule=schedule, optim=optim)


@cache
def weighted_plan() -> StepPlan:
    return make_step_plan(config_of("weighted"))


def group_of(title: str, candidates: dict[str, Callable[[], Runner]], amount: int, turns: tuple[int, int]) -> Group:
    return Group(title=title, amount=amount, unit="steps", candidates=candidates, timer=time_on_host, turns=turns)


def planner(schedule: str) -> Runner:
    """Ours, which gives each task its steps: with the weights, or as many as the others."""
    config = config_of(schedule)
    expected = WEIGHTS.tolist() if schedule in ("weighted", "task-by-task") else [MEAN_STEPS] * NUM_TASKS
    return traced(partial(make_step_plan, config), lambda plan: count_steps(plan) == dict(zip(config.tasks, expected, strict=True)))


def drawer(draw: Callable[[], list[int]], tolerance: float) -> Runner:
    """Another way to choose all tasks ahead, whose counts come near the weights."""
    return traced(draw, lambda tasks: abs(np.bincount(tasks, minlength=NUM_TASKS) / WEIGHTS - 1).max() <= tolerance)


def traced(run: Run, is_right: Callable[..., bool]) -> Runner:
    """A way to plan, with the memory that it takes at most and that its result keeps."""
    tracemalloc.start()
    result = run()
    now, peak = (size / 2**20 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert is_right(result)
    return Runner(run=run, describe=lambda _: {"note": f"at most {peak:.0f} MiB, of which {now:.0f} stay"})


def shuffle_by_numpy() -> list[int]:
    """As exact as ours."""
    tasks = np.repeat(np.arange(NUM_TASKS, dtype=np.uint8), WEIGHTS)
    np.random.default_rng(0).shuffle(tasks)
    return tasks.tolist()


def draw_by_numpy() -> list[int]:
    return np.random.default_rng(0).choice(NUM_TASKS, NUM_STEPS, p=PROBABILITIES).tolist()


def draw_by_python() -> list[int]:
    return random.Random(0).choices(range(NUM_TASKS), WEIGHTS.tolist(), k=NUM_STEPS)


def draw_by_sampler() -> list[int]:
    return list(WeightedRandomSampler(WEIGHTS.tolist(), NUM_STEPS, generator=torch.Generator().manual_seed(0)))


NEAR = 0.5 if machine.IS_TINY else 0.05
PLANS: dict[str, dict[str, Callable[[], Runner]]] = {f"plan, {schedule}": {OURS: partial(planner, schedule)} for schedule in SCHEDULES}
PLANS["plan, weighted"] |= {
    SHUFFLE: partial(drawer, shuffle_by_numpy, 0),
    NUMPY: partial(drawer, draw_by_numpy, NEAR),
    PYTHON: partial(drawer, draw_by_python, NEAR),
    SAMPLER: partial(drawer, draw_by_sampler, NEAR),
}


def look_up() -> Runner:
    plan = weighted_plan()
    return Runner(run=lambda: [plan[step] for step in STEPS_OF_A_CALL])


def choose_by_numpy() -> Runner:
    generator = np.random.default_rng(0)
    return Runner(run=lambda: [generator.choice(NUM_TASKS, p=PROBABILITIES) for _ in STEPS_OF_A_CALL])


def choose_by_python() -> Runner:
    generator, sums = random.Random(0), np.cumsum(WEIGHTS).tolist()
    return Runner(run=lambda: [generator.choices(range(NUM_TASKS), cum_weights=sums)[0] for _ in STEPS_OF_A_CALL])


def choose_by_torch() -> Runner:
    weights = torch.from_numpy(PROBABILITIES)
    return Runner(run=lambda: [torch.multinomial(weights, 1).item() for _ in STEPS_OF_A_CALL])


def rate(schedule: str) -> Runner:
    """The learning rates of steps at the warm-up's start."""
    config, plan = config_of(schedule), weighted_plan() if schedule == "weighted" else make_step_plan(config_of(schedule))
    rates = LearningRates(config, plan)

    def run() -> list[float]:
        return [rates[step] for step in STEPS_OF_A_CALL]

    assert 0 < run()[0] < run()[-1]
    return Runner(run=run)


def recount() -> Runner:
    plan, done = weighted_plan(), NUM_STEPS // 2
    assert count_steps(plan[:done]).total() == done
    return Runner(run=lambda: count_steps(plan[:done]))


STEPS: dict[str, dict[str, Callable[[], Runner]]] = {
    "task of a step": {OURS: look_up, NUMPY: choose_by_numpy, PYTHON: choose_by_python, MULTINOMIAL: choose_by_torch},
    **{f"learning rate, {schedule}": {OURS: partial(rate, schedule)} for schedule in ("weighted", "accumulating")},
}
CASES = {
    **{title: (PLANS[title], MEAN_STEPS if "accumulating" in title else NUM_STEPS, (2, 1)) for title in PLANS},
    **{title: (STEPS[title], len(STEPS_OF_A_CALL), (1, 1) if machine.IS_TINY else (10, 5)) for title in STEPS},
    "count half at resume": ({OURS: recount}, NUM_STEPS // 2, (5, 1)),
}
GROUPS = {title: (partial(group_of, title, *CASES[title]), list(CASES[title][0])) for title in CASES}


@pytest.mark.parametrize(("group", "candidate"), candidate_params(GROUPS), indirect=["group"])
def test_schedule(group, candidate, benchmark):
    group.enter(candidate, benchmark)
