"""The figures of docs/schedules.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conditions import OWN_COSINES
from tables import BASELINE, MAIN, SINGLE, StageResults, list_phases

from polyvit_fast.train.output.colours import task_colour


def draw_all(results: StageResults, folder: Path) -> list[Path]:
    """Draw what there are results for; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, draw in {"differences.png": draw_differences, "forgetting.png": draw_forgetting}.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            drawn.append(folder / name)
    return drawn


def draw_differences(results: StageResults):
    """For each task, what each condition has more than the weighted schedule, with its interval."""
    from matplotlib.figure import Figure

    conditions = [name for name in (*MAIN, SINGLE) if name != BASELINE and name in results.list_conditions()]
    if not conditions:
        return None
    figure = Figure(figsize=(11, 0.45 * len(conditions) * 2 + 1.6), layout="constrained")
    axes = figure.subplots(2, -(-len(results.tasks) // 2), sharey=True).flatten()
    for index, (task, axis) in enumerate(zip(results.tasks, axes, strict=False)):
        for row, condition in enumerate(reversed(conditions)):
            difference = results.find_difference(condition, BASELINE, task)
            if difference is not None:
                low, high = difference.interval
                axis.plot([100 * low, 100 * high], [row, row], color=task_colour(index), linewidth=2)
                axis.plot(
                    100 * difference.value, row, "o", color=task_colour(index), markersize=6, mfc=None if difference.is_clear else "white"
                )
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_title(task, fontsize=10)
        axis.set_yticks(range(len(conditions)), reversed(conditions), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(results.tasks) :]:
        axis.set_visible(False)
    figure.suptitle("Test metric minus that of the weighted schedule, in points (95 % intervals; full dots: not 0)", fontsize=11)
    return figure


def draw_forgetting(results: StageResults):
    """Of the first seed's task-by-task runs, every task's metric on val after the steps of each task."""
    from matplotlib.figure import Figure

    runs = [run for name in ("task-by-task", OWN_COSINES) for run in results.table if run.condition == name][:]
    first = min((run.run["seed"] for run in runs), default=None)
    runs = [run for run in runs if run.run["seed"] == first]
    if not runs:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axis, run in zip(np.atleast_1d(figure.subplots(1, len(runs), sharey=True)), runs, strict=True):
        phases = list_phases(run)
        steps = sorted(run.val)
        for index, task in enumerate(results.tasks):
            axis.plot(steps, [100 * run.val[step][task] for step in steps], color=task_colour(index), label=task, linewidth=1.5)
        begin = 0
        for task, end in phases:
            axis.axvspan(begin, end, color=task_colour(results.tasks.index(task)), alpha=0.12, linewidth=0)
            axis.text((begin + end) / 2, 101, task, rotation=40, fontsize=8, ha="left", va="bottom")
            begin = end
        axis.set(xlim=(0, begin), ylim=(0, 100), xlabel="step")
        axis.set_title(f"{run.condition}, seed {first}", fontsize=10, pad=42)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("metric on val, percent")
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
