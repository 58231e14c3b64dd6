"""Planning ten million steps over a hundred tasks, and what each step then costs, against drawing tasks from their weights.

Run: pytest benchmarks/bench_schedule.py. Plans are checked before they are timed: each task has exactly its steps, as in numpy's shuffle.
Where tasks are drawn, all ahead or one at a time, the counts only come near. Ours is the same list with every version of every library.
"""

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from polyvit_fast.config import Plan, Train
from polyvit_fast.experiments import smoke
from polyvit_fast.train.schedule import SCHEDULES, count_steps, learning_rate, make_step_plan

OURS, SHUFFLE, NUMPY, PYTHON = "ours", "numpy shuffle", "numpy choice", "random.choices"
SAMPLER, MULTINOMIAL = "WeightedRandomSampler", "torch.multinomial"
NUM_TASKS, NUM_STEPS = 100, 10_000_000
WEIGHTS = NUM_STEPS // NUM_TASKS + 900 * (np.arange(NUM_TASKS) - NUM_TASKS // 2) + 450  # steps of the tasks: 55,450 to 144,550
CHANCES = WEIGHTS / WEIGHTS.sum()
PICKS = range(1000)  # steps in a call


def config_of(schedule: str) -> Train:
    tasks = {f"task{index}": replace(smoke.config.tasks["pictures"], steps=int(steps)) for index, steps in enumerate(WEIGHTS)}
    return replace(smoke.config, tasks=tasks, schedule=schedule, optim=replace(smoke.config.optim, warmup_steps=10_000))


@cache
def weighted_plan() -> Plan:
    return make_step_plan(config_of("weighted"))


def traced(run: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, and the memory that it takes at most and that its result keeps."""
    tracemalloc.start()
    result = run()
    now, peak = (size / 2**20 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    return result, f"at most {peak:.0f} MiB, of which {now:.0f} stay"


def time_rate(benchmark, group: str, contender: str, run: Callable[[], object], amount: int, *, rounds: int, note: str = "") -> None:
    benchmark.group = group
    benchmark.extra_info.update(contender=contender, amount=amount, unit="steps", note=note)
    benchmark.pedantic(run, rounds=rounds, iterations=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plan(benchmark, schedule):
    config = config_of(schedule)
    plan, note = traced(lambda: make_step_plan(config))
    even = [NUM_STEPS // NUM_TASKS] * NUM_TASKS
    expected = WEIGHTS.tolist() if schedule in ("weighted", "task-by-task") else even
    assert count_steps(plan) == dict(zip(config.tasks, expected, strict=True))
    time_rate(benchmark, f"plan, {schedule}", OURS, lambda: make_step_plan(config), len(plan), rounds=2, note=note)


def shuffled_by_numpy() -> list[int]:
    """As exact as ours."""
    tasks = np.repeat(np.arange(NUM_TASKS, dtype=np.uint8), WEIGHTS)
    np.random.default_rng(0).shuffle(tasks)
    return tasks.tolist()


def drawn_by_numpy() -> list[int]:
    return np.random.default_rng(0).choice(NUM_TASKS, NUM_STEPS, p=CHANCES).tolist()


def drawn_by_python() -> list[int]:
    return random.Random(0).choices(range(NUM_TASKS), WEIGHTS.tolist(), k=NUM_STEPS)


def drawn_by_sampler() -> list[int]:
    return list(WeightedRandomSampler(WEIGHTS.tolist(), NUM_STEPS, generator=torch.Generator().manual_seed(0)))


DRAWS = {SHUFFLE: shuffled_by_numpy, NUMPY: drawn_by_numpy, PYTHON: drawn_by_python, SAMPLER: drawn_by_sampler}


@pytest.mark.parametrize("name", DRAWS)
def test_draw_ahead(benchmark, name):
    tasks, note = traced(DRAWS[name])
    counts = np.bincount(tasks, minlength=NUM_TASKS)
    assert abs(counts / WEIGHTS - 1).max() <= (0 if name == SHUFFLE else 0.05)
    time_rate(benchmark, "plan, weighted", name, DRAWS[name], NUM_STEPS, rounds=2, note=note)


def look_up() -> Callable[[], object]:
    plan = weighted_plan()
    return lambda: [plan[step] for step in PICKS]


def choose_by_numpy() -> Callable[[], object]:
    generator = np.random.default_rng(0)
    return lambda: [generator.choice(NUM_TASKS, p=CHANCES) for _ in PICKS]


def choose_by_python() -> Callable[[], object]:
    generator, sums = random.Random(0), np.cumsum(WEIGHTS).tolist()
    return lambda: [generator.choices(range(NUM_TASKS), cum_weights=sums)[0] for _ in PICKS]


def choose_by_torch() -> Callable[[], object]:
    weights = torch.from_numpy(CHANCES)
    return lambda: [torch.multinomial(weights, 1).item() for _ in PICKS]


@pytest.mark.parametrize(
    ("name", "prepare"), [(OURS, look_up), (NUMPY, choose_by_numpy), (PYTHON, choose_by_python), (MULTINOMIAL, choose_by_torch)]
)
def test_task_of_a_step(benchmark, name, prepare):
    time_rate(benchmark, "task of a step", name, prepare(), len(PICKS), rounds=50)


@pytest.mark.parametrize("schedule", ["weighted", "accumulating"])
def test_task_and_rate_of_a_step(benchmark, schedule):
    config, plan = config_of(schedule), weighted_plan() if schedule == "weighted" else make_step_plan(config_of(schedule))

    def run() -> list[float]:
        return [learning_rate(config, plan, step) for step in PICKS]

    assert run()[0] == 0 < run()[-1]
    time_rate(benchmark, f"learning rate, {schedule}", OURS, run, len(PICKS), rounds=50)


def test_counts_at_resume(benchmark):
    plan = weighted_plan()
    done = NUM_STEPS // 2
    assert count_steps(plan[:done]).total() == done
    time_rate(benchmark, "count half at resume", OURS, lambda: count_steps(plan[:done]), done, rounds=5)
