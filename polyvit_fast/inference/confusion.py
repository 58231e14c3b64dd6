"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.cells import cell_len

from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.picture import DARK, drawing_style, save_figure
from polyvit_fast.train.output.words import break_words, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
else:  # matplotlib is imported where it draws, because that takes long
    Axes = AxesImage = Any

MOST = 30
"""Classes that can be read on one picture; of more, those with the most wrong answers are shown."""
NUMBERED = 15
"""Classes up to which every cell has its number."""
OTHERS = "all others"


def plot_confusion(
    path: Path, title: str, classes: Sequence[str], confusion: Int[torch.Tensor, "classes classes"], *, colour: str = task_colour(0)
) -> None:
    """Draw the confusion matrix as a PNG: in each row, the percentages of a class's files by the class that they were taken for.

    `colour` is that of the task, as #RRGGBB.
    """
    names, counts = _choose_classes(list(classes), confusion.numpy())
    percentages = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(classes) > MOST:
        title += f": the {len(names) - 1} of {len(classes):,} classes with the most wrong answers"
    names = [shorten(name, 24) for name in names]
    side = max(2.8, 1.3 + 0.07 * max(map(cell_len, names)) + 0.27 * len(names))
    with drawing_style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure

        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        axes = figure.subplots()
        dark = "#" + bytes(value // 2 for value in to_rgb(colour)).hex()
        shades = LinearSegmentedColormap.from_list("task", [(0, "white"), (0.6, colour), (1, dark)])
        picture = axes.imshow(percentages, shades, vmin=0, vmax=100)
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
        _label(axes, names)
        if len(names) <= NUMBERED:
            _number(axes, percentages, counts, picture)
        figure.colorbar(picture, ax=axes, shrink=0.6, label="% of the row's files")
        figure.suptitle("\n".join(break_words(title, int(11 * side))), x=0.01, horizontalalignment="left", fontsize="medium")
        save_figure(figure, path)


def _choose_classes(names: list[str], counts: np.ndarray) -> tuple[list[str], Float[np.ndarray, "shown shown"]]:
    """All classes, or of many those with the most wrong answers, and all others as one."""
    if len(names) <= MOST:
        return names, counts.astype(float)
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[: MOST - 1])
    group = np.full(len(names), len(chosen))
    group[chosen] = np.arange(len(chosen))
    merged = np.zeros((MOST, MOST))
    np.add.at(merged, (group[:, None], group[None]), counts)
    return [*(names[number] for number in chosen), OTHERS], merged


def _label(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set(xlabel="taken for", ylabel="class")


def _number(axes: Axes, percentages: np.ndarray, counts: np.ndarray, picture: AxesImage) -> None:
    brightness = picture.to_rgba(percentages)[..., :3] @ [0.2126, 0.7152, 0.0722]
    for (row, column), value in np.ndenumerate(percentages):
        if counts[row, column]:
            number = f"{value:.0f}" if value >= 1 else "<1"
            colour = "white" if brightness[row, column] < 0.55 else DARK
            axes.text(column, row, number, ha="center", va="center", fontsize="x-small", color=colour)
