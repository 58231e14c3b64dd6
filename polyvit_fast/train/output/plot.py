"""Pictures of a plan and of a run: the schedule, the learning rate, losses and metrics per task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.train.schedule import count_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported where it draws, because that takes long
    Axes = Figure = Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#5A4FA2", "#8C8C00", "#7F7F7F", "#222222")
"""Told apart with the common forms of colour blindness: Okabe and Ito's set, with darker hues in place of its yellow, then greys."""
MAX_COLUMNS = 1000
"""Columns of the raster of tasks; a longer plan has several steps in one."""
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.dpi": 130,
}


def schedule_table(plan: StepPlan) -> Table:
    """Per task: steps, share of all minibatches, first and last step, and the longest row of steps without it between those."""
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("task", overflow="fold")
    for header in ("steps", "share", "first step", "last step", "longest gap"):
        table.add_column(header, justify="right", no_wrap=True)
    counts = count_steps(plan)
    for name in sorted(counts):
        steps = np.array([step for step, names in enumerate(plan) if name in names])
        gap = int(np.diff(steps).max()) - 1 if len(steps) > 1 else 0
        share = counts[name] / counts.total()
        table.add_row(name, f"{counts[name]:,}", f"{share:.2%}", f"{steps[0]:,}", f"{steps[-1]:,}", f"{gap:,}")
    return table


def rate_table(lrs: Sequence[float]) -> Table:
    """The first, the largest and the last learning rate, and their steps."""
    table = Table(box=box.SIMPLE, show_edge=False)
    for header in ("learning rate", "value", "step"):
        table.add_column(header, justify="left" if header == "learning rate" else "right", no_wrap=True)
    for name, step in (("first", 0), ("largest", int(np.argmax(lrs))), ("last", len(lrs) - 1)):
        table.add_row(name, f"{lrs[step]:.4g}", f"{step:,}")
    return table


def print_schedule(plan: StepPlan, lrs: Sequence[float]) -> None:
    """Print the table of the schedule and that of its learning rates."""
    Console().print(schedule_table(plan), "", rate_table(lrs), sep="\n")


def plot_schedule(path: Path, plan: StepPlan, config: Train, lrs: Sequence[float]) -> None:
    """Draw the plan as a PNG: the task of every step, each task's share of the minibatches so far, the learning rate of every step."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(config.tasks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6 + 0.28 * len(names)), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=[0.9 + 0.28 * len(names), 2.2, 2.2])
        _draw_raster(axes[0], plan, names)
        _draw_shares(axes[1], plan, names)
        _draw_rates(axes[2], plan, config, lrs)
        axes[2].set_xlabel("step")
        axes[2].set_xlim(0, len(plan))
        axes[2].xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        schedule = config.schedule if isinstance(config.schedule, str) else getattr(config.schedule, "__name__", "custom")
        figure.suptitle(f"Schedule: {schedule}, {len(plan):,} steps, {_plural(len(names), 'task')}", x=0.01, ha="left", fontsize=12)
        _save(figure, path)


def _draw_raster(axes: Axes, plan: StepPlan, names: list[str]) -> None:
    """A row per task, as strong as the task is frequent there against the place where it is most frequent."""
    from matplotlib.colors import to_rgb

    density = _density(plan, names)
    image = np.ones((len(names), density.shape[1], 4))
    for j, row in enumerate(density):
        image[j, :, :3] = to_rgb(_colour(j))
        image[j, :, 3] = row / max(row.max(), 1e-12)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, len(plan), len(names), 0))
    counts = count_steps(plan)
    labels = [f"{name}  {counts[name]:,}" for name in names]
    axes.set_yticks([j + 0.5 for j in range(len(names))], labels)
    for j in range(1, len(names)):
        axes.axhline(j, color="white", linewidth=2)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    binned = math.ceil(len(plan) / MAX_COLUMNS)
    axes.set_title("Task of every step" if binned == 1 else f"Tasks along the plan (a column is {binned} steps; darker is more of them)")


def _density(plan: StepPlan, names: list[str]) -> np.ndarray:
    """The share of the steps in each column of the raster that have each task: [task, column]."""
    num_columns = min(len(plan), MAX_COLUMNS)
    column = np.arange(len(plan)) * num_columns // len(plan)
    width = np.bincount(column, minlength=num_columns)
    return np.stack([np.bincount(column, weights=present, minlength=num_columns) / width for present in _presence(plan, names)])


def _presence(plan: StepPlan, names: list[str]) -> np.ndarray:
    """Whether each task is in each step: bool [task, step]."""
    row = {name: j for j, name in enumerate(names)}
    present = np.zeros((len(names), len(plan)), bool)
    for step, tasks in enumerate(plan):
        for name in tasks:
            present[row[name], step] = True
    return present


def _draw_shares(axes: Axes, plan: StepPlan, names: list[str]) -> None:
    points = np.unique(np.linspace(1, len(plan), 1000).astype(int))
    sums = np.cumsum(_presence(plan, names), axis=1)[:, points - 1]
    shares = 100 * sums / sums.sum(0)
    points, shares = np.insert(points, 0, 0), np.insert(shares, 0, shares[:, 0], axis=1)
    bands = range(len(names))[::-1]  # the first task on top, as in the raster
    axes.stackplot(points, shares[bands], colors=[_colour(j) for j in bands], edgecolor="white", linewidth=0.6, alpha=0.9)
    middle = 100 - np.cumsum(shares[:, -1]) + shares[:, -1] / 2
    for j, name in enumerate(names):
        if shares[j, -1] >= 7:  # a thinner band has no room for a line of text
            _annotate(axes, f"{name} {shares[j, -1]:.0f} %", len(plan), float(middle[j]))
    axes.set_ylim(0, 100)
    axes.set_ylabel("share so far [%]")
    axes.set_title("Cumulative share of the minibatches")


def _draw_rates(axes: Axes, plan: StepPlan, config: Train, lrs: Sequence[float]) -> None:
    """A line for each `lr_scale` among the steps, hence a single one when all tasks have the same."""
    names, rates = list(config.tasks), np.asarray(lrs)
    scales = np.array([sum(config.tasks[name].lr_scale for name in tasks) / len(tasks) for tasks in plan])
    for scale in sorted(set(scales.tolist()), reverse=True):
        steps = np.flatnonzero(scales == scale)
        members = sorted({name for step in steps for name in plan[step]}, key=names.index)
        colour = _colour(names.index(members[0])) if len(members) == 1 else "#333333"
        style = {"marker": "o", "markersize": 3} if len(steps) < 60 else {}
        axes.plot(steps, rates[steps], color=colour, linewidth=1.6, label=f"× {scale:g}: {_listed(members)}", **style)
    if len(axes.lines) > 1:
        axes.legend(title="lr_scale", fontsize=8.5, title_fontsize=8.5, alignment="left", loc="upper right")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.set_title("Learning rate of every step")


def plot_run(folder: Path, path: Path) -> None:
    """Draw a run folder's metrics.jsonl as a PNG: for each task its loss above its metric, training beside held-out examples.

    Raises ValueError when nothing was logged yet.
    """
    import matplotlib
    from matplotlib.figure import Figure

    curves = _read_curves(folder / "metrics.jsonl")
    names = list(curves)
    num_columns = len(names) if len(names) <= 5 else math.ceil(len(names) / math.ceil(len(names) / 5))
    num_rows = math.ceil(len(names) / num_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 2.9 * num_columns), 1.1 + 4.1 * num_rows), layout="constrained")
        axes = figure.subplots(2 * num_rows, num_columns, squeeze=False, sharex=True)
        for j, name in enumerate(names):
            row, column = divmod(j, num_columns)
            _draw_loss(axes[2 * row, column], name, curves[name], _colour(j))
            _draw_metric(axes[2 * row + 1, column], curves[name], _colour(j))
        for panel in axes.flat:
            panel.set_visible(bool(panel.lines))
        _label_steps(axes, max(point for curve in curves.values() for steps, _ in curve.values() for point in steps))
        _add_legend(figure)
        figure.suptitle(f"{folder.name}: {_plural(len(names), 'task')}", x=0.01, ha="left", fontsize=12)
        _save(figure, path)


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


def _draw_loss(axes: Axes, name: str, curves: dict[str, Curve], colour: str) -> None:
    _draw_training(axes, curves.get("train/loss"), colour)
    _draw_held_out(axes, curves.get("eval/loss"))
    axes.set_title(name)
    axes.set_ylabel("loss")
    losses = [value for key in ("train/loss", "eval/loss") for value in curves.get(key, ([], []))[1] if not math.isnan(value)]
    axes.set_ylim(0, 1.08 * max([*losses, 1e-3]))


def _draw_metric(axes: Axes, curves: dict[str, Curve], colour: str) -> None:
    metric = next((name for name in ("mAP", "top1") if f"eval/{name}" in curves), None)
    scaled = {key: (steps, [100 * value for value in values]) for key, (steps, values) in curves.items()}
    _draw_training(axes, scaled.get("train/accuracy"), colour)
    _draw_held_out(axes, scaled.get(f"eval/{metric}"))
    axes.set_ylabel("mAP / yes-no accuracy [%]" if metric == "mAP" else "accuracy [%]")
    axes.set_ylim(0, 103)


def _draw_training(axes: Axes, curve: Curve | None, colour: str) -> None:
    """The intervals' means as they are, thin, and smoothed."""
    if curve is None:
        return
    axes.plot(*curve, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(curve[0], _smoothed(curve[1]), color=colour, linewidth=1.8, marker="." if len(curve[0]) < 10 else "")


def _draw_held_out(axes: Axes, curve: Curve | None) -> None:
    if curve is None:
        return
    axes.plot(*curve, color="#222222", linewidth=1, marker="o", markersize=4, markerfacecolor="white", zorder=3)
    value = curve[1][-1]
    _annotate(axes, f"{value:.1f}" if value >= 10 else f"{value:.3g}", curve[0][-1], value)


def _smoothed(values: list[int | float]) -> np.ndarray:
    """The mean of about a fifteenth of the points around each, near ones first; NaN is passed over."""
    window = np.hanning(2 * (len(values) // 30) + 3)[1:-1]
    known = ~np.isnan(values)
    total = np.convolve(np.where(known, values, 0), window, "same")
    weight = np.convolve(known.astype(float), window, "same")
    return np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)


def _label_steps(axes: np.ndarray, last_step: int) -> None:
    from matplotlib.ticker import MaxNLocator

    thousands = last_step >= 10_000
    for panel in axes.flat:
        panel.set_xlim(0, 1.2 * last_step)  # leaves room for the last number
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:g}k" if thousands and value else f"{value:g}")
    for panel in axes[1::2].flat:
        panel.set_xlabel("step")
        panel.tick_params(labelbottom=True)


def _annotate(axes: Axes, text: str, step: int, value: int | float) -> None:
    """Write to the right of a point, even beyond the axes."""
    veil = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    axes.annotate(
        text, (step, value), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False, bbox=veil
    )


def _add_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    training = Line2D([], [], color="#777777", linewidth=1.8, label="training (smoothed; thin: each interval)")
    held_out = Line2D([], [], color="#222222", linewidth=1, marker="o", markersize=4, markerfacecolor="white", label="held-out files")
    figure.legend(handles=[training, held_out], loc="outside lower center", ncols=2)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
