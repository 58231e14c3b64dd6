"""Tables on the terminal, all of one style."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from polyvit_fast.train.output.colours import task_colour
from polyvit_fast.train.output.words import WORD_ENDS, break_words


@dataclass(frozen=True)
class Words:
    """Text of a table that wraps where words end; with a `colour`, after a mark in it where the terminal has colours."""

    text: str
    colour: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        indent = self._indent(console)
        longest = max(cell_len(word.rstrip()) for word in WORD_ENDS.split(self.text))
        return Measurement(indent + longest, indent + cell_len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        indent = self._indent(console)
        lines = break_words(self.text, options.max_width - indent)
        mark = Text.assemble((" ", f"on {self.colour}"), " ") if indent else Text()
        for number, line in enumerate(lines):
            yield Text.assemble(Text(" " * indent) if number else mark, line, overflow="fold")

    def _indent(self, console: Console) -> int:
        return 2 if self.colour and console.color_system else 0


class WordTable(Table):
    """A table whose columns of words wrap as `Words` do; nothing in them is taken for rich's markup."""

    def add_row(self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        """Add a row of strings and renderables."""
        cells = [
            Words(cell) if isinstance(cell, str) and not column.no_wrap else cell
            for cell, column in zip(renderables, self.columns, strict=True)
        ]
        super().add_row(*cells, style=style, end_section=end_section)


def task_cell(name: str, index: int) -> Words:
    """A task's name behind a mark in its colour; `index` is its position in the configuration."""
    return Words(name, colour=task_colour(index))


def build_table(words: Iterable[str], numbers: Iterable[str], title: str = "") -> Table:
    """An empty table: long `words` wrap, `numbers` are flush right and never cut."""
    table = WordTable(title=Text(title, style="bold") if title else None, title_justify="left", box=box.SIMPLE, show_edge=False)
    for header in words:
        table.add_column(Words(header), overflow="fold")
    for header in numbers:
        table.add_column(Text(header), justify="right", no_wrap=True)
    return table
