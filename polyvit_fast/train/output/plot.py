"""Pictures of a step plan and of a run: the schedule, the learning rate, losses and metrics per task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.extras import require
from polyvit_fast.train.output.colours import task_colour
from polyvit_fast.train.output.table import build_table
from polyvit_fast.train.schedule import count_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # matplotlib is imported where it draws, because that takes long
    Axes = Any

MAX_COLUMNS = 1000
"""Columns in which the tasks of a plan are drawn; in a longer plan a column is several steps."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "grid.color": "#E4E4E4",
    "legend.fontsize": "small",
    "legend.frameon": False,
}
HELD_OUT = {"color": "#222222", "linewidth": 1, "marker": "o", "markersize": 4, "markerfacecolor": "white"}


def build_schedule_table(plan: StepPlan) -> Table:
    """Per task: steps, fraction of all minibatches, first and last step, and the most steps in a row without it between those."""
    table = build_table(["task"], ["steps", "of all", "first step", "last step", "longest gap"])
    counts = count_steps(plan)
    for name in sorted(counts):
        steps = np.array([step for step, names in enumerate(plan) if name in names])
        gap = int(np.diff(steps).max()) - 1 if len(steps) > 1 else 0
        table.add_row(name, f"{counts[name]:,}", f"{counts[name] / counts.total():.2%}", f"{steps[0]:,}", f"{steps[-1]:,}", f"{gap:,}")
    return table


def build_rate_table(lrs: Sequence[float]) -> Table:
    """The first, the largest and the last learning rate, and their steps."""
    table = build_table(["learning rate"], ["value", "step"])
    for name, step in (("first", 0), ("largest", int(np.argmax(lrs))), ("last", len(lrs) - 1)):
        table.add_row(name, f"{lrs[step]:.4g}", f"{step:,}")
    return table


def print_schedule(plan: StepPlan, lrs: Sequence[float]) -> None:
    """Print the table of the schedule and that of its learning rates."""
    Console().print(build_schedule_table(plan), "", build_rate_table(lrs), sep="\n")


def plot_schedule(path: Path, plan: StepPlan, config: Train, lrs: Sequence[float]) -> None:
    """Draw the plan as a PNG: the task of every step, each task's percentage of the minibatches so far, the learning rate of every step."""
    require("drawing", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    names, height = list(config.tasks), 0.9 + 0.28 * len(config.tasks)
    present = np.array([[name in tasks for tasks in plan] for name in names])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.7 + height), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=[height, 2.2, 2.2])
        _draw_tasks(axes[0], names, present)
        _draw_percentages(axes[1], present)
        _draw_rates(axes[2], plan, config, np.asarray(lrs))
        schedule = config.schedule if isinstance(config.schedule, str) else getattr(config.schedule, "__name__", "custom")
        figure.suptitle(f"Schedule: {schedule}, {len(plan):,} steps, {len(names)} task{'s' * (len(names) > 1)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_tasks(axes: Axes, names: list[str], present: np.ndarray) -> None:
    """A row per task in its colour, the stronger the more of a column's steps are the task's."""
    from matplotlib.colors import ListedColormap

    density, num_steps, counts = _compute_density(present), present.shape[1], present.sum(1)
    colours = ListedColormap([task_colour(row) for row in range(len(names))])
    rows = np.indices(density.shape)[0]
    strength = density / np.maximum(density.max(1, keepdims=True), 1e-12)
    extent = (0, num_steps, len(names), 0)
    axes.imshow(rows, colours, alpha=strength, vmin=0, vmax=max(1, len(names) - 1), aspect="auto", interpolation="nearest", extent=extent)
    labels = [f"{name}  {count:,}  ({count / counts.sum():.1%})" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(np.arange(len(names)) + 0.5, labels)
    axes.set_yticks(range(1, len(names)), minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", axis="y", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    width = math.ceil(num_steps / MAX_COLUMNS)
    axes.set_title("Task of every step" if width == 1 else f"Tasks along the plan (a column is {width} steps; darker is more of them)")


def _compute_density(present: np.ndarray) -> np.ndarray:
    """The fraction of the steps in each column that have each task: [task, column], from bool [task, step]."""
    num_steps = present.shape[1]
    num_columns = min(num_steps, MAX_COLUMNS)
    edges = -(-np.arange(num_columns + 1) * num_steps // num_columns)
    return np.add.reduceat(present, edges[:-1], axis=1, dtype=float) / np.diff(edges)


def _draw_percentages(axes: Axes, present: np.ndarray) -> None:
    points = np.unique(np.linspace(0, present.shape[1], MAX_COLUMNS).astype(int))
    sums = np.cumsum(present, axis=1)[:, np.maximum(points, 1) - 1]
    bands = range(len(present))[::-1]  # the first task on top, as above
    axes.stackplot(
        points, (100 * sums / sums.sum(0))[bands], colors=[task_colour(row) for row in bands], edgecolor="white", linewidth=0.6, alpha=0.9
    )
    axes.set(ylim=(0, 100), ylabel="minibatches so far [%]", title="Each task's percentage of the minibatches")


def _draw_rates(axes: Axes, plan: StepPlan, config: Train, rates: np.ndarray) -> None:
    """A line for each `lr_scale` and each task's own schedule among the steps, hence a single one when all tasks have the same."""
    names = list(config.tasks)
    kinds = {tasks: _describe_rate(config, tasks) for tasks in set(plan)}
    for kind in sorted(set(kinds.values()), key=lambda kind: (kind[1], -kind[0])):
        scale, own = kind
        steps = np.array([step for step, tasks in enumerate(plan) if kinds[tasks] == kind])
        members = sorted({name for step in steps for name in plan[step]}, key=names.index)
        colour = task_colour(names.index(members[0])) if len(members) == 1 else "#333333"
        more = f" and {len(members) - 2} more" if len(members) > 2 else ""
        label = f"× {scale:g}: {', '.join(members[:2])}{more}{own and f' ({own})'}"
        axes.plot(steps, rates[steps], color=colour, label=label, marker="." if len(steps) < 60 else "")
    if len(axes.lines) > 1:
        axes.legend(title="lr_scale", alignment="left", loc="upper right")
    axes.set(xlabel="step", xlim=(0, len(plan)), ylim=(0, None), ylabel="learning rate", title="Learning rate of every step")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _describe_rate(config: Train, names: tuple[str, ...]) -> tuple[float, str]:
    """The mean `lr_scale` of a step's tasks, and which of them have a schedule of their own."""
    tasks = {name: config.tasks[name] for name in names}
    own = [f"own {task.lr_schedule} of {name}" for name, task in tasks.items() if task.lr_schedule != "run"]
    return sum(task.lr_scale for task in tasks.values()) / len(names), ", ".join(own)


def plot_run(folder: Path, path: Path, names: Sequence[str] = ()) -> None:
    """Draw a run folder's metrics.jsonl as a PNG: for each task its loss above its metric, of training and of held-out examples.

    Tasks stand in the order of `names`; others, or all without it, follow in that of the file. Raises ValueError when
    nothing was logged yet.
    """
    require("drawing", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    curves = _read_curves(folder / "metrics.jsonl")
    curves = {name: curves[name] for name in (*(n for n in names if n in curves), *(n for n in curves if n not in names))}
    num_rows = math.ceil(len(curves) / 5)
    num_columns = math.ceil(len(curves) / num_rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 2.9 * num_columns), 1.1 + 4.1 * num_rows), layout="constrained")
        axes = figure.subplots(2 * num_rows, num_columns, squeeze=False, sharex=True)
        for index, (name, curve) in enumerate(curves.items()):
            metric = next((metric for metric in ("mAP", "top1") if f"eval/{metric}" in curve), "top1")
            row, column = divmod(index, num_columns)
            loss, accuracy = axes[2 * row : 2 * row + 2, column]
            _draw_curves(loss, task_colour(index), curve.get("train/loss"), curve.get("eval/loss"))
            _draw_curves(accuracy, task_colour(index), curve.get("train/accuracy"), curve.get(f"eval/{metric}"))
            loss.set(ylabel="loss", ylim=(0, None), title=name)
            accuracy.set(ylabel="mAP / yes-no accuracy" if metric == "mAP" else "accuracy", ylim=(0, 1.03), xlabel="step")
            accuracy.xaxis.set_major_formatter(EngFormatter(sep=""))
            accuracy.tick_params(labelbottom=True)
        for panel in axes.flat:
            panel.set_visible(bool(panel.lines))
        figure.suptitle(f"{folder.name}: training (smoothed; thin: each interval) and held-out files (circles)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


Curve = tuple[list[int], list[int | float]]


def _read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """Per task, the points of "train/loss", "train/accuracy", "eval/loss", "eval/top1", …"""
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a run folder, or nothing was logged yet")
    curves: dict[str, dict[str, Curve]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of a run that was killed
        for task, row in line["tasks"].items():
            for key, value in row.items():
                steps, values = curves.setdefault(task, {}).setdefault(f"{line['kind']}/{key}", ([], []))
                steps.append(line["step"])
                values.append(math.nan if value is None else value)
    if not curves:
        raise ValueError(f"{path} holds no points: nothing was logged yet")
    return curves


def _draw_curves(axes: Axes, colour: str, training: Curve | None, held_out: Curve | None) -> None:
    """The means of the training intervals, thin as they are and smoothed, and the evaluations, of which the last has its number."""
    if training:
        axes.plot(*training, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(training[0], _smooth(training[1]), color=colour, marker="." if len(training[0]) < 10 else "")
    if held_out:
        axes.plot(*held_out, **HELD_OUT)
        value = held_out[1][-1]
        axes.annotate(f"{value:.3g}", (held_out[0][-1], value), xytext=(6, 6), textcoords="offset points", annotation_clip=False)


def _smooth(values: list[int | float]) -> np.ndarray:
    """The mean of about a fifteenth of the points around each, near ones first; NaN is left out."""
    window = np.hanning(2 * (len(values) // 30) + 3)[1:-1]
    known = ~np.isnan(values)
    total = np.convolve(np.where(known, values, 0), window, "same")
    weight = np.convolve(known.astype(float), window, "same")
    return np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)
