"""Batches in the step's own inputs, on the device: while it computes one batch, the next is copied, by a stream of its own.

The inputs are two slots that are filled in turn, as large as the largest batch and shared by all tasks: the memory of a run's inputs does
not grow with the number of its tasks, and captured graphs find each batch where they expect it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyvit_fast.config import Train
from polyvit_fast.data.stream import Batch, BatchRequest

NUM_SLOTS = 2
ALIGNMENT = 256  # bytes: what kernels may expect of an address


@dataclass(frozen=True)
class Inputs:
    """What a step computes on: the fields of a `Batch` on the device, and the slot that they lie in."""

    grid: Tensor
    labels: Tensor
    mixup_ratio: Tensor
    """float32, without dimensions."""
    slot: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Inputs:
        """The batch where it is, without a copy."""
        return cls(batch.grid, batch.labels, torch.tensor(batch.mixup_ratio, dtype=torch.float32, device=batch.grid.device))


class Slots:
    """The inputs of every task as views of two buffers. `dtypes` are those of the tasks' grids, `num_processes` share each batch."""

    def __init__(self, config: Train, dtypes: dict[str, torch.dtype], device: torch.device, num_processes: int = 1) -> None:
        self.device = device
        self.layouts = {name: _Layout.of(config, name, dtype, num_processes) for name, dtype in dtypes.items()}
        size = max(layout.num_bytes for layout in self.layouts.values())
        self.buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self.ratios = [torch.ones((), device=device) for _ in range(NUM_SLOTS)]

    def inputs(self, name: str, slot: int) -> Inputs:
        """The task's inputs in a slot, whose memory those of the other tasks share."""
        grid, labels = self.layouts[name].views(self.buffers[slot])
        return Inputs(grid, labels, self.ratios[slot], slot)


@dataclass(frozen=True)
class _Layout:
    """Where a task's grid and labels lie in a buffer."""

    grid: torch.Size
    grid_dtype: torch.dtype
    labels: torch.Size
    labels_dtype: torch.dtype

    @classmethod
    def of(cls, config: Train, name: str, dtype: torch.dtype, num_processes: int) -> _Layout:
        task = config.tasks[name]
        batch = task.batch // num_processes
        grid = torch.Size((batch, *task.modality.grid))
        if task.multi_label:
            return cls(grid, dtype, torch.Size((batch, task.num_classes)), torch.float32)
        return cls(grid, dtype, torch.Size((batch,)), torch.int64)

    @property
    def _labels_start(self) -> int:
        return -(-self.grid.numel() * self.grid_dtype.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return self._labels_start + self.labels.numel() * self.labels_dtype.itemsize

    def views(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        grid = buffer[: self.grid.numel() * self.grid_dtype.itemsize].view(self.grid_dtype).view(self.grid)
        return grid, buffer[self._labels_start : self.num_bytes].view(self.labels_dtype).view(self.labels)


def pinned(jobs: Iterable[BatchRequest]) -> Iterator[BatchRequest]:
    """The same batches in memory that the GPU copies from by itself; made where the batch is made, in the thread that decodes."""
    for job in jobs:
        yield replace(job, run=lambda run=job.run: _pinned(run()))


def _pinned(batch: Batch) -> Batch:
    on_cpu = batch.grid.device.type == "cpu"
    grid = without_repeats(batch.grid).contiguous().pin_memory() if on_cpu else batch.grid
    return replace(batch, grid=grid, labels=batch.labels.pin_memory())


def without_repeats(grid: Tensor) -> Tensor:
    """Its part that has memory of its own: of a spectrogram's equal channels, one."""
    return grid[tuple(slice(0, 1 if stride == 0 else None) for stride in grid.stride())]


def feed(batches: Iterable[tuple[str, Batch]], slots: Slots) -> Iterator[tuple[str, Inputs]]:
    """(task, inputs) of each batch, in order. What the caller queues before it asks for the next may read the inputs.

    The host is at most `NUM_SLOTS` minibatches ahead of the GPU.
    """
    copies = torch.cuda.Stream(slots.device)
    copies.wait_stream(torch.cuda.current_stream())  # which zeroes the slots
    full, free = ([torch.cuda.Event(blocking=True) for _ in range(NUM_SLOTS)] for _ in range(2))
    for count, (name, batch) in enumerate(batches):
        slot = count % NUM_SLOTS
        inputs = slots.inputs(name, slot)
        free[slot].synchronize()  # of the host, which is ahead: the GPU has the other slot's batch to compute meanwhile
        with torch.cuda.stream(copies):
            copy_batch(batch, inputs)
            if batch.grid.is_cuda:
                batch.grid.record_stream(copies)
            full[slot].record()
        torch.cuda.current_stream().wait_event(full[slot])
        yield name, inputs
        free[slot].record()


def copy_batch(batch: Batch, inputs: Inputs) -> None:
    """Queue the copy of a batch, whose grid may lack repeats. Raises ValueError when it is not of the form that the inputs have."""
    grid, to = batch.grid, inputs.grid
    fits = all(size in (1, wanted) for size, wanted in zip(grid.shape[1:], to.shape[1:], strict=True))
    if grid.dtype != to.dtype or len(grid) != len(to) or not fits or batch.labels.shape != inputs.labels.shape:
        raise ValueError(
            f"a batch of {grid.dtype} {list(grid.shape)} with labels {list(batch.labels.shape)} came where {to.dtype} {list(to.shape)} was "
            f"expected with labels {list(inputs.labels.shape)}"
        )
    if grid.shape != to.shape:
        grid = grid.to(to.device, non_blocking=True)  # the device repeats it
    to.copy_(grid, non_blocking=True)
    inputs.labels.copy_(batch.labels, non_blocking=True)
    inputs.mixup_ratio.fill_(batch.mixup_ratio)
