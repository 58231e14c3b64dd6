"""A step plan in numbers and as a picture: the task and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from rich.console import Console
from rich.table import Table

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.picture import DARK, count, drawing_style, save_figure
from polyvit_fast.train.output.table import build_table, task_cell
from polyvit_fast.train.output.words import break_words, shorten
from polyvit_fast.train.schedule import count_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported where it draws, because that takes long
    Axes = Figure = Any

ROW, TEXT_LINE, PANEL = 0.28, 0.17, 2.2  # inches
LETTER = 0.083  # inches, about
FAINTEST = 0.4
"""The strength of the colour where a task has the fewest steps in a column of pixels but not none; it is 1 where it has the most."""
DASHES = ("-", "--", ":", "-.")


def build_schedule_table(plan: StepPlan, names: Sequence[str]) -> Table:
    """Per task: steps, fraction of all minibatches, first and last step, and the most steps in a row without it between those."""
    table = build_table(["task"], ["steps", "of all", "first step", "last step", "longest gap"])
    counts, present = count_steps(plan), _find_steps(plan, names)
    for index, name in enumerate(names):
        steps = np.flatnonzero(present[index])
        gap = int(np.diff(steps).max()) - 1 if len(steps) > 1 else 0
        numbers = [f"{steps[0]:,}", f"{steps[-1]:,}", f"{gap:,}"] if len(steps) else ["-"] * 3
        table.add_row(task_cell(name, index), f"{counts[name]:,}", _percent(counts[name] / counts.total(), 2), *numbers)
    return table


def build_rate_table(lrs: Sequence[float]) -> Table:
    """The first, the largest and the last learning rate, and their steps."""
    table = build_table(["learning rate"], ["value", "step"])
    for name, step in (("first", 0), ("largest", int(np.argmax(lrs))), ("last", len(lrs) - 1)):
        table.add_row(name, f"{lrs[step]:.4g}", f"{step:,}")
    return table


def print_schedule(plan: StepPlan, names: Sequence[str], lrs: Sequence[float]) -> None:
    """Print the table of the schedule, with the tasks in the order of `names`, and that of its learning rates."""
    Console().print(build_schedule_table(plan, names), "", build_rate_table(lrs), sep="\n")


def plot_schedule(path: Path, plan: StepPlan, config: Train, lrs: Sequence[float]) -> None:
    """Draw the plan as a PNG: the task of every step, each task's percentage of the minibatches so far, the learning rate of every step.

    No step is lost: a column of pixels in which a task has any step shows it.
    """
    names = list(config.tasks)
    present = _find_steps(plan, names)
    with drawing_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        kinds = _find_rates(plan, config)
        heights = [ROW * len(names), max(PANEL, TEXT_LINE * (len(names) + 1)), max(PANEL, 1.3 * TEXT_LINE * (len(kinds) + 2))]
        left, right = (LETTER * max(len(shorten(name, width)) for name in names) for width in (40, 20))
        figure = Figure(figsize=(round(8 + left + max(1.2, right), 1), round(2.2 + sum(heights), 1)), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        _label_tasks(axes[0], names, present)
        labels = _draw_percentages(axes[1], names, present)
        _draw_rates(axes[2], kinds, np.asarray(lrs))
        axes[2].set(xlabel="step", xlim=(0, len(plan)))
        axes[2].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes[2].xaxis.set_major_formatter("{x:,.0f}")
        schedule = config.schedule if isinstance(config.schedule, str) else getattr(config.schedule, "__name__", "custom")
        figure.suptitle(f"Schedule: {schedule}, {count(len(plan), 'step')}, {count(len(names), 'task')}")
        figure.draw_without_rendering()  # only the finished layout says how many pixels there are
        figure.set_layout_engine("none")
        _draw_tasks(figure, axes[0], present)
        _spread(axes[1], labels)
        save_figure(figure, path)


def _find_steps(plan: StepPlan, names: Sequence[str]) -> Bool[np.ndarray, "tasks steps"]:
    """Whether each step has each task."""
    kinds = {tasks: number for number, tasks in enumerate(dict.fromkeys(plan))}
    members = np.array([[name in tasks for tasks in kinds] for name in names])
    return members[:, np.fromiter(map(kinds.__getitem__, plan), int, len(plan))]


def _count_in_bins(present: Bool[np.ndarray, "tasks steps"], most: int) -> Int[np.ndarray, "tasks bins"]:
    """How many steps of each task are in each of `most` equal parts of the plan; of a plan of fewer steps, in each step."""
    num_steps = present.shape[1]
    num_bins = min(num_steps, most)
    return np.add.reduceat(present, _bin_edges(num_steps, num_bins)[:-1], axis=1, dtype=int)


def _bin_edges(num_steps: int, num_bins: int) -> Int[np.ndarray, " edges"]:
    return -(-np.arange(num_bins + 1) * num_steps // num_bins)


def _label_tasks(axes: Axes, names: list[str], present: Bool[np.ndarray, "tasks steps"]) -> None:
    """The axes in which the steps are drawn later: a row per task, its name on the left, its number of steps on the right."""
    counts = present.sum(1)
    axes.set(ylim=(len(names), 0), yticks=np.arange(len(names)) + 0.5, yticklabels=[shorten(name, 40) for name in names])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, steps in enumerate(counts):
        text = f"{steps:,}  ({_percent(steps / counts.sum(), 1)})" if steps else "no step"
        axes.text(1.012, row + 0.5, text, transform=axes.get_yaxis_transform(), va="center")
    axes.set_title(" ")


def _percent(ratio: float, digits: int) -> str:
    least = 10.0 ** -(digits + 2)
    return f"< {least:.{digits}%}" if 0 < ratio < least else f"{ratio:.{digits}%}"


def _draw_tasks(figure: Figure, axes: Axes, present: Bool[np.ndarray, "tasks steps"]) -> None:
    """Set the rows' pixels: those of the figure itself, for an image within the axes would be resampled."""
    left, bottom, right, top = map(round, map(float, axes.bbox.extents))
    figure.figimage(_paint(_count_in_bins(present, right - left), top - bottom, right - left), left, bottom, origin="upper")
    steps = present.shape[1] / (right - left)
    many = f"Tasks along the plan (a column of pixels is {steps:,.{1 if steps < 10 else 0}f} steps; darker is more of them)"
    axes.set_title("Task of every step" if steps <= 1 else many)


def _paint(counts: Int[np.ndarray, "tasks bins"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """A row of pixels per task, in its colour wherever it has a step, the stronger the more."""
    strengths = np.where(counts > 0, FAINTEST + (1 - FAINTEST) * counts / np.maximum(counts.max(1, keepdims=True), 1), 0)
    columns = (2 * np.arange(width) + 1) * counts.shape[1] // (2 * width)
    edges = np.linspace(0, height, len(counts) + 1).round().astype(int)
    picture = np.full((height, width, 3), 255, np.uint8)
    for row, (start, end) in enumerate(pairwise(edges)):
        colour = np.array(to_rgb(task_colour(row)))
        picture[start + 1 : max(end - 1, start + 2)] = np.round(255 - strengths[row, columns, None] * (255 - colour))
    return picture


def _draw_percentages(axes: Axes, names: list[str], present: Bool[np.ndarray, "tasks steps"]) -> list[Any]:
    """Bands, the first task's on top as above, and their names at the end. Gives back the names, which `_spread` moves."""
    sums = _count_in_bins(present, 1000).cumsum(1)
    points = _bin_edges(present.shape[1], sums.shape[1])
    percentages = 100 * sums / sums.sum(0)
    percentages = np.concatenate([percentages[:, :1], percentages], 1)  # before the first step as after it
    tops = 100 - np.concatenate([np.zeros((1, len(points))), percentages.cumsum(0)])
    labels = []
    for row, name in enumerate(names):
        if not present[row].any():
            continue
        middle = (tops[row] + tops[row + 1]) / 2
        axes.fill_between(points, tops[row + 1], tops[row], color=task_colour(row), linewidth=0)
        axes.plot(points, middle, color=task_colour(row), linewidth=1)  # for bands thinner than a pixel
        line = {"arrowstyle": "-", "color": task_colour(row), "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        look: dict[str, Any] = {"arrowprops": line, "va": "center", "fontsize": "small"}
        where = {"xy": (1, middle[-1]), "xytext": (1.03, middle[-1]), "xycoords": axes.get_yaxis_transform()}
        labels.append(axes.annotate(shorten(name, 20), **where, **look))
    axes.set(ylim=(0, 100), ylabel="minibatches so far [%]", title="Each task's percentage of the minibatches")
    return labels


def _spread(axes: Axes, labels: list[Any]) -> None:
    """Move the names of bands apart, so that none covers another."""
    gap = 100 * TEXT_LINE / (axes.bbox.height / axes.figure.dpi)
    for label, height in zip(labels, _keep_apart([label.xyann[1] for label in labels], gap), strict=True):
        label.xyann = (label.xyann[0], height)


def _keep_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Falling numbers at least `gap` from each other, moved as little as that takes: those too close stand around their mean."""
    groups: list[list[float]] = []  # of heights as they would be without the gaps, which fall too
    for index, height in enumerate(heights):
        groups.append([height + index * gap])
        while len(groups) > 1 and np.mean(groups[-2]) < np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    apart = [float(np.mean(group)) for group in groups for _ in group]
    lowest = gap * (len(heights) - 1)  # so that the last stays at 0 or above, and the first below 100
    return [min(max(height, lowest), max(100.0, lowest)) - index * gap for index, height in enumerate(apart)]


def _find_rates(plan: StepPlan, config: Train) -> dict[str, tuple[np.ndarray, str]]:
    """Label → the steps of one `lr_scale`, or of a task's own schedule, and their colour; the highest rate first."""
    names = list(config.tasks)
    found = {tasks: _describe_rate(config, tasks) for tasks in dict.fromkeys(plan)}
    kinds = sorted(set(found.values()), key=lambda kind: (kind[1], -kind[0]))
    numbers = {tasks: kinds.index(kind) for tasks, kind in found.items()}
    of_steps = np.fromiter(map(numbers.__getitem__, plan), int, len(plan))
    rates = {}
    for number, (scale, own) in enumerate(kinds):
        members = sorted({name for tasks, kind in numbers.items() if kind == number for name in tasks}, key=names.index)
        more = f" and {len(members) - 2} more" if len(members) > 2 else ""
        label = f"× {scale:g}: {', '.join(shorten(name, 24) for name in members[:2])}{more}{own and f' ({own})'}"
        rates[label] = np.flatnonzero(of_steps == number), task_colour(names.index(members[0])) if len(members) == 1 else ""
    return rates


def _describe_rate(config: Train, names: tuple[str, ...]) -> tuple[float, str]:
    """The mean `lr_scale` of a step's tasks, and which of them have a schedule of their own."""
    tasks = {name: config.tasks[name] for name in names}
    own = [f"own {task.lr_schedule} of {shorten(name, 24)}" for name, task in tasks.items() if task.lr_schedule != "run"]
    return sum(task.lr_scale for task in tasks.values()) / len(names), ", ".join(own)


def _draw_rates(axes: Axes, kinds: dict[str, tuple[np.ndarray, str]], rates: Float[np.ndarray, " steps"]) -> None:
    """A line for each label; those of several tasks are dark, and differ in their dashes."""
    peaks, dashes = [rates[steps].max() for steps, _ in kinds.values()], 0
    for label, (steps, colour) in kinds.items():
        style = "-" if colour else DASHES[dashes % len(DASHES)]
        dashes += not colour
        marker = "." if len(steps) < 60 else ""
        look = {"color": colour or DARK, "linestyle": style, "marker": marker, "clip_on": len(rates) > 1}
        axes.plot(steps, rates[steps], **look, label="\n".join(break_words(label, 32)))
    axes.set(ylabel="learning rate", title="Learning rate of every step")
    if max(peaks) > 20 * min(peaks):
        axes.set(yscale="log", ylim=(min(peaks) / 30, 1.5 * max(peaks)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set(ylim=(0, None))
    if len(axes.lines) > 1:
        axes.legend(title="lr_scale", alignment="left", loc="upper left", bbox_to_anchor=(1.0, 1.05))
