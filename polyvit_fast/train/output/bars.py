"""Bars on the terminal, a line for each task: as wide as the terminal, with as many numbers as it has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from polyvit_fast.train.output.colours import task_colour
from polyvit_fast.train.output.words import shorten

Row = Mapping[str, int | float]
"""A task's numbers of an interval, by the names that they have in metrics.jsonl."""
MIN_WAIT_RATIO = 0.05  # of a task's time: less waiting for data is not shown
MIN_BAR, MIN_NAME = 8, 12
NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.3f}".format),
    "acc": ("accuracy", "{:.1%}".format),
    "ex/s": ("examples_per_second", "{:,.0f}".format),
    "waits": ("data_wait_ratio", lambda ratio: f"{ratio:.0%}" if ratio >= MIN_WAIT_RATIO else ""),
    "norm": ("grad_norm", "{:.3g}".format),
    "clipped": ("clipped_ratio", "{:.0%}".format),
    "lr": ("lr", "{:.3g}".format),
    "skipped": ("skipped", lambda count: f"{count:,}" if count else ""),
    "broken": ("broken_files", lambda count: f"{count:,}" if count else ""),
}
"""By the word in a column's head: what it shows of a row, and how; empty: it is not worth mentioning."""
PRIORITY = ("done", "loss", "left", "skipped", "broken", "acc", "ex/s", "waits", "lr", "norm", "clipped")
"""The columns, those first that a narrow terminal shows too."""


class Terminal(Console):
    """Goes silent when its pipe is closed, where rich's own console would end the process."""

    def on_broken_pipe(self) -> None:
        """Called by rich when it finds its pipe closed."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class TaskBars(Progress):
    """A line for each task: name, bar and numbers. The fields of a task are `numbers`, its row, and `colour`, empty for the usual one."""

    def __init__(self, console: Console) -> None:
        self.terminal = console  # rich asks for the table before it has set its own
        # A refresh takes the interpreter for about 4 ms with nine tasks: twice a second is enough.
        super().__init__(console=console, refresh_per_second=2, disable=not console.is_terminal)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """The lines as a table of the terminal's width."""
        tasks, width = [task for task in tasks if task.visible], self.terminal.width
        names = [shorten(task.description, max(MIN_NAME, width // 4)) for task in tasks]
        rows = [_format_cells(task) for task in tasks]
        shown = choose_columns(rows, width - max(map(cell_len, names), default=0) - 1 - MIN_BAR)
        table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", no_wrap=True)
        table.add_column("", ratio=1)
        for head in shown:
            table.add_column(head, justify="right", no_wrap=True)
        for task, name, row in zip(tasks, names, rows, strict=True):
            colour = task.fields["colour"]
            styles = {"complete_style": colour, "finished_style": colour} if colour else {}
            bar = ProgressBar(total=max(1, task.total or 0), completed=task.completed, **styles)
            table.add_row(Text(name, colour), bar, *(row.get(head, "") for head in shown))
        return table


def choose_columns(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The heads of the columns that fit in so many characters, with a space before each. A column without content is not shown."""
    widths = {head: max((len(row.get(head, "")) for row in rows), default=0) for head in PRIORITY}
    chosen = set()
    for head in PRIORITY:
        needed = 1 + max(len(head), widths[head])
        if widths[head] and needed <= width:
            width -= needed
            chosen.add(head)
    return [head for head in ("done", *NUMBERS, "left") if head in chosen]


def format_numbers(row: Row) -> dict[str, str]:
    """What is to be shown of a row, by the heads of its columns."""
    texts = {head: show(row[name]) for head, (name, show) in NUMBERS.items() if name in row}
    return {head: text for head, text in texts.items() if text}


def _format_cells(task: Task) -> dict[str, str]:
    left = task.time_remaining
    done = {"done": f"{task.completed:,.0f}/{task.total:,.0f}"} if task.total else {}
    remaining = {"left": str(timedelta(seconds=math.ceil(left)))} if left and not task.finished else {}
    return format_numbers(task.fields["numbers"]) | done | remaining


@contextmanager
def show_evaluation_progress(names: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (task, done, total) of an evaluation: on a terminal it moves a bar for each task.

    `names` are those of all tasks of the configuration, by which each has its colour; more words may follow a name.
    """
    ids: dict[str, TaskID] = {}
    with TaskBars(Console()) as bars:

        def show(task: str, done: int, total: int) -> None:
            if task not in ids:
                colour = task_colour(names.index(task.partition(" ")[0]))
                ids[task] = bars.add_task(task, numbers={}, colour=colour)
            bars.update(ids[task], completed=done, total=total)

        yield show
