"""Batches along the schedule. Which samples a step sees, and how each is augmented, are pure functions of (seed, task, step).

There is nothing to save: whoever knows the step knows the data. A `Loader` turns a task's step into a batch; `prefetch` runs loaders
ahead of the training loop in a thread; a broken file is replaced by another of its task, always the same one, with its own label.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from queue import Empty, Full, Queue

import numpy as np
import torch
from torch import Tensor

from polyvit_fast.config import StepPlan, Task, Train
from polyvit_fast.data.dali import UnavailableError
from polyvit_fast.data.decoders import build_task_decoder
from polyvit_fast.data.device import GpuDecoder, own_stream
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.data.sources.fingerprint import Fingerprint, take_fingerprint
from polyvit_fast.media import DEFECTS, Sample, printable
from polyvit_fast.randomness import generator, key, permutation


class DataError(RuntimeError):
    """Training data that cannot go on: too many broken files, a decoder that hangs, or none for a kind of files."""


NO_FILES_FAULT = (torch.AcceleratorError, torch.OutOfMemoryError, DataError, *DEFECTS)
"""Good files would be called broken one after the other, so these pass and end the run."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The reader of batches was asked to stop while it waited for one."""


@dataclass(frozen=True)
class Batch:
    """One task's examples for one step, or some of its validation examples."""

    grid: Tensor
    """[batch, frames, rows, columns, channels] in training, [batch, views, frames, …] in evaluation; uint8 or float32."""
    labels: Tensor
    """int64 [batch], or float32 multi-hot [batch, num_classes] of a multi-label task."""
    mixup_ratio: float = 1.0
    """Weight of each example against the one that it is mixed with; 1 mixes nothing."""


@lru_cache(maxsize=64)
def _epoch_order(seed: int, task: str, epoch: int, num_samples: int) -> np.ndarray:
    return permutation(num_samples, seed, "order", task, epoch)


def sample_index(seed: int, task: str, position: int, num_samples: int) -> int:
    """The sample at `position` of a task's endless sequence, in which every epoch holds every sample exactly once."""
    epoch, offset = divmod(position, num_samples)
    return int(_epoch_order(seed, task, epoch, num_samples)[offset])


def label_tensor(task: Task, samples: Sequence[Sample]) -> Tensor:
    """The labels of `samples` in the form of `Batch.labels`."""
    if not task.multi_label:
        return torch.tensor([sample.labels[0] for sample in samples], dtype=torch.int64)
    labels = torch.zeros(len(samples), task.num_classes)
    for row, sample in zip(labels, samples, strict=True):
        row[list(sample.labels)] = 1
    return labels


EVAL_GRIDS = 128
"""Grids that an evaluation computes at once, at most: they keep a GPU busy, and need less memory than training on a few."""


class Loader:
    """The batches of one task: training batches by step, validation batches in order.

    `rank` of `world_size` loads its share of every training batch; the shares of all ranks together are the batch of one process.
    Validation batches do not depend on them.
    """

    def __init__(
        self,
        name: str,
        config: Train,
        *,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name, self.config, self.task, self.report = name, config, config.tasks[name], report
        self.source = self.task.train if train else self.task.val
        try:
            self.classes = class_list(self.task)
            self.samples = self.source.samples(self.task)
        except (ValueError, OSError) as error:
            raise ValueError(f"task {name}: {error}") from error
        if not self.samples:
            raise ValueError(f"tasks.{name}: {self.source} has no samples")
        share = _share(name, self.task, world_size) if train else 0
        self.first, self.size = rank * share, share or _evaluation_size(self.task)
        on_gpu = config.device == "cuda" and config.data.decoding != "cpu"
        options = {"batch": self.size, "train": train, "num_threads": config.data.num_threads}
        self.decoder = build_task_decoder(self.source, self.task, **options, device="cuda" if on_gpu else "cpu")
        self.broken: dict[int, str] = {}
        self.note = ""
        self._report_note()
        if rank == 0 and (train or self.source != self.task.train):
            for remark in self.source.remarks(self.task):
                report(f"task {name}: {remark}")

    def grid_dtype(self) -> torch.dtype:
        """That of the grids, from one decoded sample."""
        return self._decode_or_replace(sample_index(self.config.seed, self.name, 0, len(self.samples)), 0)[1].dtype

    def fingerprint(self) -> Fingerprint:
        """Words for all samples, their order, labels and files as they are now: from them, the seed and the step follows what it sees."""
        return take_fingerprint(self.samples)

    def positions(self, step: int) -> range:
        """The places in the task's endless sequence that its `step`-th batch covers on this rank."""
        start = step * self.task.batch + self.first
        return range(start, start + self.size)

    def step_samples(self, step: int) -> list[Sample]:
        """The samples that the schedule names for the task's `step`-th batch, before broken ones are replaced."""
        return [self.samples[sample_index(self.config.seed, self.name, p, len(self.samples))] for p in self.positions(step)]

    def load(self, step: int) -> Batch:
        """The task's `step`-th training batch. Raises DataError when more than `max_bad_ratio` of the files are broken."""
        positions = list(self.positions(step))
        used = [sample_index(self.config.seed, self.name, p, len(self.samples)) for p in positions]
        grid = self._decode_together(used, positions)
        mixup = self.task.mixup
        ratio = generator(self.config.seed, "mixup", self.name, step).beta(mixup, mixup) if mixup else 1.0
        return Batch(grid[:, 0], label_tensor(self.task, [self.samples[i] for i in used]), ratio)

    def _decode_together(self, used: list[int], positions: Sequence[int]) -> Tensor:
        """The grids of a batch; in `used`, the samples that are broken at their position give way to their stand-ins."""
        # A file that failed before is tried again, but alone: another part of it may be whole, and what a step sees must not depend on
        # the steps before it.
        trusted = [row for row, index in enumerate(used) if index not in self.broken]
        try:
            together = self._decode([used[row] for row in trusted], [positions[row] for row in trusted])
            if len(trusted) == len(used):
                return together
            grids = dict(zip(trusted, together.split(1), strict=True))
        except NO_FILES_FAULT:
            raise
        except Exception:
            grids = {}
        for row, position in enumerate(positions):
            if row not in grids:
                used[row], grids[row] = self._decode_or_replace(used[row], position)
        return _together([grids[row] for row in range(len(used))])

    def load_validation(self, start: int) -> Batch:
        """Up to `size` samples from `start`, all views of each; broken files are left out and reported. Empty behind the last sample."""
        indices = [i for i in range(start, min(start + self.size, len(self.samples))) if i not in self.broken]
        if not indices:
            return Batch(self._no_grid(), label_tensor(self.task, []))
        try:
            return Batch(self._decode(indices, indices), label_tensor(self.task, [self.samples[i] for i in indices]))
        except NO_FILES_FAULT:
            raise
        except Exception:
            grids, good = [], []
            for index in indices:
                try:
                    grids.append(self._decode([index], [index]))
                    good.append(index)
                except NO_FILES_FAULT:
                    raise
                except Exception as error:
                    self._mark_broken(index, error)
            samples = [self.samples[i] for i in good]
            return Batch(_together(grids) if grids else self._no_grid(), label_tensor(self.task, samples))

    def _no_grid(self) -> Tensor:
        return torch.empty(0, self.task.modality.eval_views, *self.task.modality.grid)

    def _decode(self, indices: Sequence[int], positions: Sequence[int]) -> Tensor:
        try:
            grid = self._ask_decoder(indices, positions)
        except UnavailableError as error:
            raise DataError(f"task {self.name}: {error}") from error
        except DEFECTS as error:
            files = ", ".join(printable(self.samples[i].media.name) for i in self._find_culprits(indices, positions) or indices)
            error.add_note(f"task {self.name}: while decoding {files}. It is a defect of the decoder, not of a file: please report it")
            raise
        self._report_note()
        return grid

    def _ask_decoder(self, indices: Sequence[int], positions: Sequence[int]) -> Tensor:
        rngs = [generator(self.config.seed, "augment", self.name, position) for position in positions]
        return self.decoder([self.samples[i].media for i in indices], rngs)

    def _find_culprits(self, indices: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Those of a batch's samples with which the decoder's defect shows when each is decoded alone."""
        culprits = []
        for index, position in zip(indices, positions, strict=True):
            try:
                self._ask_decoder([index], [position])
            except DEFECTS:
                culprits.append(index)
            except Exception:  # the file's own fault
                continue
        return culprits

    def release(self) -> None:
        """Let the decoder give back the memory that it keeps for the next batch, for there is none, or not soon."""
        if isinstance(self.decoder, GpuDecoder):
            self.decoder.release()

    def _report_note(self) -> None:
        """Tell what a decoder for the GPU leaves to the CPU, and why, when that is news."""
        note = getattr(self.decoder, "note", "")
        if note != self.note:
            self.note = note
            self.report(f"task {self.name}: {note}")

    def _decode_or_replace(self, wanted: int, position: int) -> tuple[int, Tensor]:
        """The sample at this position and its grid: the wanted one, or the first of its stand-ins that can be decoded there."""
        for attempt in count():
            index = self._stand_in(wanted, attempt)
            try:
                return index, self._decode([index], [position])
            except NO_FILES_FAULT:
                raise
            except Exception as error:
                self._mark_broken(index, error)
        raise AssertionError("unreachable")

    def _stand_in(self, wanted: int, attempt: int) -> int:
        return key(self.config.seed, "replace", self.name, wanted, attempt) % len(self.samples) if attempt else wanted

    def _mark_broken(self, index: int, error: Exception) -> None:
        if index in self.broken:
            return
        name = printable(self.samples[index].media.name)
        self.broken[index] = printable(str(error).strip()) or type(error).__name__
        self.report(f"task {self.name}: broken file {name}: {self.broken[index]}")
        ratio = self.config.data.max_bad_ratio
        if len(self.broken) > (max(1, ratio * len(self.samples)) if ratio else 0) or len(self.broken) == len(self.samples):
            raise DataError(
                f"task {self.name}: {len(self.broken)} of {len(self.samples)} files are broken, more than max_bad_ratio = {ratio} "
                f"allows; the last one is {name} ({self.broken[index]}). `polyvit-fast check` names them all and writes a clean manifest"
            )


def _together(grids: list[Tensor]) -> Tensor:
    with own_stream(grids[0].device):
        return torch.cat(grids)


def _share(name: str, task: Task, world_size: int) -> int:
    """One process's part of a task's batch. Raises ValueError when there is no such part."""
    if task.batch % world_size:
        raise ValueError(f"tasks.{name}.batch = {task.batch} does not divide by the {world_size} processes")
    share, pieces = task.batch // world_size, task.micro_batches
    if share % pieces:
        raise ValueError(
            f"tasks.{name}: the share of each of the {world_size} processes, {share}, does not divide into micro_batches = {pieces}"
        )
    if task.mixup and task.mixup_pairs == "neighbours" and share % 2 and world_size > 1:
        raise ValueError(
            f"tasks.{name}: mixup pairs neighbours, but {world_size} processes cut the batch of {task.batch} into shares of {share}; "
            "choose a batch that makes them even, or mixup_pairs = reversed"
        )
    return share


def _evaluation_size(task: Task) -> int:
    # Not by the number of processes: with it, rounding would change, and a metric in its last digits.
    return max(1, min(task.batch // task.micro_batches, EVAL_GRIDS) // task.modality.eval_views)


@dataclass(frozen=True)
class Job:
    """A batch to be made: whose, which, and how."""

    loader: Loader
    step: int
    samples: Callable[[], list[Sample]]
    run: Callable[[], Batch]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.loader.name


def training_jobs(loaders: dict[str, Loader], plan: StepPlan, first_step: int) -> Iterator[Job]:
    """The batches of the plan's steps from `first_step` on, in order; who asks for one has made the one before."""
    counts, last = dict.fromkeys(loaders, 0), {name: step for step, names in enumerate(plan) for name in names}
    for step, names in enumerate(plan):
        for name in names:
            if step >= first_step:
                yield _training_job(loaders[name], counts[name])
                if step == last[name]:
                    loaders[name].release()
            counts[name] += 1


def _training_job(loader: Loader, step: int) -> Job:
    return Job(loader, step, lambda: loader.step_samples(step), lambda: loader.load(step))


def validation_jobs(loader: Loader, rank: int = 0, world_size: int = 1) -> Iterator[Job]:
    """The batches of `rank`, dealt to all ranks in turn: together every validation sample of a task exactly once.

    Every rank has equally many; those that come after the last sample are empty.
    """
    for first in range(0, len(loader.samples), loader.size * world_size):
        start = first + loader.size * rank
        yield Job(
            loader,
            start,
            lambda start=start: list(loader.samples[start : start + loader.size]),
            lambda start=start: loader.load_validation(start),
        )


def prefetch(
    jobs: Iterable[Job], *, depth: int, timeout_seconds: float, stop: Callable[[], object] = lambda: False
) -> Iterator[tuple[str, Batch]]:
    """(task, batch) of each job in order, up to `depth` of them made ahead in a thread.

    Raises what a job raised, in its place in the order; DataError with the file's name when a job takes over `timeout_seconds`; Interrupted
    when `stop` becomes true while a batch is waited for.
    """
    worker = _Worker(jobs, depth, stop)
    try:
        while True:
            item = worker.next(timeout_seconds)
            if item is None:
                return
            yield item
    finally:
        worker.stopped.set()
        worker.thread.join(2.0)  # Python must not end in the middle of a decoder


class _Worker:
    """The thread behind `prefetch`."""

    def __init__(self, jobs: Iterable[Job], depth: int, stop: Callable[[], object]) -> None:
        self.queue: Queue[tuple[str, Batch] | Exception | None] = Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.running: tuple[Job, float] | None = None
        self.stop = stop
        self.gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread = threading.Thread(target=self._work, args=(jobs,), daemon=True, name="prefetch")
        self.thread.start()

    def next(self, timeout_seconds: float) -> tuple[str, Batch] | None:
        """The next batch; None after the last."""
        while True:
            try:
                item = self.queue.get(timeout=min(1.0, timeout_seconds))
            except Empty:
                if self.stop():
                    raise Interrupted from None
                running = self.running
                if running and time.monotonic() - running[1] > timeout_seconds:
                    raise DataError(_name_the_hung(running[0], timeout_seconds)) from None
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _work(self, jobs: Iterable[Job]) -> None:
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # a thread begins with the first one
        try:
            for job in jobs:
                self.running = (job, time.monotonic())
                batch = job.run()
                self.running = None
                self._put((job.task, batch))
                if self.stopped.is_set():
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: tuple[str, Batch] | Exception | None) -> None:
        while not self.stopped.is_set():
            with suppress(Full):
                self.queue.put(item, timeout=0.2)
                return


def _name_the_hung(job: Job, timeout_seconds: float) -> str:
    """What to tell when a batch does not end: each of its files is tried alone, in a process that can be killed."""
    from polyvit_fast.data.checking.check import find_broken

    try:
        verdicts = find_broken(job.task, job.loader.task, job.samples(), deadline_seconds=timeout_seconds)
        guilty = (
            "; ".join(f"{printable(verdict.name)}: {verdict.reason}" for verdict in verdicts) or "every file of it decodes alone in time"
        )
    except ValueError as error:
        guilty = str(error)
    return (
        f"task {job.task}: its batch {job.step} was not decoded within decode_timeout_seconds = {timeout_seconds:g} ({guilty}). "
        "Put a good file in its place and start again with --changed-files allow: the run resumes. Or leave it out (`polyvit-fast check` "
        "writes a clean manifest) and start with another --out"
    )
