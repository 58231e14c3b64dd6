"""A picture of a run: losses and metrics of each task, of training and of held-out files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from polyvit_fast.train.output.colours import task_colour
from polyvit_fast.train.output.picture import DARK, count, drawing_style, save_figure
from polyvit_fast.train.output.words import break_words, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported where it draws, because that takes long
    Axes = Figure = Any

WIDTH, HEIGHT = 2.9, 4.3  # inches for a task
MOST_COLUMNS = 5
LAYOUT = {"top1": {"loss": (0, 5), "top1": (5, 10)}, "mAP": {"loss": (0, 5), "mAP": (5, 8), "yes-no": (8, 10)}}
"""By a task's metric, the first row and the end of each panel. Rows are tenths of the task's height."""
TITLES = {"loss": "loss", "top1": "accuracy", "mAP": "mAP", "yes-no": "yes-no accuracy in training"}
HELD_OUT = {"color": DARK, "linewidth": 1, "marker": "o", "markersize": 4, "markerfacecolor": "white"}
BEST = {"color": DARK, "marker": "*", "markersize": 10, "linestyle": "none"}

Curve = tuple[list[int], list[int | float]]
Curves = dict[str, dict[str, Curve]]
"""Per task, the steps and values of "train/loss", "train/accuracy", "eval/loss", "eval/top1", …"""


def plot_run(folder: Path, path: Path, names: Sequence[str] = ()) -> None:
    """Draw a run folder's metrics.jsonl as a PNG: for each task its loss above its metric, of training and of held-out examples.

    The steps end where the run has come to. Tasks stand in the order of `names`, the configuration's; others, or all without it, follow in
    that of the file. The best checkpoint is that of the first evaluation with the highest mean metric, as in training. Raises ValueError
    when nothing was logged yet.
    """
    curves = _read_curves(folder / "metrics.jsonl")
    known = [*names, *(name for name in curves if name not in names)]
    order = [name for name in known if name in curves]
    last, best = max(max(steps) for row in curves.values() for steps, _ in row.values()), _find_best_step(curves)
    num_rows = math.ceil(len(order) / MOST_COLUMNS)
    num_columns = math.ceil(len(order) / num_rows)
    with drawing_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(2, num_columns) * WIDTH, 0.9 + HEIGHT * num_rows), layout="constrained")
        grid = figure.add_gridspec(10 * num_rows, num_columns)
        for index, name in enumerate(order):
            row, column = divmod(index, num_columns)
            metric = "mAP" if "eval/mAP" in curves[name] else "top1"
            panels = {
                panel: figure.add_subplot(grid[10 * row + start : 10 * row + end, column]) for panel, (start, end) in LAYOUT[metric].items()
            }
            _draw_task(panels, name, task_colour(known.index(name)), curves[name], best)
            _set_steps(list(panels.values()), last)
        title = _write_title(folder.name, last, best, int(12.5 * figure.get_figwidth()))
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="medium")
        save_figure(figure, path)


def _write_title(run: str, last: int, best: int | None, width: int) -> str:
    parts = [f"{run}, {count(last, 'step')}.", "Colour: training, smoothed (thin: each interval)."]
    parts += [] if best is None else ["○: held-out files, the last value above.", f"★: best checkpoint, step {best:,}, its value above."]
    lines = [""]
    for part in parts:  # a sentence stays together if it can
        lines[-1:] = [f"{lines[-1]} {part}".strip()] if cell_len(lines[-1] + part) < width else [lines[-1], *break_words(part, width)]
    return "\n".join(line for line in lines if line)


def _read_curves(path: Path) -> Curves:
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a run folder, or nothing was logged yet")
    curves: Curves = {}
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


def _find_best_step(curves: Curves) -> int | None:
    """The step that training keeps as the best: the first with the highest mean of all tasks' metrics, where NaN counts as 0."""
    scores: dict[int, list[int | float]] = {}
    for row in curves.values():
        for step, value in zip(*row.get("eval/mAP", row.get("eval/top1", ((), ()))), strict=True):
            scores.setdefault(step, []).append(0.0 if math.isnan(value) else value)
    return max(scores, key=lambda step: sum(scores[step]), default=None)


def _draw_task(panels: Mapping[str, Axes], name: str, colour: str, curve: Mapping[str, Curve], best: int | None) -> None:
    held_out = {panel: curve.get(f"eval/{panel}") for panel in panels}
    training = {"loss": curve.get("train/loss"), "top1": curve.get("train/accuracy"), "yes-no": curve.get("train/accuracy")}
    for panel, axes in panels.items():
        axes.set_title(TITLES[panel], fontsize="small")
        if line := training.get(panel):
            axes.plot(*line, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(line[0], _smooth(line[1]), color=colour, marker="." if len(line[0]) < 10 else "", clip_on=len(line[0]) >= 10)
        if line := held_out[panel]:
            axes.plot(*line, **HELD_OUT, clip_on=False, zorder=3)
            _mark_best(axes, line, best, ".3g" if panel == "loss" else ".3f")
        if best is not None:
            axes.axvline(best, color=DARK, linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, _find_top(axes) if panel == "loss" else 1.03))
    title = "\n".join(break_words(shorten(name, 50), 26))
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    panels["loss"].annotate(title, (0, 1), (0, 20), **above, color=colour, weight="bold", va="bottom", annotation_clip=False)


def _find_top(axes: Axes) -> float | None:
    """Somewhat above all points, so that those at the top stay clear of what is written above the panel."""
    top = axes.dataLim.y1
    return 1.08 * top if 0 < top < math.inf else None


def _mark_best(axes: Axes, line: Curve, best: int | None, digits: str) -> None:
    """A star on the point of the best checkpoint; above the panel, where no curve is, its value and the last one."""
    values = dict(zip(*line, strict=True))
    texts = [f"○ {line[1][-1]:{digits}}"]
    if best in values:
        axes.plot([best], [values[best]], **BEST, clip_on=False, zorder=4)
        texts.insert(0, f"★ {values[best]:{digits}}")
    axes.set_title("  ".join(texts), loc="right", fontsize="small")


def _set_steps(panels: list[Axes], last: int) -> None:
    """The steps of a task's panels, with their numbers below the lowest: round ones, and the last."""
    from matplotlib.ticker import MaxNLocator

    round_steps = [step for step in MaxNLocator(4, integer=True).tick_values(0, last) if step < 0.8 * last]
    for axes in panels:
        axes.set(xlim=(0, last), xticks=[*round_steps, last])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.tick_params(labelsize="small", labelbottom=axes is panels[-1])
    panels[-1].set_xlabel("step", fontsize="small")


def _smooth(values: list[int | float]) -> np.ndarray:
    """The mean of about a fifteenth of the points around each, near ones first; NaN is left out."""
    window = np.hanning(2 * (len(values) // 30) + 3)[1:-1]
    known = ~np.isnan(values)
    total = np.convolve(np.where(known, values, 0), window, "same")
    weight = np.convolve(known.astype(float), window, "same")
    return np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)
