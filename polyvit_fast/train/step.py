"""One training step: forward and backward of a task's batch, then one update for all tasks.

Both are functions of device tensors only, so that a GPU can capture them once (`capture`). The host sends a batch, a learning rate and a
step number, and reads the counters at intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from polyvit_fast.config import Train
from polyvit_fast.data.augment.mixing import mix_grids
from polyvit_fast.model.parameters import decay_by_layer, freeze, list_components, list_parameters
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.randomness import key
from polyvit_fast.train.distributed.fsdp import ShardedParameters
from polyvit_fast.train.distributed.process_group import ALONE, World
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.feed import Inputs
from polyvit_fast.train.loss import LOSSES, matches, mixed_loss
from polyvit_fast.train.optim import FlatParameters, Optimizer


@dataclass(frozen=True)
class TaskCounters:
    """A task's columns of the counters. The last three came with version 0.8: checkpoints of earlier ones lack them."""

    loss: float
    """Mean over the steps since the last reading."""
    matches: float
    """The same."""
    steps: int
    """Since the last reading."""
    skipped: int
    """In the whole run, as the next two."""
    skipped_in_a_row: int
    last_skipped_step: int
    updates: int
    """The steps since the last reading that were not skipped, over which the next two are means."""
    grad_norm: float
    """Of the whole gradient before it is clipped. That of a step of several tasks counts for each of them."""
    clipped: float
    """The fraction of updates whose gradient was clipped."""


class PendingCounters:
    """The counters of every task, on their way from the device to the host."""

    def __init__(self, values: Tensor, rows: dict[str, int]) -> None:
        self.rows, self.event = rows, None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.event = torch.cuda.Event(blocking=True)
            self.event.record()
        else:
            self.values = values.clone()

    def is_ready(self) -> bool:
        """Whether they have arrived."""
        return self.event is None or self.event.query()

    def wait(self) -> dict[str, TaskCounters]:
        """The counters by task, as soon as they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return {name: _make_counters(*self.values[row].tolist()) for name, row in self.rows.items()}


class Step:
    """The model, its optimizer and the counters on the device of this process."""

    def __init__(self, model: PolyViT, config: Train, world: World = ALONE) -> None:
        self.model, self.config, self.world = model, config, world
        freeze(model, config.optim.freeze)
        self.used = {name: list_parameters(model, name) for name in config.tasks}
        rest, precision, self.reducer = config.optim.rests, config.distributed.grad_reduce, None
        groups = {"by_component": rest, "lr_factors": decay_by_layer(model, config.optim.layer_decay)}
        if config.distributed.sharded:
            self.parameters = ShardedParameters(model, world, config.device, precision, **groups)
        else:
            rounded = torch.bfloat16 if config.keeps_rounded else None
            self.parameters = FlatParameters(model.to(config.device), rounded, **groups)
            own_clip_norm = config.optim.clip_norm / world.size if config.optim.clip == "process" else 0.0
            if world.size > 1:
                self.reducer = Reducer(self.parameters, precision, own_clip_norm)
        self.optimizer = Optimizer(self.parameters, config.optim)
        self.device = self.parameters.found_inf.device
        self.rows = {name: row for row, name in enumerate(config.tasks)}
        self.counters = torch.zeros(len(self.rows), len(fields(TaskCounters)), dtype=torch.float64, device=self.device)
        self.took_part = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        has_component = [[component in list_components(model, name) for name in config.tasks] for component in self.optimizer.components]
        self.has_component = torch.tensor(has_component, device=self.device) if rest else None
        self.lr = torch.zeros((), device=self.device)
        self.loss_weights = torch.zeros(len(self.rows), device=self.device)
        self.number = torch.zeros((), device=self.device, dtype=torch.float64)

    def begin(self, names: tuple[str, ...], lr: float, step: int, weights: Sequence[float] = ()) -> None:
        """Begin step number `step`, an update from the gradients of the tasks `names` at the learning rate `lr`.

        Each task's loss is multiplied by its one of `weights`, if there are any, besides its `loss_weight`.
        """
        self.parameters.refresh()
        self.lr.fill_(lr)
        self.number.fill_(step)
        num_tasks = len(names) if self.config.optim.accumulate == "mean" else 1
        weight = 1 / num_tasks if self.parameters.averages_grads else 1 / (num_tasks * self.world.size)
        for name, own in zip(names, weights or (1.0,) * len(names), strict=True):
            self.loss_weights[self.rows[name]].fill_(weight * own * self.config.tasks[name].loss_weight)
        rank = (self.world.rank,) if self.world.rank else ()  # dropout differs between processes
        torch.manual_seed(key(self.config.seed, "step", step, *rank) >> 1)

    def forward_backward(self, name: str, inputs: Inputs, last: bool = True) -> None:
        """Add the gradient of the task's mean loss over the batch, times its weight in the step, to the flat gradient.

        `last`: nothing is added to it after this in this step, so that the processes may sum theirs.
        """
        task, grid, labels = self.config.tasks[name], inputs.grid, inputs.labels
        partners_of = MIXUP_PAIRS[task.mixup_pairs]
        partners = partners_of(labels) if task.mixes else labels
        if task.mixes:
            box = inputs.cutmix_box if task.cutmix else None
            grid = mix_grids(grid, partners_of(grid), inputs.mixup_ratio, box, mixup=task.mixup > 0)
        row = self.counters[self.rows[name]]
        micro_batches = list(zip(*(tensor.chunk(task.micro_batches) for tensor in (grid, labels, partners)), strict=True))
        for number, micro_batch in enumerate(micro_batches, 1):
            loss, right = self._forward(name, micro_batch, inputs.mixup_ratio)
            with torch.no_grad():
                self.parameters.found_inf.add_(loss, alpha=0)  # NaN unless the loss is finite: then every process skips the update
                row[0].add_(loss.nan_to_num(0.0, 0.0, 0.0), alpha=1 / task.micro_batches)
                row[1].add_(right, alpha=1 / task.micro_batches)
            with self._reduce(name, last and number == len(micro_batches)):
                loss.backward(self.loss_weights[self.rows[name]] / task.micro_batches)
        row[2].add_(1)
        self.took_part[self.rows[name]].fill_(True)  # an assignment would copy the number from the host, which no graph captures

    def _forward(self, name: str, micro_batch: tuple[Tensor, ...], ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, fraction of right answers) of a micro-batch's grid, labels and partners' labels."""
        task, (grid, labels, partners) = self.config.tasks[name], micro_batch
        # Without autocast's cache: what it keeps during a capture would lie in the graph's memory.
        with torch.autocast(grid.device.type, torch.bfloat16, enabled=self.config.precision == "bf16", cache_enabled=False):
            logits = self.model(grid, name, task.drop_path_rate, self.config.compute.recompute)
        loss = LOSSES[task.loss]
        if task.mixes:
            value = mixed_loss(loss, logits, labels, partners, ratio, task.label_smoothing)
        else:
            value = loss(logits, labels, task.label_smoothing)
        return value, matches(logits.detach(), labels)

    def _reduce(self, name: str, last: bool) -> AbstractContextManager[None]:
        """For the last backward pass of a step: inside, the gradients of all processes are summed as they come."""
        return self.reducer.overlap(self.used[name]) if self.reducer and last else nullcontext()

    @torch.no_grad()
    def update(self) -> None:
        """One update from the accumulated gradient; skipped, and counted for the step's tasks, when anything is not finite."""
        active = None if self.has_component is None else (self.has_component & self.took_part).any(1)
        norm, done = self.optimizer.update(self.lr, active)
        if self.reducer and self.reducer.own_clip_norm:
            norm = self.reducer.own_norm * self.world.size  # that of this process, which was clipped before the mean
        skipped = self.took_part & ~done
        updated = self.took_part & done
        total, in_a_row, last, updates, norms, clipped = self.counters[:, 3:].unbind(1)
        total += skipped
        in_a_row.copy_(torch.where(updated, 0.0, in_a_row + skipped))
        last.copy_(torch.where(skipped, self.number, last))
        updates += updated
        norms += torch.where(updated, norm, 0.0)
        if self.config.optim.clip_norm:
            clipped += updated & (norm > self.config.optim.clip_norm)
        self.took_part.zero_()

    def skip_update(self) -> None:
        """An update that changes nothing but the counters: its gradient is not finite."""
        self.parameters.found_inf.fill_(torch.nan)
        self.update()

    def read_counters(self) -> PendingCounters:
        """Send the counters of every task to the host, means over all processes; sums of the interval start again."""
        values = self.counters.clone()
        self.world.all_reduce_sum_(values)
        values /= self.world.size  # counts, which are the same on all, stay exact
        for sums in (self.counters[:, :3], self.counters[:, 6:]):
            sums.zero_()
        return PendingCounters(values, self.rows)

    def watch_counters(self) -> PendingCounters:
        """Send the counters of every task to the host as they are on this process; those of skipped steps are the same on all."""
        return PendingCounters(self.counters, self.rows)

    def load_counters(self, values: Sequence[Sequence[float]]) -> None:
        """Set the counters from a checkpoint's; columns that its version did not have stay 0."""
        for row, numbers in zip(self.counters, torch.tensor(values, dtype=torch.float64), strict=True):
            row[: len(numbers)].copy_(numbers)

    @contextmanager
    def rehearse(self) -> Iterator[None]:
        """Inside, forward, backward and skipped updates may be tried out; then the counters are restored and the gradient is zeroed."""
        counters = self.counters.clone()
        try:
            yield
        finally:
            self.counters.copy_(counters)
            self.took_part.zero_()
            self.parameters.zero_grads()


def swap_neighbours(x: Tensor) -> Tensor:
    """The batch with examples 0 and 1 swapped, 2 and 3, and so on; an odd last one stays.

    Unlike a reversed batch's, these pairs are the same when several processes divide the batch.
    """
    even = len(x) // 2 * 2
    swapped = x[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped if even == len(x) else torch.cat([swapped, x[even:]])


def reverse(x: Tensor) -> Tensor:
    """The examples of a batch in the opposite order."""
    return x.flip(0)


MIXUP_PAIRS = {"neighbours": swap_neighbours, "reversed": reverse}
"""How the examples of a batch are ordered in the one that they are mixed with."""


def _make_counters(
    loss: float, matches: float, steps: float, skipped: float, in_a_row: float, last: float, updates: float, norms: float, clipped: float
) -> TaskCounters:
    counts = int(skipped), int(in_a_row), int(last), int(updates)
    return TaskCounters(
        loss / max(steps, 1), matches / max(steps, 1), int(steps), *counts, norms / max(updates, 1), clipped / max(updates, 1)
    )
