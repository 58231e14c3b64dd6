"""Batches in the step's own inputs, on the device: while it computes one batch, the next is copied, by a stream of its own.

There are two input buffers that are filled in turn, as large as the largest batch and used by all tasks: the memory of a run's inputs does
not grow with the number of its tasks, and captured graphs find each batch at the address they expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyvit_fast.config import Train
from polyvit_fast.data.stream import Batch, BatchRequest

NUM_BUFFERS = 2
ALIGNMENT = 256  # bytes: what kernels may expect of an address


@dataclass(frozen=True)
class Inputs:
    """What a step computes on: the fields of a `Batch` on the device, and the index of the input buffer that they lie in."""

    grid: Tensor
    labels: Tensor
    mixup_ratio: Tensor
    """float32, without dimensions."""
    index: int = 0
    cutmix_box: Tensor | None = None
    """int32 [4], as in the batch; a task without CutMix does not read it."""

    @classmethod
    def from_batch(cls, batch: Batch) -> Inputs:
        """The batch where it is, without a copy."""
        device = batch.grid.device
        box = None if batch.cutmix_box is None else torch.tensor(batch.cutmix_box, dtype=torch.int32, device=device)
        return cls(batch.grid, batch.labels, torch.tensor(batch.mixup_ratio, dtype=torch.float32, device=device), cutmix_box=box)


class InputBuffers:
    """Two buffers that hold the inputs of any task. `dtypes` are those of the tasks' grids, `num_processes` divide each batch."""

    def __init__(self, config: Train, dtypes: dict[str, torch.dtype], device: torch.device, num_processes: int = 1) -> None:
        self.device = device
        self.layouts = {name: _Layout.from_task(config, name, dtype, num_processes) for name, dtype in dtypes.items()}
        size = max(layout.num_bytes for layout in self.layouts.values())
        self.buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self.ratios = [torch.ones((), device=device) for _ in range(NUM_BUFFERS)]
        self.boxes = [torch.zeros(4, dtype=torch.int32, device=device) for _ in range(NUM_BUFFERS)]

    def view(self, name: str, index: int) -> Inputs:
        """A task's inputs as views of a buffer, whose memory those of the other tasks use too."""
        grid, labels = self.layouts[name].view(self.buffers[index])
        return Inputs(grid, labels, self.ratios[index], index, self.boxes[index])


@dataclass(frozen=True)
class _Layout:
    """Where a task's grid and labels lie in a buffer."""

    grid: torch.Size
    grid_dtype: torch.dtype
    labels: torch.Size
    labels_dtype: torch.dtype

    @classmethod
    def from_task(cls, config: Train, name: str, dtype: torch.dtype, num_processes: int) -> _Layout:
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

    def view(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        grid = buffer[: self.grid.numel() * self.grid_dtype.itemsize].view(self.grid_dtype).view(self.grid)
        return grid, buffer[self._labels_start : self.num_bytes].view(self.labels_dtype).view(self.labels)


def pin(requests: Iterable[BatchRequest]) -> Iterator[BatchRequest]:
    """The same batches in pinned memory, from which the GPU copies by itself; pinned in the thread that decodes them."""
    for request in requests:
        yield replace(request, run=lambda run=request.run: _pin(run()))


def _pin(batch: Batch) -> Batch:
    on_cpu = batch.grid.device.type == "cpu"
    grid = drop_repeats(batch.grid).contiguous().pin_memory() if on_cpu else batch.grid
    return replace(batch, grid=grid, labels=batch.labels.pin_memory())


def drop_repeats(grid: Tensor) -> Tensor:
    """The elements that have memory of their own: of a spectrogram's equal channels, one."""
    return grid[tuple(slice(0, 1 if stride == 0 else None) for stride in grid.stride())]


def feed(batches: Iterable[tuple[str, Batch]], buffers: InputBuffers) -> Iterator[tuple[str, Inputs]]:
    """(task, inputs) of each batch, in order. What the caller queues before it asks for the next may read the inputs.

    The host is at most `NUM_BUFFERS` minibatches ahead of the GPU.
    """
    copies = torch.cuda.Stream(buffers.device)
    copies.wait_stream(torch.cuda.current_stream())  # which zeroes the buffers
    full, free = ([torch.cuda.Event(blocking=True) for _ in range(NUM_BUFFERS)] for _ in range(2))
    for count, (name, batch) in enumerate(batches):
        index = count % NUM_BUFFERS
        inputs = buffers.view(name, index)
        free[index].synchronize()  # the host waits, for it is ahead: the GPU has the other buffer's batch to compute meanwhile
        with torch.cuda.stream(copies):
            copy_batch(batch, inputs)
            if batch.grid.is_cuda:
                batch.grid.record_stream(copies)
            full[index].record()
        torch.cuda.current_stream().wait_event(full[index])
        yield name, inputs
        free[index].record()


def copy_batch(batch: Batch, inputs: Inputs) -> None:
    """Queue the copy of a batch, whose grid may lack repeats. Raises ValueError when its shapes or dtype are not those of the inputs."""
    grid, to = batch.grid, inputs.grid
    fits = all(size in (1, expected) for size, expected in zip(grid.shape[1:], to.shape[1:], strict=True))
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
    if batch.cutmix_box is not None and inputs.cutmix_box is not None:
        for to_number, number in zip(inputs.cutmix_box.unbind(), batch.cutmix_box, strict=True):
            to_number.fill_(number)
