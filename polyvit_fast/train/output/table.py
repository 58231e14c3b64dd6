"""Tables on the terminal, all of one style."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table


def build_table(words: Iterable[str], numbers: Iterable[str], title: str = "") -> Table:
    """An empty table: long `words` wrap, `numbers` are flush right and never cut."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE, show_edge=False)
    for header in words:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table
