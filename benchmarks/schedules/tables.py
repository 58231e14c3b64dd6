"""The tables of docs/schedules.md, as Markdown, from the runs' results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from conditions import OWN_COSINES
from intervals import Difference, average, compare
from results import RunResult

SINGLE = "a model for each task"
MAIN = ("task-by-task", OWN_COSINES, "alternating", "uniform", "weighted", "accumulating")
BASELINE = "weighted"
KNOBS = {
    "absent parameters, AdamW": ("weighted", "weighted, adamw, coast", "rest", "coast"),
    "absent parameters, SGD": ("weighted, sgd, rest", "weighted, sgd, coast", "rest", "coast"),
    "accumulating, AdamW": ("accumulating", "accumulating, adamw, sum", "mean", "sum"),
    "accumulating, SGD": ("accumulating, sgd, mean", "accumulating, sgd, sum", "mean", "sum"),
}
"""The two conditions of each knob, and what its two settings are called."""


@dataclass(frozen=True)
class StageResults:
    """The results of a form, by stage."""

    sweep: list[RunResult]
    table: list[RunResult]
    knobs: list[RunResult]
    transfer: list[RunResult]

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the experiment's order."""
        longest = max(self.table or self.sweep, key=lambda result: len(result.run["steps"]))
        return list(longest.run["steps"])

    def select(self, condition: str, task: str, seeds: Iterable[int] = ()) -> dict[int, RunResult]:
        """The runs by seed whose test answers count for a condition and a task. A model for each task is that task's own."""
        wanted = f"{task if task != 'speakers' else 'language'} alone" if condition == SINGLE else condition
        seeds = set(seeds)
        found = {r.run["seed"]: r for r in (*self.table, *self.knobs) if r.condition == wanted and task in r.test}
        return {seed: found[seed] for seed in sorted(found) if not seeds or seed in seeds}

    def find_difference(self, condition: str, other: str, task: str) -> Difference | None:
        """Of the two conditions' runs with the same seeds; None: there are none."""
        ours, theirs = self.select(condition, task), self.select(other, task)
        both = [seed for seed in ours if seed in theirs]
        if not both:
            return None
        return compare(task, [ours[seed].test[task] for seed in both], [theirs[seed].test[task] for seed in both])

    def list_conditions(self) -> list[str]:
        """The lines of the main table that have results for every task."""
        return [name for name in (*MAIN, SINGLE) if all(self.select(name, task) for task in self.tasks)]


def build_tables(results: StageResults) -> dict[str, str]:
    """All tables that there are results for, by name."""
    builders: dict[str, Callable[[StageResults], str]] = {
        "data": describe_tasks,
        "rates": describe_rates,
        "main": describe_main,
        "differences": describe_differences,
        "cost": describe_cost,
        "forgetting": describe_forgetting,
        "knobs": describe_knobs,
        "transfer": describe_transfer,
        "speakers": describe_speakers,
    }
    return {name: text for name, build in builders.items() if (text := build(results))}


def describe_main(results: StageResults) -> str:
    """The mean test metric of each condition on each task, in percent, with the standard deviation over seeds."""
    rows = []
    for condition in results.list_conditions():
        values = {task: [run.test[task]["metric"] for run in results.select(condition, task).values()] for task in results.tasks}
        cells = [_mean_and_std(values[task]) for task in results.tasks]
        rows.append([condition, *cells, f"{100 * np.mean([np.mean(one) for one in values.values()]):.1f}"])
    return _table(["test", *results.tasks, "mean"], rows)


def describe_differences(results: StageResults) -> str:
    """What each condition has more than the weighted schedule, in points, with 95 % intervals; bold where they leave out 0."""
    rows = []
    for condition in results.list_conditions():
        found = [results.find_difference(condition, BASELINE, task) for task in results.tasks] if condition != BASELINE else []
        known = [one for one in found if one is not None]
        if known and len(known) == len(results.tasks):
            rows.append([condition, *map(format_difference, known), format_difference(average(known))])
    return _table([f"minus {BASELINE}", *results.tasks, "mean"], rows)


def describe_cost(results: StageResults) -> str:
    """What each condition trains and costs."""
    rows = []
    for condition in results.list_conditions():
        wanted = [f"{task} alone" for task in results.tasks] if condition == SINGLE else [condition]
        groups = [[run for run in results.table if run.condition == name] for name in wanted]
        first = [group[0].run for group in groups]
        seconds = sum(np.mean([run.run["seconds"] for run in group]) for group in groups)
        updates = sum(run["updates"] for run in first)
        minibatches = sum(sum(run["minibatches"].values()) for run in first)
        sizes, flops = sum(run["parameters"] for run in first), sum(run["flops"] for run in first)
        rows.append([condition, f"{sizes:,}", f"{minibatches:,}", f"{updates:,}", f"{flops / 1e12:.3f}", f"{seconds / 60:.1f}"])
    return _table(["", "parameters", "minibatches", "updates", "TFLOP", "minutes on one core"], rows)


def describe_tasks(results: StageResults) -> str:
    """Each task's steps, and the files that were tested."""
    rows = []
    for task in results.tasks:
        run = next(result for result in (*results.table, *results.sweep) if task in result.run["steps"])
        answers = run.test.get(task, {})
        num_files = len(answers.get("right", answers.get("labels", "")))
        rows.append([task, f"{run.run['steps'][task]:,}", f"{num_files:,}" if num_files else "", run.run["data"][task]])
    return _table(["task", "steps (U_j)", "test files", "digest of the files"], rows)


def describe_rates(results: StageResults) -> str:
    """The mean metric on val of each peak learning rate; the best is bold."""
    scores: dict[str, dict[float, float]] = defaultdict(dict)
    for result in results.sweep:
        scores[result.condition][result.run["rate"]] = result.score
    rows = []
    for condition, found in scores.items():
        best = max(found.values())
        cells = [
            f"{rate:g}: **{100 * score:.1f}**" if score == best else f"{rate:g}: {100 * score:.1f}" for rate, score in sorted(found.items())
        ]
        rows.append([condition, ", ".join(cells)])
    return _table(["condition", "peak rate: mean of the tasks' metrics on val, in percent"], rows)


def describe_forgetting(results: StageResults) -> str:
    """How well task-by-task knows a task on val right after its steps, and at the end, by how many tasks came later."""
    rows = []
    for condition in ("task-by-task", OWN_COSINES):
        kept: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in (run for run in results.table if run.condition == condition):
            phases = list_phases(run)
            for later, (task, end) in enumerate(reversed(phases)):
                kept[later].append((run.val[end][task], run.val[max(run.val)][task]))
        if kept:
            cells = [f"{100 * np.mean([b for b, _ in kept[k]]):.1f} → {100 * np.mean([a for _, a in kept[k]]):.1f}" for k in sorted(kept)]
            rows.append([condition, *cells])
    return _table(["tasks after it", *map(str, range(len(results.tasks)))], rows)


def list_phases(run: RunResult) -> list[tuple[str, int]]:
    """The tasks of a task-by-task run in their order, each with the step after its last."""
    from conditions import FORMS, Condition, RunSpec, build_config

    from polyvit_fast.train.schedule import make_step_plan

    spec = RunSpec("table", Condition(run.condition, "task-by-task"), run.run["seed"], run.run["rate"])
    plan = make_step_plan(build_config(spec, FORMS[run.run["form"]], "cpu"))
    order = list(dict.fromkeys(name for (name,) in plan))
    ends = np.cumsum([run.run["minibatches"][name] for name in order])
    return list(zip(order, map(int, ends), strict=True))


def describe_knobs(results: StageResults) -> str:
    """The second setting of each knob minus its first."""
    rows = []
    for name, (first, second, ours, theirs) in KNOBS.items():
        found = [results.find_difference(second, first, task) for task in results.tasks]
        known = [one for one in found if one is not None]
        if known and len(known) == len(results.tasks):
            shared = results.select(second, results.tasks[0])
            means = [_grand_mean(results, condition, shared) for condition in (first, second)]
            cells = [f"{100 * means[0]:.1f}", f"{100 * means[1]:.1f}", format_difference(average(known))]
            rows.append([f"{name}: {theirs} instead of {ours}", *cells, *map(format_difference, known)])
    return _table(["", "mean before", "mean after", "difference", *results.tasks], rows)


def _grand_mean(results: StageResults, condition: str, seeds: Iterable[int]) -> float:
    return float(
        np.mean([np.mean([r.test[task]["metric"] for r in results.select(condition, task, seeds).values()]) for task in results.tasks])
    )


def describe_transfer(results: StageResults) -> str:
    """Heads on frozen trunks, on the tasks that are held out: mean over seeds and standard deviation."""
    values: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in (*results.table, *results.transfer):
        for line in run.probes:
            values[line["trunk"]][line["task"], line["head"]].append(line["metric"])
    if not values:
        return ""
    columns = sorted({key for found in values.values() for key in found}, key=lambda key: (key[0], key[1] != "linear"))
    names = {
        "weighted": "all eight tasks",
        "images alone": "pictures",
        "videos alone": "clips",
        "sounds alone": "sounds",
        "random": "random",
    }
    rows = [[names[trunk], *(_mean_and_std(values[trunk][key]) for key in columns)] for trunk in names if trunk in values]
    return _table(["trunk trained on", *(f"{task}, {head}" for task, head in columns)], rows)


def describe_speakers(results: StageResults) -> str:
    """Language of the speakers of training, and of others."""
    rows = []
    for condition in (*MAIN, SINGLE):
        known, others = (results.select(condition, task) for task in ("language", "speakers"))
        if known and others:
            means = [
                _mean_and_std([run.test[t]["metric"] for run in runs.values()]) for t, runs in (("language", known), ("speakers", others))
            ]
            found = results.find_difference(condition, BASELINE, "speakers") if condition != BASELINE else None
            rows.append([condition, *means, format_difference(found) if found else ""])
    return _table(["", "speakers of training", "other speakers", f"other speakers, minus {BASELINE}"], rows)


def format_difference(difference: Difference) -> str:
    """In points, with its interval; bold where that leaves out 0."""
    low, high = difference.interval
    text = f"{100 * difference.value:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"**{text}**" if difference.is_clear else text


def _mean_and_std(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def insert_tables(text: str, tables: Mapping[str, str]) -> str:
    """A document with each table between its two comments `<!-- table NAME -->` and `<!-- end -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
        before, found, rest = text.partition(begin)
        if found:
            text = before + begin + table + end + rest.partition(end)[2]
    return text
