"""What a run reports while it runs: progress on the terminal, metrics.jsonl, TensorBoard, log.txt.

Nothing here stops a training: when a disk is full, a folder or the terminal is gone, that output ends with one warning and the run goes on.
"""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.extras import require
from polyvit_fast.files import write_atomically
from polyvit_fast.train.output.bars import Row, TaskBars, Terminal, format_numbers
from polyvit_fast.train.output.colours import task_colour
from polyvit_fast.train.output.table import build_table, task_cell

Rows = Mapping[str, Row]
"""Numbers by task and name."""
STYLES = {"info": "", "warning": "yellow", "error": "bold red"}
TERMINAL = "the terminal"


class Log:
    """Where the training loop reports to; use it as a context manager.

    `totals` are the steps of each task in the order of the configuration, `done` those already made when the run was resumed. On a
    terminal there is a bar for the run and one for each task; elsewhere each interval has a line and one for each task. Lines of
    metrics.jsonl beyond `resumed_step` are dropped, so that no step appears twice.
    """

    def __init__(
        self,
        folder: Path,
        totals: Mapping[str, int],
        total_steps: int,
        resumed_step: int = 0,
        *,
        done: Mapping[str, int] | None = None,
        console: Console | None = None,
    ) -> None:
        require("a run's log", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes long to import

        folder.mkdir(parents=True, exist_ok=True)
        self.console = console or Terminal()
        self.total_steps, self.said = total_steps, time.monotonic()
        self.first_tick: tuple[int, float] | None = None
        self.given_up: set[str] = set()
        self.text = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self.last = _drop_later_lines(folder / "metrics.jsonl", resumed_step)
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in __exit__
        # TensorBoard hides the points of earlier writers from the purge step on.
        purge_step = resumed_step + 1 if resumed_step else 0
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=30)
        self.progress = TaskBars(self.console)
        self.eval_bar: TaskID | None = None
        self.colours = {name: task_colour(index) for index, name in enumerate(totals)}
        self.run_bar = self.progress.add_task("all tasks", total=total_steps, completed=resumed_step, numbers={}, colour="")
        self.task_bars = {
            name: self.progress.add_task(name, total=total, completed=(done or {}).get(name, 0), numbers={}, colour=self.colours[name])
            for name, total in totals.items()
            if total
        }

    def __enter__(self) -> Log:
        self._attempt(TERMINAL, self.progress.start)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self.progress.stop()
        for name, close in (("TensorBoard", self.tensorboard.close), ("metrics.jsonl", self.metrics.close), ("log.txt", self.text.close)):
            self._attempt(name, close)
            with suppress(OSError, ValueError):  # a second time, should the output have failed before
                close()

    def tick(self, step: int, task: str | Sequence[str]) -> None:
        """Count one more step of `task` (or of all tasks of an accumulating step); `step` steps of the run are then done."""
        if self.first_tick is None:
            self.first_tick = step, time.monotonic()
        self.progress.update(self.run_bar, completed=step)
        for name in (task,) if isinstance(task, str) else task:
            self.progress.advance(self.task_bars[name])

    def log_interval(self, step: int, lr: float, rows: Rows) -> None:
        """Report the means since the last interval, for each task that had a step: its loss, accuracy, examples_per_second, steps,
        grad_norm, clipped_ratio and lr, and as data_wait_ratio the fraction of its time in which the device waited for its data.
        """
        self._write_metrics("train", step, rows, lr=lr)
        self.progress.update(self.run_bar, completed=step, numbers={"lr": lr})
        for name, row in rows.items():
            self.progress.update(self.task_bars[name], numbers=row)
        shown, width = not self.console.is_terminal, max(map(len, self.task_bars), default=0)
        fraction = f"{step / max(1, self.total_steps):.0%}"
        self._say(f"step {step:,}/{self.total_steps:,} ({fraction}), {self._time_left(step)} left, lr {lr:.3g}", shown=shown)
        for name, row in rows.items():
            self._say(f"step {step:,}: {name:{width}} {_format_row(row)}", shown=shown)

    def show_evaluation(self, task: str, done: int, total: int) -> None:
        """Show how many of a task's held-out samples are evaluated: a bar, or a line every ten seconds."""
        self._attempt(TERMINAL, lambda: self._move_eval_bar(task, done, total))
        if not self.console.is_terminal and time.monotonic() - self.said > 10:
            self._say(f"evaluating {task}: {done:,} of {total:,}")

    def _move_eval_bar(self, task: str, done: int, total: int) -> None:
        if self.eval_bar is None:
            self.eval_bar = self.progress.add_task("", numbers={}, colour="")
        colour = self.colours.get(task, "")
        self.progress.update(self.eval_bar, description=f"eval {task}", completed=done, total=total, colour=colour)

    def log_evaluation(self, step: int, rows: Rows) -> None:
        """Report each task's metrics on its held-out samples."""
        if self.eval_bar is not None:
            self.progress.remove_task(self.eval_bar)
            self.eval_bar = None
        self._write_metrics("eval", step, rows)
        for name, row in rows.items():
            self._say(f"step {step:,}: {name}: {_format_evaluation(row)}")

    def message(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Print a text above the bars and add it to log.txt."""
        self._say(text if level == "info" else f"{level}: {text}", style=STYLES[level])

    def note(self, text: str) -> None:
        """Add a text to log.txt alone."""
        self._say(text, shown=False)

    def _say(self, text: str, *, style: str = "", shown: bool = True) -> None:
        text = text.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are no UTF-8
        if shown:
            self.said = time.monotonic()
            self._attempt(TERMINAL, partial(_print, self.progress.console, text, style))
        self._attempt("log.txt", lambda: self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"))

    def _write_metrics(self, kind: str, step: int, rows: Rows, **more: float) -> None:
        if step <= self.last.get(kind, -1):
            return
        self.last[kind] = step
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **more, "tasks": rows}
        self._attempt("metrics.jsonl", lambda: self.metrics.write(strict_json.dumps(line) + "\n"))
        self._attempt("TensorBoard", lambda: self._add_scalars(kind, step, rows, more))

    def _add_scalars(self, kind: str, step: int, rows: Rows, more: Mapping[str, float]) -> None:
        points = {f"{task}/{kind}/{key}": value for task, row in rows.items() for key, value in row.items()}
        for tag, value in {**more, **points}.items():
            self.tensorboard.add_scalar(tag, value, step)

    def _attempt(self, name: str, write: Callable[[], Any]) -> None:
        """Write, unless that output failed before; the first failure is reported."""
        if name in self.given_up:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            self.given_up.add(name)
            self.message(f"{name} is not written any more: {error}", "warning")

    def _time_left(self, step: int) -> timedelta:
        # From the first step on: what comes before it, such as making the demo's files, does not come again.
        first, started = self.first_tick or (step, time.monotonic())
        per_step = (time.monotonic() - started) / max(1, step - first)
        return timedelta(seconds=round(per_step * (self.total_steps - step)))


class PeerLog:
    """Where the processes other than rank 0 report to: warnings and errors go to the terminal, rank 0 writes all else."""

    def __init__(self, rank: int, console: Console | None = None) -> None:
        self.rank, self.console = rank, console or Terminal(stderr=True, highlight=False)

    def __enter__(self) -> PeerLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def tick(self, step: int, task: str | Sequence[str]) -> None:
        """Rank 0 counts."""

    def log_interval(self, step: int, lr: float, rows: Rows) -> None:
        """Rank 0 reports the means of all."""

    def show_evaluation(self, task: str, done: int, total: int) -> None:
        """Rank 0 shows the bar."""

    def log_evaluation(self, step: int, rows: Rows) -> None:
        """Rank 0 reports the metrics, which are the same."""

    def message(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Print a warning or an error of this process; information is the same on all of them, and rank 0 prints it."""
        if level != "info":
            with suppress(OSError):
                _print(self.console, f"process {self.rank}: {level}: {text}", STYLES[level])

    def note(self, text: str) -> None:
        """Rank 0 keeps the log file."""


def _print(console: Console, text: str, style: str) -> None:
    """Print a text. On a terminal its lines end between words, and words longer than a line are left whole; elsewhere it is one line."""
    if console.is_terminal:
        options = {"width": console.width, "break_long_words": False, "break_on_hyphens": False}
        text = "\n".join(textwrap.fill(line, **options) for line in text.split("\n"))
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _drop_later_lines(path: Path, step: int) -> dict[str, int]:
    """Cut metrics.jsonl back to its lines up to `step`, and from the first broken one on; returns the last step of each kind."""
    last: dict[str, int] = {}
    kept = []
    for text in path.read_text().splitlines() if path.is_file() and step else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] <= step:
            kept.append(text + "\n")
            last[line["kind"]] = line["step"]
    write_atomically(path, "".join(kept))
    return last


def _format_row(row: Row) -> str:
    """A task's numbers as a text: loss 1.250 acc 50.0% 1,234/s norm 0.821 lr 0.001."""
    patterns = {"ex/s": "{}/s", "skipped": "{} skipped", "broken": "{} broken"}
    return " ".join(patterns.get(head, f"{head} {{}}").format(text) for head, text in format_numbers(row).items())


def _format_evaluation(row: Row) -> str:
    """An evaluation's numbers as a text: top1 0.7500, loss 1.2500, 300 files, 2 left out as broken, 915/s."""
    words = {"num_examples": "{:,.0f} files", "num_broken": "{:,.0f} left out as broken", "examples_per_second": "{:,.0f}/s"}
    shown = {name: value for name, value in row.items() if name != "num_broken" or value}
    return ", ".join(words[name].format(value) if name in words else f"{name} {_format_number(value)}" for name, value in shown.items())


def _format_number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


@dataclass(frozen=True)
class Result:
    """A line of the table at the end of a run."""

    task: str
    modality: str
    metric: str
    value: float
    steps: int
    examples_per_second: float


def build_result_table(rows: Sequence[Result]) -> Table:
    """The results of all tasks, in the order of the configuration, as a table for `Console.print`."""
    table = build_table(["task", "modality", "metric"], ["value", "steps", "examples/s"])
    for index, row in enumerate(rows):
        speed = f"{row.examples_per_second:,.0f}" if math.isfinite(row.examples_per_second) else "-"
        table.add_row(task_cell(row.task, index), row.modality, row.metric, f"{row.value:.4f}", f"{row.steps:,}", speed)
    return table


def print_results(rows: Sequence[Result]) -> None:
    """Print the table of results."""
    Console().print(build_result_table(rows))


def print_evaluation(config: Train, rows: Rows) -> None:
    """Print each task's metrics as `evaluate` gives them, its own metric first."""
    table = build_table(["task", "modality", "metric"], ["value", "top5", "loss", "files", "broken"])
    for name, row in rows.items():
        task = config.tasks[name]
        numbers = [_format_number(row[key]) if key in row else "-" for key in (task.metric, "top5", "loss")]
        counts = [f"{row[key]:,.0f}" for key in ("num_examples", "num_broken")]
        table.add_row(task_cell(name, list(config.tasks).index(name)), task.modality.name, task.metric, *numbers, *counts)
    Console().print(table)
