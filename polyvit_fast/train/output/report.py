"""What a run will cost, said without training: parameters, tokens, FLOPs, memory, steps, passes over each dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyvit_fast.config import Source, Task, Train
from polyvit_fast.model.cost import BF16_BYTES, FP32_BYTES, activation_bytes, forward_flops, num_parameters, state_bytes
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.schedule import count_steps, make_step_plan, warmup_note

GIB = 1 << 30
GPU_GIB = (16, 24, 40, 80)
COUNTED_RATIO = 0.8  # of a GPU's memory may be what is counted here; the rest is for what is not
MANY_PASSES = 300  # as many epochs as long recipes have on ImageNet alone (DeiT, arXiv 2012.12877)
SUSTAINED_FLOPS = 1e14  # a round number to scale from, about a tenth of the bf16 peak of an H100


@dataclass(frozen=True)
class TaskReport:
    """What one task costs (`num_steps` in this schedule, FLOPs of a view, activations of a micro-batch) and how much data it has.

    A number of samples is None when they cannot be listed; `problem` says why. `remarks` tell what may be a mistake in the data.
    """

    name: str
    task: Task
    num_steps: int
    forward_flops: int
    num_forwards: int
    activation_bytes: int
    num_train: int | None
    num_val: int | None
    problem: str
    remarks: tuple[str, ...] = ()

    @property
    def training_flops(self) -> int:
        """Of all its steps, each view of which costs `num_forwards` forward passes."""
        return self.num_forwards * self.forward_flops * self.task.batch * self.num_steps

    @property
    def num_passes(self) -> float | None:
        """How often every training sample is seen."""
        return self.num_steps * self.task.batch / self.num_train if self.num_train else None


@dataclass(frozen=True)
class Report:
    """What a run costs: parameters by part of the model, memory that lasts for the whole run, and what each task takes."""

    config: Train
    parameters: dict[str, int]
    num_steps: int
    state_bytes: int
    tasks: list[TaskReport]

    @property
    def num_parameters(self) -> int:
        """Of all parts."""
        return sum(self.parameters.values())

    @property
    def training_flops(self) -> int:
        """Of all steps."""
        return sum(row.training_flops for row in self.tasks)

    def peak_bytes(self, row: TaskReport, micro_batches: int | None = None) -> int:
        """Estimated memory during a step of a task, with another number of micro-batches if one is given."""
        if micro_batches is None:
            return self.state_bytes + row.activation_bytes
        task = replace(row.task, micro_batches=micro_batches)
        return self.state_bytes + _kept_bytes(self.config, task)

    @property
    def is_large(self) -> bool:
        """Whether some task's whole batch is too much for the smallest GPU."""
        return any(self.peak_bytes(row, 1) > COUNTED_RATIO * GPU_GIB[0] * GIB for row in self.tasks)

    def fitting_micro_batches(self, row: TaskReport, memory_bytes: float) -> int | None:
        """The least number of micro-batches whose peak stays within `memory_bytes`; None when single examples do not."""
        return next((n for n in _divisors(row.task.batch) if self.peak_bytes(row, n) <= memory_bytes), None)


def plan_report(config: Train) -> Report:
    """What `config` costs. The model is built without memory; the data is listed where it is there.

    Raises ValueError for a schedule that cannot work.
    """
    plan = make_step_plan(config)
    counts = count_steps(plan)
    with torch.device("meta"):
        model = PolyViT.from_config(config)
    tasks = [_task_report(config, name, counts[name]) for name in config.tasks]
    return Report(config, _parameters(model), len(plan), state_bytes(model, config.optim, config.keeps_rounded), tasks)


def _task_report(config: Train, name: str, num_steps: int) -> TaskReport:
    task = config.tasks[name]
    (num_train, train_problem), (num_val, val_problem) = _count(task.train, task), _count(task.val, task)
    flops, problem = forward_flops(config.model, task.modality, task.num_classes), train_problem or val_problem
    remarks = () if problem else tuple(dict.fromkeys([*task.train.remarks(task), *task.val.remarks(task)]))
    return TaskReport(name, task, num_steps, flops, _num_forwards(config), _kept_bytes(config, task), num_train, num_val, problem, remarks)


def _kept_bytes(config: Train, task: Task) -> int:
    more = {"residual": config.compute.residual, "keeps_rounded": config.keeps_rounded}
    return activation_bytes(config.model, task, config.precision, config.compute.recompute, **more)


def _num_forwards(config: Train) -> int:
    """Forward passes that a training step costs: its own, two for a backward pass that multiplies each matrix twice, one recomputed."""
    return 4 if config.compute.recompute else 3


def _count(source: Source, task: Task) -> tuple[int | None, str]:
    """(number of samples, "") or (None, why there are none)."""
    try:
        count = source.count(task)
    except (ValueError, OSError) as error:
        return None, str(error)
    return (count, "") if count else (None, f"{source} has no samples")


def _parameters(model: PolyViT) -> dict[str, int]:
    parts = {"trunk, shared by all tasks": num_parameters(model.blocks) + num_parameters(model.norm)}
    for name, tokenizer in model.tokenizers.items():
        adaptors = sum(num_parameters(child) for child in tokenizer.children())
        parts[f"tokenizer, {name}"] = num_parameters(tokenizer) - adaptors
        parts |= {f"adaptors, {name}": adaptors} if adaptors else {}
    return parts | {"heads, one per task": num_parameters(model.heads)}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def report_tables(report: Report) -> list[Table]:
    """The numbers as tables for `Console.print`; they fit into 80 columns."""
    return [_parameter_table(report), _compute_table(report), _memory_table(report), _data_table(report)]


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_edge=False)
    for header in words:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _parameter_table(report: Report) -> Table:
    table = _table("Parameters", ("part",), ("parameters", "share"))
    for part, count in report.parameters.items():
        table.add_row(part, f"{count:,}", f"{count / report.num_parameters:.1%}")
    table.add_row("all", f"{report.num_parameters:,}", "")
    return table


def _compute_table(report: Report) -> Table:
    table = _table("FLOPs", ("task", "modality", "grid"), ("tokens\nper view", "forward\nper view", "training\nin all", "share"))
    for row in report.tasks:
        modality, flops = row.task.modality, row.training_flops
        grid = "×".join(str(size) for size in modality.grid)
        costs = (_flops(row.forward_flops), _flops(flops), f"{flops / report.training_flops:.1%}")
        table.add_row(row.name, modality.name, grid, f"{modality.num_tokens:,}", *costs)
    return table


def _memory_table(report: Report) -> Table:
    sizes = GPU_GIB if report.is_large else ()
    title = f"Memory{', and how many micro-batches a GPU of so many GiB needs' if sizes else ''}"
    numbers = ("batch", "micro-\nbatches", "activa-\ntions", "with the\nstate", *(f"{size}\nGiB" for size in sizes))
    table = _table(title, ("task",), numbers)
    for row in report.tasks:
        fits = [report.fitting_micro_batches(row, COUNTED_RATIO * size * GIB) for size in sizes]
        memory = (_bytes(row.activation_bytes), _bytes(report.peak_bytes(row)))
        table.add_row(row.name, f"{row.task.batch:,}", f"{row.task.micro_batches:,}", *memory, *(f"{fit or '-'}" for fit in fits))
    return table


def _data_table(report: Report) -> Table:
    table = _table("Steps and data", ("task",), ("steps", "batch", "training\nsamples", "passes", "validation\nsamples", "views"))
    for row in report.tasks:
        num_train, num_val = ("-" if count is None else f"{count:,}" for count in (row.num_train, row.num_val))
        passes = "-" if row.num_passes is None else _digits(row.num_passes)
        numbers = (f"{row.num_steps:,}", f"{row.task.batch:,}", num_train, passes, num_val, f"{row.task.modality.eval_views:,}")
        table.add_row(row.name, *numbers)
    return table


def report_notes(report: Report) -> list[str]:
    """What the numbers mean, a paragraph each: first what may need a change."""
    notes = [_largest_note(report), *_step_notes(report), *_data_notes(report), _memory_note(report), _compute_note(report)]
    return [*notes, _disk_note(report)]


def _largest_note(report: Report) -> str:
    row = max(report.tasks, key=lambda row: row.activation_bytes)
    equal = sum(other.activation_bytes == row.activation_bytes for other in report.tasks) - 1
    start = f"{row.name} needs the most memory{f' (like {equal} more)' if equal else ''}, {_bytes(report.peak_bytes(row))}"
    more = [n for n in _divisors(row.task.batch) if n > row.task.micro_batches]
    if more:
        lower = _bytes(report.peak_bytes(row, more[0]))
        return f"{start}; --tasks.{row.name}.micro-batches {more[0]} lowers that to {lower}, with the same gradient."
    config = report.config
    recomputed = replace(config, compute=replace(config.compute, recompute=True))
    for flag, other in (("--precision bf16", replace(config, precision="bf16")), ("--recompute", recomputed)):
        lower = replace(report, config=other).peak_bytes(row, row.task.micro_batches)
        if lower < report.peak_bytes(row):
            return f"{start}, with single examples; {flag} lowers that to {_bytes(lower)}."
    return f"{start}, with single examples in {report.config.precision}: a smaller model or grid lowers that."


def _step_notes(report: Report) -> Iterator[str]:
    endless = warmup_note(report.config, report.num_steps)
    if endless:
        yield endless
    idle = [row.name for row in report.tasks if not row.num_steps]
    if idle:
        yield f"No step in this schedule: {', '.join(idle)}. They are evaluated with the heads that they began with."


def _data_notes(report: Report) -> Iterator[str]:
    for row in report.tasks:
        if row.problem:
            yield f"No samples of {row.name}: {row.problem}."
        yield from (f"{row.name}: {remark}." for remark in row.remarks)
        if row.num_passes is None or not row.num_steps:
            continue
        if row.num_passes > MANY_PASSES:
            yield f"{row.name} goes {_digits(row.num_passes)} times over its training samples: expect overfitting, or plan fewer steps."
        if row.num_passes < 1:
            yield f"{row.name} sees only {_digits(100 * row.num_passes)}% of its training samples: plan more steps to use all."


def _memory_note(report: Report) -> str:
    average = ", moving average" if report.config.optim.ema_decay else ""
    rounded = ", the parameters in bf16 too" if report.config.keeps_rounded else ""
    free = f", but the columns of GPUs leave {1 - COUNTED_RATIO:.0%} for them (-: even one example is too much)"
    again = ", each block's input and what one block keeps" if report.config.compute.recompute else ""
    return (
        f"The state, {_bytes(report.state_bytes)}, lasts for the whole run: parameters, gradients, optimizer{average}{rounded}. "
        f"Activations are what a micro-batch keeps for its backward pass in {report.config.precision}{again}. Short-lived results and the "
        f"allocator's slack are not counted{free if report.is_large else ''}."
    )


def _compute_note(report: Report) -> str:
    passes = {3: "three", 4: "four"}[_num_forwards(report.config)]
    text = f"FLOPs are two per multiplication of matrices in blocks, patches and head; training takes {passes} times the forward pass."
    hours = report.training_flops / SUSTAINED_FLOPS / 3600
    if hours > 0.1:
        time = f"{_digits(hours / 24)} days" if hours > 48 else f"{_digits(hours)} hours"
        text += f" {_flops(report.training_flops)}FLOP are {time} at a sustained {_flops(SUSTAINED_FLOPS)}FLOP/s."
    if any(row.num_val is None for row in report.tasks):
        return text
    interval = report.config.log.eval_every_steps
    times = -(-report.num_steps // interval) if interval else 1
    once = sum(row.forward_flops * row.task.modality.eval_views * (row.num_val or 0) for row in report.tasks)
    return f"{text} Evaluation, {'once' if times == 1 else f'{times:,} times'}, adds {times * once / report.training_flops:.1%}."


def _disk_note(report: Report) -> str:
    not_saved = FP32_BYTES + BF16_BYTES * report.config.keeps_rounded  # gradients, rounded parameters
    size = report.state_bytes - not_saved * report.num_parameters
    keep = report.config.log.keep
    return f"A checkpoint takes {_bytes(size)} on disk; up to {keep + 1} stay (keep = {keep}, and the best)."


def print_plan(config: Train) -> None:
    """Print what `config` costs: a headline, tables, notes."""
    report, console = plan_report(config), Console()
    console.print(_headline(report))
    for table in report_tables(report):
        console.print()
        console.print(table)
    console.print()
    notes = Table.grid(padding=(0, 1))
    for note in report_notes(report):
        notes.add_row("-", Text(note))
    console.print(notes)


def _headline(report: Report) -> Text:
    schedule, num_tasks = report.config.schedule, len(report.tasks)
    return Text(
        f"{report.num_parameters:,} parameters, {num_tasks} task{'s' * (num_tasks > 1)}, {report.num_steps:,} steps "
        f"({schedule if isinstance(schedule, str) else getattr(schedule, '__name__', 'own')} schedule), {_flops(report.training_flops)}FLOP"
    )


def _flops(number: int | float) -> str:
    return _scaled(number, 1000, ("", "K", "M", "G", "T", "P", "E", "Z", "Y"))


def _bytes(number: int | float) -> str:
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(number: int | float, base: int, units: tuple[str, ...]) -> str:
    """Three digits and a unit."""
    power = 0
    while number >= 0.9995 * base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{_digits(number)} {units[power]}"


def _digits(number: int | float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"
