"""What a run reports while it runs: progress on the terminal, metrics.jsonl, TensorBoard, log.txt.

Nothing here stops a training: when a disk is full, a folder or the terminal is gone, that output ends with one warning and the run goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.extras import require
from polyvit_fast.files import write_atomically
from polyvit_fast.train.output.table import build_table

Rows = Mapping[str, Mapping[str, int | float]]
"""Numbers by task and name."""
STYLES = {"info": "", "warning": "yellow", "error": "bold red"}
TERMINAL = "the terminal"
FORMATTED = ("loss", "accuracy", "examples_per_second", "steps", "data_wait_ratio")
MIN_WAIT_RATIO = 0.05  # of a task's time: less waiting for data is not shown


class Log:
    """Where the training loop reports to; use it as a context manager.

    `totals` are the steps of each task, `done` those already made when the run was resumed. On a terminal there is a bar for the run and
    one for each task; elsewhere a line per interval. Lines of metrics.jsonl beyond `resumed_step` are dropped, so that no step appears
    twice.
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
        self.console = console or _Terminal()
        self.total_steps, self.said = total_steps, time.monotonic()
        self.first_tick: tuple[int, float] | None = None
        self.given_up: set[str] = set()
        self.text = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self.last = _drop_later_lines(folder / "metrics.jsonl", resumed_step)
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in __exit__
        # TensorBoard hides the points of earlier writers from the purge step on.
        purge_step = resumed_step + 1 if resumed_step else 0
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=30)
        self.progress = _build_progress(self.console)
        self.eval_bar: TaskID | None = None
        self.run_bar = self.progress.add_task("all tasks", total=total_steps, completed=resumed_step, numbers="")
        self.task_bars = {
            name: self.progress.add_task(name, total=total, completed=(done or {}).get(name, 0), numbers="")
            for name, total in totals.items()
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
        """Report the means since the last interval: for each task that had a step its loss, accuracy, examples_per_second, steps, and the
        fraction of its time in which the device waited for its data.
        """
        self._write_metrics("train", step, rows, lr=lr)
        self.progress.update(self.run_bar, completed=step, numbers=f"lr {lr:.3g}")
        for name, row in rows.items():
            self.progress.update(self.task_bars[name], numbers=_format_row(row))
        line = f"step {step:,}/{self.total_steps:,} ({step / max(1, self.total_steps):.0%}), {self._time_left(step)} left, lr {lr:.3g}"
        line += "".join(f" | {name} {_format_row(row)}" for name, row in rows.items())
        self._say(line, shown=not self.console.is_terminal)

    def show_evaluation(self, task: str, done: int, total: int) -> None:
        """Show how many of a task's held-out samples are evaluated: a bar, or a line every ten seconds."""
        self._attempt(TERMINAL, lambda: self._move_eval_bar(task, done, total))
        if not self.console.is_terminal and time.monotonic() - self.said > 10:
            self._say(f"evaluating {task}: {done:,} of {total:,}")

    def _move_eval_bar(self, task: str, done: int, total: int) -> None:
        if self.eval_bar is None:
            self.eval_bar = self.progress.add_task("", numbers="")
        self.progress.update(self.eval_bar, description=f"evaluating {task}", completed=done, total=total)

    def log_evaluation(self, step: int, rows: Rows) -> None:
        """Report each task's metrics on its held-out samples."""
        if self.eval_bar is not None:
            self.progress.remove_task(self.eval_bar)
            self.eval_bar = None
        self._write_metrics("eval", step, rows)
        for name, row in rows.items():
            self._say(f"step {step:,}: {name}: " + ", ".join(f"{key} {_format_number(value)}" for key, value in row.items()))

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
            show = partial(self.progress.console.print, text, style=style, markup=False, highlight=False, soft_wrap=True)
            self._attempt(TERMINAL, show)
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
        self.rank, self.console = rank, console or _Terminal(stderr=True, highlight=False)

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
                self.console.print(f"process {self.rank}: {level}: {text}", style=STYLES[level], markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Rank 0 keeps the log file."""


class _Terminal(Console):
    """Goes silent when its pipe is closed, where rich's own console would end the process."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def _build_progress(console: Console) -> Progress:
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    ]
    # A refresh takes the interpreter for about 4 ms with nine tasks: twice a second is enough.
    return Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal)


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


def _format_row(row: Mapping[str, int | float]) -> str:
    texts = [f"loss {row['loss']:.3f}"] if "loss" in row else []
    texts += [f"acc {row['accuracy']:.1%}"] if "accuracy" in row else []
    texts += [f"{row['examples_per_second']:,.0f}/s"] if "examples_per_second" in row else []
    waited = row.get("data_wait_ratio", 0)
    texts += [f"waits {waited:.0%}"] if waited >= MIN_WAIT_RATIO else []
    # Counts of trouble, such as skipped steps, when there is any.
    texts += [f"{key} {value}" for key, value in row.items() if key not in FORMATTED and value]
    return " ".join(texts)


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
    """The results as a table for `Console.print`."""
    table = build_table(["task", "modality", "metric"], ["value", "steps", "examples/s"])
    for row in rows:
        speed = f"{row.examples_per_second:,.0f}" if math.isfinite(row.examples_per_second) else "-"
        table.add_row(row.task, row.modality, row.metric, f"{row.value:.4f}", f"{row.steps:,}", speed)
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
        table.add_row(name, task.modality.name, task.metric, *numbers, *counts)
    Console().print(table)


@contextmanager
def show_evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (task, done, total) of an evaluation: on a terminal it moves a bar for each task."""
    bars: dict[str, TaskID] = {}
    with _build_progress(Console()) as progress:

        def show(task: str, done: int, total: int) -> None:
            if task not in bars:
                bars[task] = progress.add_task(f"evaluating {task}", numbers="")
            progress.update(bars[task], completed=done, total=total)

        yield show
