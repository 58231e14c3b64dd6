"""Evaluation: every validation sample once, logits averaged over its views."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from polyvit_fast.config import Train
from polyvit_fast.data.stream import Loader, prefetch, validation_jobs
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train import checkpoint
from polyvit_fast.train.metrics import Metrics

Progress = Callable[[str, int, int], None]


@contextmanager
def on_device(config: Train) -> Iterator[None]:
    """Inside, PyTorch computes with the configuration's number of threads. Raises ValueError when its device is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda: PyTorch finds no NVIDIA GPU here; use --device cpu, or look at what nvidia-smi says")
    before = torch.get_num_threads()
    torch.set_num_threads(config.compute_threads or max(1, len(os.sched_getaffinity(0)) - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def view_logits(model: PolyViT, task: str, grid: Tensor, precision: str) -> Tensor:
    """Logits `[batch, num_classes]` of `[batch, views, frames, rows, columns, channels]`, averaged over views (scenic's rule)."""
    batch, views = grid.shape[:2]
    with torch.autocast(grid.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(grid.flatten(0, 1), task)
    return logits.float().view(batch, views, -1).mean(1)


def evaluate(model: PolyViT, config: Train, loaders: dict[str, Loader], progress: Progress) -> dict[str, dict[str, float]]:
    """The metrics of each task in `loaders`, with `num_examples`, `num_broken` files left out and `examples_per_second`.

    `progress(task, done, total)` is called after every batch.
    """
    was_training = model.training
    model.eval()
    try:
        return {name: _evaluate_task(model, config, loader, progress) for name, loader in loaders.items()}
    finally:
        model.train(was_training)


def _evaluate_task(model: PolyViT, config: Train, loader: Loader, progress: Progress) -> dict[str, float]:
    started, metrics, done = time.monotonic(), Metrics(loader.task), 0
    batches = prefetch(validation_jobs(loader), depth=config.prefetch, timeout_seconds=config.decode_timeout_seconds)
    for name, batch in batches:
        if len(batch.labels):
            logits = view_logits(model, name, batch.grid.to(config.device), config.precision)
            metrics.update(logits.cpu(), batch.labels)
        done += len(batch.labels)
        progress(name, done, len(loader.samples))
    if not done:
        raise ValueError(f"task {loader.name}: no validation file could be read")
    seconds = time.monotonic() - started
    counts = {"num_examples": done, "num_broken": len(loader.broken), "examples_per_second": done / seconds}
    return metrics.compute() | counts


def evaluate_run(folder: Path, config: Train, which: str, tasks: Sequence[str], progress: Progress) -> dict[str, dict[str, float]]:
    """The metrics of a run's checkpoint: its newest, its best, or that of a step; they are added to the run's evaluations.jsonl too.

    Raises ValueError when there is no such checkpoint or task.
    """
    unknown = sorted(set(tasks) - config.tasks.keys())
    if unknown:
        raise ValueError(f"{folder} has no task {', '.join(unknown)}; it has {', '.join(config.tasks)}")
    found = find_checkpoint(folder, which)
    model = PolyViT.from_config(config)
    model.load_state_dict(found.load_tensors("ema" if config.optim.ema_decay else "model"))
    loaders = {name: Loader(name, config, train=False, report=print) for name in tasks or config.tasks}
    with on_device(config):
        rows = evaluate(model.to(config.device), replace(config, out=str(folder)), loaders, progress)
    with open(folder / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"step": found.step, "time": round(time.time(), 3), "tasks": rows}) + "\n")
    return rows


def find_checkpoint(folder: Path, which: str) -> checkpoint.Checkpoint:
    """The checkpoint called "newest", "best" or by its step. Raises ValueError that names those which are there."""
    newest = checkpoint.newest(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no whole checkpoint yet")
    if which == "newest":
        return newest
    step = newest.state["best_step"] if which == "best" else which
    if step is None:
        raise ValueError(f"{folder} was never evaluated, so no checkpoint of it is the best; take newest")
    for found in checkpoint.every(folder):
        if str(found.step) == str(step):
            return found
    there = ", ".join(sorted((str(found.step) for found in checkpoint.every(folder)), key=int))
    raise ValueError(f"{folder} holds no checkpoint {which!r}; there are newest, best and the steps {there}")
