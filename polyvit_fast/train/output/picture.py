"""What all pictures have in common: their style, the fonts for other scripts, and how a figure becomes a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyvit_fast.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported where it draws, because that takes long
    Figure = Any

DARK = "#222222"
"""Text, and lines that are no task's."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.dpi": 130,
    "grid.color": "#E4E4E4",
    "legend.fontsize": "small",
    "legend.frameon": False,
    "savefig.bbox": None,
    "savefig.dpi": "figure",
    "text.parse_math": False,  # a class may be called $1
}
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic")
"""Where letters come from that matplotlib's own font lacks, on machines that have one of these."""


@contextmanager
def drawing_style() -> Iterator[None]:
    """Inside, figures have our style. Raises ValueError when matplotlib is not installed."""
    require("drawing", "matplotlib")
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    with matplotlib.rc_context(STYLE), matplotlib.rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, into a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def count(number: int, noun: str) -> str:
    """As in 1 step, 2,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
