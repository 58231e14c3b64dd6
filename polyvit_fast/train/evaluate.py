"""Evaluation: every validation sample once, logits averaged over its views."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.data.decoder_messages import catch_decoder_messages
from polyvit_fast.data.sources.classes import recall_classes
from polyvit_fast.data.stream import Batch, DataError, Loader, prefetch, request_validation_batches
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.process_group import ALONE, World, process_group
from polyvit_fast.train.metrics import Metrics
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.checkpoint import find_checkpoint
from polyvit_fast.train.run_folder.resume import describe_other_files
from polyvit_kernels.ops.attention import check_backend

Progress = Callable[[str, int, int], None]
Split = Literal["train", "val", "test"]
Weights = Literal["auto", "model", "ema"]
Keep = Callable[[Loader, Sequence[int], Tensor, Tensor], None]
"""Takes the answers to a batch: the task's loader, the numbers of its samples, their logits and their labels."""

_logger = logging.getLogger(__name__)


def _ignore(*_: object) -> None:
    """For the processes that print and keep nothing: rank 0 does."""


@contextmanager
def use_device(config: Train, world: World = ALONE) -> Iterator[None]:
    """Inside, PyTorch computes with the configuration's number of threads. Raises ValueError when its device or library is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda: PyTorch finds no NVIDIA GPU here; use --device cpu, or look at what nvidia-smi says")
    check_backend(config.compute.attention, config.device)
    before = torch.get_num_threads()
    torch.set_num_threads(config.compute.compute_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def average_logits(model: PolyViT, task: str, grid: Tensor, precision: str) -> Tensor:
    """Logits `[batch, num_classes]` of `[batch, views, frames, rows, columns, channels]`, averaged over views (scenic's rule)."""
    batch, views = grid.shape[:2]
    with torch.autocast(grid.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(grid.flatten(0, 1), task)
    return logits.float().view(batch, views, -1).mean(1)


def evaluate(
    model: PolyViT, config: Train, loaders: dict[str, Loader], progress: Progress, world: World = ALONE, keep: Keep = _ignore
) -> dict[str, dict[str, float]]:
    """The metrics of each task in `loaders`, with `num_examples`, `num_broken` files left out and `examples_per_second`.

    The clock of that rate starts when the first batch is there, so that neither imports nor the building of decoders count, nor the
    examples of that batch. Where there is no other, the rate is that at which the model computes it.
    The processes of `world` divide the batches, and all get the metrics that one process would compute. `progress(task, done, total)` is
    called after every round of batches, equally often on each process; `keep` gets the answers to every batch, in the order of the samples.
    """
    was_training = model.training
    model.eval()
    try:
        return {name: _evaluate_task(model, config, loader, progress, world, keep) for name, loader in loaders.items()}
    finally:
        model.train(was_training)


def _evaluate_task(model: PolyViT, config: Train, loader: Loader, progress: Progress, world: World, keep: Keep) -> dict[str, float]:
    metrics, total, started, not_timed = Metrics(loader.task), len(loader.samples), 0.0, 0
    requests = request_validation_batches(loader, world.rank, world.size)
    batches = prefetch(requests, depth=config.data.prefetch, timeout_seconds=config.data.decode_timeout_seconds)
    for number, batch in enumerate(_iterate_together(batches, world), 1):
        started = started or time.monotonic()  # not before: imports and the building of decoders come once
        logits = _compute_logits(model, config, loader, batch)
        for indices, *answers in world.gather((batch.indices, logits, batch.labels)):
            metrics.update(*answers)
            keep(loader, indices, *answers)
        not_timed = metrics.num_examples if number == 1 else not_timed
        progress(loader.name, min(number * world.size * loader.size, total), total)
    loader.release()
    num_broken = sum(world.gather(len(loader.broken)))
    count, seconds = metrics.num_examples, time.monotonic() - started
    rate = (count - not_timed or count) / seconds
    row = world.broadcast(metrics.compute() | {"num_examples": count, "num_broken": num_broken, "examples_per_second": rate})
    if not row["num_examples"]:
        raise ValueError(f"task {loader.name}: no validation file could be read")
    return row


def _iterate_together(batches: Iterator[tuple[str, Batch]], world: World) -> Iterator[Batch]:
    """This process's batches, each when every process has its own. Raises DataError on all of them when one has none."""
    while True:
        error = found = None
        try:
            found = next(batches, None)
        except DataError as failure:
            error = failure
        if world.all_reduce_max(error is not None):
            reasons = world.broadcast(world.gather(error and str(error)))
            raise error or DataError(next(f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))
        if found is None:
            return
        yield found[1]


def _compute_logits(model: PolyViT, config: Train, loader: Loader, batch: Batch) -> Tensor:
    """The logits of a batch, on the CPU. An empty batch runs the model too: all processes must run a sharded model together."""
    grid, count = batch.grid, len(batch.labels)
    if grid.is_cuda:
        grid.record_stream(torch.cuda.current_stream())  # another stream made it
    if not count:
        grid = torch.zeros(1, *grid.shape[1:])
    return average_logits(model, loader.name, grid.to(config.device), config.precision)[:count].cpu()


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a checkpoint."""

    step: int
    split: Split
    views: dict[str, int]
    """How many views of each sample the logits of a task are averaged over."""
    rows: dict[str, dict[str, float]]
    """The metrics of each task."""

    def append_to(self, path: Path) -> None:
        """Add a line to a file like evaluations.jsonl. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": self.step, "time": round(time.time(), 3), "split": self.split, "views": self.views, "tasks": self.rows}
        with open(path, "a") as file:
            file.write(strict_json.dumps(line) + "\n")


def evaluate_run(
    folder: Path,
    config: Train,
    which: str,
    tasks: Sequence[str],
    progress: Progress,
    *,
    split: Split = "val",
    keep: Keep = _ignore,
    remark: str = "",
) -> Evaluation:
    """The metrics of a run's checkpoint: its newest, its best, or that of a step. Nothing is written.

    Without `tasks` all are evaluated that have files of the `split`. Under torchrun the processes divide the work, and only rank 0 gets
    the metrics, calls `keep` (see `evaluate`) and prints the `remark`. Raises ValueError when there is no such checkpoint, task or split.
    """
    unknown = sorted(set(tasks) - config.tasks.keys())
    if unknown:
        raise ValueError(f"{folder} has no task {', '.join(unknown)}; it has {', '.join(config.tasks)}")
    config, tasks = _choose_split(config, split, tasks)
    with process_group(config.device) as world, use_device(config, world), catch_decoder_messages():
        if remark and world.rank == 0:
            _logger.warning("warning: %s", remark)
        found, weights, _ = load_weights(folder, which, world=world)
        config = _recall_classes(config, found, print if world.rank == 0 else _ignore)
        model = PolyViT.from_config(config)
        model.load_state_dict(weights)
        with world.rank0_first():
            loaders = {name: Loader(name, config, train=False, rank=world.rank, split=split, report=print) for name in tasks}
        if world.rank == 0:
            for text in describe_other_files(found, split, loaders):
                print(text)
        outputs = (progress, world, keep) if world.rank == 0 else (_ignore, world, _ignore)
        rows = evaluate(model.to(config.device), replace(config, out=str(folder)), loaders, *outputs)
    views = {name: config.tasks[name].modality.eval_views for name in tasks}
    return Evaluation(found.step, split, views, {} if world.rank else rows)


def _choose_split(config: Train, split: Split, tasks: Sequence[str]) -> tuple[Train, Sequence[str]]:
    """The configuration with the samples of a split instead of the validation's, and the tasks to evaluate."""
    sources = {name: getattr(task, split) for name, task in config.tasks.items()}
    lacking = [name for name in tasks or config.tasks if sources[name] is None]
    if lacking and (tasks or len(lacking) == len(config.tasks)):
        raise ValueError(f"task {lacking[0]} has no {split} files: its Task in the experiment has no {split}=…, a source")
    tasks = [name for name in tasks or config.tasks if name not in lacking]
    return replace(config, tasks=config.tasks | {name: replace(config.tasks[name], val=sources[name]) for name in tasks}), tasks


def _recall_classes(config: Train, found: checkpoint.Checkpoint, report: Callable[[str], None]) -> Train:
    """The configuration with the class lists that the checkpoint was trained on.

    0.4.1 and earlier stored none: then they are those of the training source, or where that is gone of the validation source alone.
    """
    stored, tasks = found.state.get("classes", {}), dict(config.tasks)
    for name, task in tasks.items():
        if name in stored:
            tasks[name] = recall_classes(task, stored[name], str(found.path))
            continue
        try:
            task.train.class_names(task)
        except (ValueError, OSError) as error:
            report(f"task {name}: {error}; the order of its classes is that of the validation files")
            tasks[name] = replace(task, train=task.val)
    return replace(config, tasks=tasks)


def load_weights(
    folder: Path, which: str, weights: Weights = "auto", world: World = ALONE
) -> tuple[checkpoint.Checkpoint, dict[str, Tensor], Literal["model", "ema"]]:
    """A checkpoint, its weights, and which of them these are: auto are the moving average if the run has one.

    They are of the same step on all processes, even while a run saves new ones and deletes old ones. Raises ValueError when there is no
    such checkpoint, or no moving average in it.
    """
    while True:
        found, tensors = find_checkpoint(folder, which), None
        if weights == "ema" and "ema" not in found.names:
            raise ValueError("weights = ema: the run kept no moving average of its weights (optim.ema_decay = 0); take 'model' or 'auto'")
        group = "ema" if weights != "model" and "ema" in found.names else "model"
        try:
            tensors = found.load_tensors(group)
        except checkpoint.CheckpointError:
            if found.path.exists():
                raise
        other = world.broadcast(found.step) != found.step
        if not world.all_reduce_max(other or tensors is None) and tensors is not None:
            return found, tensors, group
