"""What a run will cost, without training: parameters, tokens, FLOPs, memory, steps, passes over each dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text
from torch import nn

from polyvit_fast.config import Source, Task, Train
from polyvit_fast.model.cost import (
    BF16_BYTES,
    FP32_BYTES,
    activation_bytes,
    backward_flops,
    forward_flops,
    num_parameters,
    num_trained_parameters,
    state_bytes,
)
from polyvit_fast.model.parameters import count_frozen_layers, freeze
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.hardware import choose_hardware
from polyvit_fast.train.output.table import build_table, task_cell
from polyvit_fast.train.schedule import check_warmup, count_steps, make_step_plan

GIB = 1 << 30
GPU_GIB = (16, 24, 40, 80)
COUNTED_RATIO = 0.8  # of a GPU's memory may be what is counted here; the rest is for what is not
MANY_PASSES = 300  # as many epochs as long recipes have on ImageNet alone (DeiT, arXiv 2012.12877)
SUSTAINED_FLOPS = 1e14  # a round number to scale from, about a tenth of the bf16 peak of an H100


@dataclass(frozen=True)
class TaskCost:
    """What one task costs (FLOPs of a view and of all its steps, activations of a micro-batch) and how much data it has.

    A number of samples is None when they cannot be listed; `problem` says why. `remarks` are what may be a mistake in the data.
    """

    name: str
    task: Task
    num_steps: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    num_train: int | None
    num_val: int | None
    problem: str
    num_frozen: int
    """Layers before the first that is trained."""
    remarks: tuple[str, ...] = ()

    @property
    def num_passes(self) -> float | None:
        """How often every training sample is seen."""
        return self.num_steps * self.task.batch / self.num_train if self.num_train else None


@dataclass(frozen=True)
class CostReport:
    """What a run costs: parameters by component of the model, memory that lasts for the whole run, and what each task takes."""

    config: Train
    parameters: dict[str, int]
    trained: dict[str, int]
    """As many of them are not frozen."""
    num_steps: int
    state_bytes: int
    tasks: list[TaskCost]

    @property
    def num_parameters(self) -> int:
        """Of all components."""
        return sum(self.parameters.values())

    @property
    def num_trained(self) -> int:
        """Parameters that are not frozen."""
        return sum(self.trained.values())

    @property
    def training_flops(self) -> int:
        """Of all steps."""
        return sum(row.training_flops for row in self.tasks)

    def peak_bytes(self, row: TaskCost, micro_batches: int | None = None) -> int:
        """Estimated memory during a step of a task, with another number of micro-batches if one is given."""
        task = replace(row.task, micro_batches=micro_batches or row.task.micro_batches)
        return self.state_bytes + _count_activations(self.config, task, row.num_frozen)

    def find_micro_batches(self, row: TaskCost, memory_bytes: float) -> int | None:
        """The least number of micro-batches whose peak stays within `memory_bytes`; None when single examples do not."""
        return next((number for number in _list_divisors(row.task.batch) if self.peak_bytes(row, number) <= memory_bytes), None)


def estimate_cost(config: Train) -> CostReport:
    """What `config` costs, on the device that it would have here. The model is built without memory; data is listed where it is there.

    Raises ValueError for a schedule that cannot work, or a pattern of `Optim.freeze` that does not.
    """
    config, plan = choose_hardware(config).config, make_step_plan(config)
    counts = count_steps(plan)
    with torch.device("meta"):
        model = PolyViT.from_config(config)
    freeze(model, config.optim.freeze)
    tasks = [_estimate_task(config, model, name, counts[name]) for name in config.tasks]
    parameters, trained = (_count_parameters(model, count) for count in (num_parameters, num_trained_parameters))
    return CostReport(config, parameters, trained, len(plan), state_bytes(model, config.optim, config.keeps_rounded), tasks)


def _estimate_task(config: Train, model: PolyViT, name: str, num_steps: int) -> TaskCost:
    task = config.tasks[name]
    (num_train, train_problem), (num_val, val_problem) = _count_samples(task.train, task), _count_samples(task.val, task)
    forward, problem = forward_flops(config.model, task.modality, task.num_classes), train_problem or val_problem
    backward = backward_flops(model, name, task.modality) if config.optim.freeze else 2 * forward
    training = (_count_forwards(config) * forward + backward) * task.batch * num_steps
    remarks = () if problem else tuple(dict.fromkeys([*task.train.remarks(task), *task.val.remarks(task)]))
    num_frozen = count_frozen_layers(model, name)
    activations = _count_activations(config, task, num_frozen)
    return TaskCost(name, task, num_steps, forward, training, activations, num_train, num_val, problem, num_frozen, remarks)


def _count_activations(config: Train, task: Task, num_frozen: int) -> int:
    more = {"residual": config.compute.residual, "keeps_rounded": config.keeps_rounded, "num_frozen": num_frozen}
    precision = "bf16" if config.precision == "bf16" else "fp32"
    return activation_bytes(config.model, task, precision, config.compute.recompute, **more)


def _count_forwards(config: Train) -> int:
    """Forward passes of a training step: its own, and one recomputed. A backward pass that multiplies each matrix twice costs two more."""
    return 2 if config.compute.recompute else 1


def _count_samples(source: Source, task: Task) -> tuple[int | None, str]:
    """(number of samples, "") or (None, why there are none)."""
    try:
        count = source.count(task)
    except (ValueError, OSError) as error:
        return None, str(error)
    return (count, "") if count else (None, f"{source} has no samples")


def _count_parameters(model: PolyViT, count: Callable[[nn.Module], int]) -> dict[str, int]:
    counts = {"trunk, shared by all tasks": count(model.blocks) + count(model.norm)}
    for name, tokenizer in model.tokenizers.items():
        adaptors = sum(count(child) for child in tokenizer.children())
        counts[f"tokenizer, {name}"] = count(tokenizer) - adaptors
        counts |= {f"adaptors, {name}": adaptors} if any(num_parameters(child) for child in tokenizer.children()) else {}
    return counts | {"heads, one per task": count(model.heads)}


def _list_divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def print_cost(config: Train) -> None:
    """Print what `config` costs: a headline, tables, notes."""
    hardware, console = choose_hardware(config), Console()
    report = estimate_cost(hardware.config)
    schedule, num_tasks = config.schedule, len(report.tasks)
    trained = f" ({report.num_trained:,} trained)" if report.num_trained < report.num_parameters else ""
    console.print(
        f"{report.num_parameters:,} parameters{trained}, {num_tasks} task{'s' * (num_tasks > 1)}, {report.num_steps:,} steps "
        f"({schedule if isinstance(schedule, str) else getattr(schedule, '__name__', 'own')} schedule), {_flop(report.training_flops)}",
        f"\nfor {hardware.describe()}{'; --device cuda counts for a GPU' * (report.config.device == 'cpu')}",
        markup=False,
        highlight=False,
    )
    for table in build_tables(report):
        console.print("", table, sep="\n")
    notes = Table.grid(padding=(0, 1))
    for note in write_notes(report):
        notes.add_row("-", Text(note))
    console.print("", notes, sep="\n")


def build_tables(report: CostReport) -> list[Table]:
    """The numbers as tables for `Console.print`; they fit into 80 columns."""
    frozen = report.num_trained < report.num_parameters
    parameters = build_table(["component"], ["parameters", "of all", *["trained"] * frozen], "Parameters")
    trained = report.trained | {"all": report.num_trained}
    for component, count in (report.parameters | {"all": report.num_parameters}).items():
        parameters.add_row(component, f"{count:,}", f"{count / report.num_parameters:.1%}", *[f"{trained[component]:,}"] * frozen)
    compute = build_table(["task", "modality"], ["grid", "tokens\nper view", "forward\nper view", "training\nin all", "of all"], "FLOPs")
    gpus = [f"{size}\nGiB" for size in GPU_GIB]
    title = "Memory, and how many micro-batches a GPU of so many GiB needs"
    memory = build_table(["task"], ["batch", "micro-\nbatches", "activations", "with the\nstate", *gpus], title)
    data = build_table(["task"], ["steps", "batch", "training\nsamples", "passes", "validation\nsamples", "views"], "Steps and data")
    for index, row in enumerate(report.tasks):
        task, modality, cell = row.task, row.task.modality, task_cell(row.name, index)
        grid, fraction = "×".join(map(str, modality.grid)), f"{row.training_flops / report.training_flops:.1%}"
        flops = [_scale(number, 1000, SI) for number in (row.forward_flops, row.training_flops)]
        compute.add_row(cell, modality.name, grid, f"{modality.num_tokens:,}", *flops, fraction)
        fits = [f"{report.find_micro_batches(row, COUNTED_RATIO * size * GIB) or '-'}" for size in GPU_GIB]
        used = (_bytes(row.activation_bytes), _bytes(report.peak_bytes(row)))
        memory.add_row(cell, f"{task.batch:,}", f"{task.micro_batches:,}", *used, *fits)
        num_train, num_val = ("-" if count is None else f"{count:,}" for count in (row.num_train, row.num_val))
        passes = "-" if row.num_passes is None else _round(row.num_passes)
        data.add_row(cell, f"{row.num_steps:,}", f"{task.batch:,}", num_train, passes, num_val, f"{modality.eval_views:,}")
    return [parameters, compute, memory, data]


def write_notes(report: CostReport) -> list[str]:
    """What the numbers mean, a paragraph each: first what may need a change."""
    return [_note_largest(report), *_note_steps(report), *_note_state(report), _note_compute(report)]


def _note_largest(report: CostReport) -> str:
    row = max(report.tasks, key=lambda row: row.activation_bytes)
    equal = sum(other.activation_bytes == row.activation_bytes for other in report.tasks) - 1
    start = f"{row.name} needs the most memory{f' (like {equal} more)' if equal else ''}, {_bytes(report.peak_bytes(row))}"
    more = [number for number in _list_divisors(row.task.batch) if number > row.task.micro_batches]
    if more:
        lower = _bytes(report.peak_bytes(row, more[0]))
        return f"{start}; --tasks.{row.name}.micro-batches {more[0]} lowers that to {lower}, with the same gradient."
    config = report.config
    recomputed = replace(config, compute=replace(config.compute, recompute=True))
    for flag, other in (("--precision bf16", replace(config, precision="bf16")), ("--recompute", recomputed)):
        if (lower := replace(report, config=other).peak_bytes(row)) < report.peak_bytes(row):
            return f"{start}, with single examples; {flag} lowers that to {_bytes(lower)}."
    return f"{start}, with single examples in {config.precision}: a smaller model or grid lowers that."


def _note_steps(report: CostReport) -> Iterator[str]:
    if warning := check_warmup(report.config, report.num_steps):
        yield warning
    if idle := [row.name for row in report.tasks if not row.num_steps]:
        yield f"No step in this schedule: {', '.join(idle)}. They are evaluated with the heads that they began with."
    for row in report.tasks:
        if row.problem:
            yield f"No samples of {row.name}: {row.problem}."
        yield from (f"{row.name}: {remark}." for remark in row.remarks)
        passes = row.num_passes or 1
        if passes > MANY_PASSES:
            yield f"{row.name} goes {_round(passes)} times over its training samples: expect overfitting, or plan fewer steps."
        if passes < 1:
            yield f"{row.name} sees only {_round(100 * passes)}% of its training samples: plan more steps to use all."


def _note_state(report: CostReport) -> Iterator[str]:
    config = report.config
    more = ", moving average" * bool(config.optim.ema_decay) + ", the parameters in bf16 too" * config.keeps_rounded
    again = ", each block's input and what one block keeps" * config.compute.recompute
    yield (
        f"The state, {_bytes(report.state_bytes)}, lasts for the whole run: parameters, gradients, optimizer{more}. "
        f"Activations are what a micro-batch keeps for its backward pass in {config.precision}{again}. Short-lived results and the "
        f"allocator's slack are not counted; the columns of GPUs leave {1 - COUNTED_RATIO:.0%} for them (-: even one example is too much)."
    )
    if report.num_trained < report.num_parameters:
        yield (
            "Frozen parameters need no gradient and no optimizer state, and up to the first layer that is trained no activations are kept."
        )
    not_saved = FP32_BYTES * report.num_trained + BF16_BYTES * config.keeps_rounded * report.num_parameters  # gradients, rounded parameters
    not_trained = report.num_parameters - report.num_trained  # a moving average is stored whole
    size = _bytes(report.state_bytes - not_saved + FP32_BYTES * not_trained * bool(config.optim.ema_decay))
    yield f"A checkpoint takes {size} on disk; up to {config.log.keep + 1} stay (keep = {config.log.keep}, and the best)."


def _note_compute(report: CostReport) -> str:
    forwards = {1: "three", 2: "four"}[_count_forwards(report.config)]
    if report.config.optim.freeze:
        forwards = _round(report.training_flops / sum(row.forward_flops * row.task.batch * row.num_steps for row in report.tasks))
    text = f"FLOPs are two per multiplication of matrices in blocks, patches and head; training takes {forwards} times the forward pass."
    hours = report.training_flops / SUSTAINED_FLOPS / 3600
    if hours > 0.1:
        time = f"{_round(hours / 24)} days" if hours > 48 else f"{_round(hours)} hours"
        text += f" {_flop(report.training_flops)} are {time} at a sustained {_flop(SUSTAINED_FLOPS)}/s."
    if any(row.num_val is None for row in report.tasks):
        return text
    interval = report.config.log.eval_every_steps
    times = -(-report.num_steps // interval) if interval else 1
    once = sum(row.forward_flops * row.task.modality.eval_views * (row.num_val or 0) for row in report.tasks)
    return f"{text} Evaluation, {'once' if times == 1 else f'{times:,} times'}, adds {times * once / report.training_flops:.1%}."


SI = ["", "K", "M", "G", "T", "P", "E", "Z", "Y"]


def _flop(number: float) -> str:
    return f"{_scale(number, 1000, SI)}FLOP"


def _bytes(number: float) -> str:
    return _scale(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def _scale(number: float, base: int, suffixes: list[str]) -> str:
    """Three digits and a unit."""
    unit, suffix = pick_unit_and_suffix(round(number), suffixes, base)
    return f"{_round(number / unit)} {suffix}"


def _round(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"
