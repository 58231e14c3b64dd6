"""One training step: forward and backward of a task's batch, then one update for all tasks.

Both parts are functions of device tensors only. The host sends a batch and a learning rate, and reads the counters at intervals.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from polyvit_fast.config import Task, Train
from polyvit_fast.data.stream import Batch
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loss import LOSSES, matches, mixed_loss
from polyvit_fast.train.optim import FlatParameters, Optimizer


@dataclass(frozen=True)
class TaskCounters:
    """A task since the last reading (`loss`, `matches`, `steps`) and in the whole run (the others): the columns of the counters."""

    loss: float
    matches: float
    steps: int
    skipped: int
    skipped_in_a_row: int
    last_skipped_step: int


class Step:
    """The model, its optimizer and the counters on the device."""

    def __init__(self, model: PolyViT, config: Train) -> None:
        self.model, self.config = model, config
        self.parameters = FlatParameters(model)
        self.optimizer = Optimizer(self.parameters, config.optim)
        device = self.parameters.values.device
        self.rows = {name: row for row, name in enumerate(config.tasks)}
        self.counters = torch.zeros(len(self.rows), len(fields(TaskCounters)), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.lr = torch.zeros((), device=device)

    def forward_backward(self, name: str, batch: Batch, weight: float) -> None:
        """Add `weight` times the gradient of the task's mean loss over the batch to the flat gradient."""
        task, device = self.config.tasks[name], self.lr.device
        grid, labels = batch.grid.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        mirrored = labels.flip(0)
        if task.mixup:
            # lerp in the grid's own units: the tokenizer normalises afterwards, and both are linear.
            grid = grid.float().lerp(grid.flip(0).float(), 1 - batch.mixup_ratio)
        row = self.counters[self.rows[name]]
        pieces = zip(*(tensor.chunk(task.micro_batches) for tensor in (grid, labels, mirrored)), strict=True)
        for grid_piece, labels_piece, mirrored_piece in pieces:
            loss, right = self._loss(name, task, grid_piece, labels_piece, mirrored_piece, batch.mixup_ratio)
            (loss * (weight / task.micro_batches)).backward()
            with torch.no_grad():
                self.finite &= loss.isfinite()
                row[0] += loss.detach().nan_to_num(0.0, 0.0, 0.0) / task.micro_batches
                row[1] += right / task.micro_batches
        row[2] += 1

    def _loss(self, name: str, task: Task, grid: Tensor, labels: Tensor, mirrored: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(grid.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.model(grid, name, task.drop_path_rate)
        loss = LOSSES[task.loss]
        if task.mixup:
            value = mixed_loss(loss, logits, labels, mirrored, ratio, task.label_smoothing)
        else:
            value = loss(logits, labels, task.label_smoothing)
        return value, matches(logits.detach(), labels)

    @torch.no_grad()
    def update(self, names: tuple[str, ...], lr: float, step: int) -> None:
        """One update from the gathered gradient; left out, and counted for the tasks in `names`, when anything is not finite."""
        self.lr.fill_(lr)
        _, done = self.optimizer.update(self.lr, self.finite)
        for name in names:
            row = self.counters[self.rows[name]]
            row[3] += ~done
            row[4] = torch.where(done, 0, row[4] + 1)
            row[5] = torch.where(done, row[5], step)
        self.finite.fill_(True)

    def read_counters(self) -> dict[str, TaskCounters]:
        """The counters of every task: the one word from the device to the host. Interval sums start again."""
        values = self.counters.tolist()
        self.counters[:, :3] = 0
        return {name: _task_counters(*values[row]) for name, row in self.rows.items()}


def _task_counters(loss: float, matches: float, steps: float, *counts: float) -> TaskCounters:
    return TaskCounters(loss / max(steps, 1), matches / max(steps, 1), int(steps), *map(int, counts))
