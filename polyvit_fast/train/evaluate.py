"""Evaluation: every validation sample once, logits averaged over its views."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from polyvit_fast.config import Train
from polyvit_fast.data.stream import Loader, prefetch, validation_jobs
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.metrics import Metrics


@torch.no_grad()
def view_logits(model: PolyViT, task: str, grid: Tensor, precision: str) -> Tensor:
    """Logits `[batch, num_classes]` of `[batch, views, frames, rows, columns, channels]`, averaged over views (scenic's rule)."""
    batch, views = grid.shape[:2]
    with torch.autocast(grid.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(grid.flatten(0, 1), task)
    return logits.float().view(batch, views, -1).mean(1)


def evaluate(
    model: PolyViT, config: Train, loaders: dict[str, Loader], progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, float]]:
    """The metrics of each task in `loaders`, with `num_examples`, `num_broken` files left out and `examples_per_second`.

    `progress(task, done, total)` is called after every batch.
    """
    was_training = model.training
    model.eval()
    try:
        return {name: _evaluate_task(model, config, loader, progress) for name, loader in loaders.items()}
    finally:
        model.train(was_training)


def _evaluate_task(model: PolyViT, config: Train, loader: Loader, progress: Callable[[str, int, int], None]) -> dict[str, float]:
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
