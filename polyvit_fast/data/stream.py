"""Batches along the schedule. Which samples a step sees, and how each is augmented, are pure functions of (seed, task, step).

So there is no state to save: the step determines the data. A `Loader` turns a task's step into a batch; `prefetch` runs loaders in a
thread, ahead of the training loop. A broken file is replaced by another of its task, always the same one, with the label of that file.
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
from polyvit_fast.data.augment.mixing import CutBox, draw_mix
from polyvit_fast.data.dali import UnavailableError
from polyvit_fast.data.decoder_messages import decode_or_forget, describe_messages
from polyvit_fast.data.decoders import build_task_decoder
from polyvit_fast.data.device import GpuDecoder, own_stream
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.data.sources.fingerprint import Fingerprint, take_fingerprint
from polyvit_fast.data.sources.locations import CHANGED_FILES, Split, advise_location, advise_on_broken
from polyvit_fast.data.threads import count_decoding_threads
from polyvit_fast.media import DEFECTS, Sample, printable
from polyvit_fast.randomness import generator, key, permutation


class DataError(RuntimeError):
    """Training cannot go on with this data: too many files are broken, a decoder hangs, or there is none for a kind of files."""


NO_FILES_FAULT = (torch.AcceleratorError, torch.OutOfMemoryError, DataError, *DEFECTS)
"""Errors that end the run. Treated as broken files, they would condemn good files one after the other."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The reader of batches was asked to stop while it waited for one."""


@dataclass(frozen=True)
class Batch:
    """The examples of one task for one step, or some of its validation examples."""

    grid: Tensor
    """[batch, frames, rows, columns, channels] in training, [batch, views, frames, …] in evaluation; uint8 or float32."""
    labels: Tensor
    """int64 [batch], or float32 multi-hot [batch, num_classes] of a multi-label task."""
    mixup_ratio: float = 1.0
    """Weight of each example's labels, and with mixup of its grid, against the one that it is mixed with; 1 switches mixing off."""
    cutmix_box: CutBox | None = None
    """(top, left, bottom, right) of what is the other example's, of a task with CutMix; empty where the batch has mixup instead."""
    indices: tuple[int, ...] = ()
    """Of validation examples, their numbers among the samples."""


@lru_cache(maxsize=64)
def _epoch_order(seed: int, task: str, epoch: int, num_samples: int) -> np.ndarray:
    return permutation(num_samples, seed, "order", task, epoch)


def sample_index(seed: int, task: str, position: int, num_samples: int) -> int:
    """The sample at `position` of a task's endless sequence, in which every epoch has every sample exactly once."""
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
"""The most grids that an evaluation computes at once: enough to keep a GPU busy, with less memory than training on a few takes."""


class Loader:
    """The batches of one task: training batches by step, validation batches in order.

    `rank` of `world_size` loads its part of every training batch; the parts of all ranks together are the batch of one process.
    Validation batches do not depend on the ranks. `split` says which files stand for the validation files.
    """

    def __init__(
        self,
        name: str,
        config: Train,
        *,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        split: Split = "val",
        local_size: int = 1,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name, self.config, self.task, self.trains, self.report = name, config, config.tasks[name], train, report
        self.source = self.task.train if train else self.task.val
        try:
            self.classes = class_list(self.task)
            self.samples = self.source.samples(self.task)
        except (ValueError, OSError) as error:
            raise ValueError(f"task {name}: {error}{advise_location(name, {'train': self.task.train, split: self.task.val})}") from error
        if not self.samples:
            raise ValueError(f"tasks.{name}: {self.source} has no samples")
        self.size = local_batch_size(name, self.task, world_size) if train else evaluation_size(self.task)
        self.first = rank * self.size if train else 0
        on_gpu = config.device == "cuda" and config.data.decoding != "cpu"
        self.num_threads = count_decoding_threads(config.data.num_threads, local_size)
        options = {"batch": self.size, "train": train, "num_threads": self.num_threads}
        self.decoder = build_task_decoder(self.source, self.task, **options, device="cuda" if on_gpu else "cpu")
        self.broken: dict[int, str] = {}
        self.reported: set[str] = set()  # kinds of messages of libraries
        self.note = ""
        self._report_note()
        if rank == 0 and (train or self.source != self.task.train):
            for remark in self.source.remarks(self.task):
                report(f"task {name}: {remark}")

    def grid_dtype(self) -> torch.dtype:
        """The dtype of the grids, from one decoded sample."""
        return self._decode_or_replace(sample_index(self.config.seed, self.name, 0, len(self.samples)), 0)[1].dtype

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of all samples, their order, labels and files as they are now."""
        return take_fingerprint(self.samples)

    def positions(self, step: int) -> range:
        """The positions in the task's endless sequence that its `step`-th batch covers on this rank."""
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
        mix = draw_mix(self.task, self.config.seed, self.name, step)
        return Batch(grid[:, 0], label_tensor(self.task, [self.samples[i] for i in used]), mix.ratio, mix.box)

    def _decode_together(self, used: list[int], positions: Sequence[int]) -> Tensor:
        """The grids of a batch. In `used`, samples that are broken at their position are replaced by their substitutes."""
        # A file that failed before is decoded again, but alone: another part of it may be good, and what a step sees must not depend on
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
        return _concatenate([grids[row] for row in range(len(used))])

    def load_validation(self, start: int) -> Batch:
        """Up to `size` samples from `start`, all views of each. Broken files are left out and reported. Empty after the last sample."""
        indices = [i for i in range(start, min(start + self.size, len(self.samples))) if i not in self.broken]
        if not indices:
            return Batch(self._no_grid(), label_tensor(self.task, []))
        try:
            labels = label_tensor(self.task, [self.samples[i] for i in indices])
            return Batch(self._decode(indices, indices), labels, indices=tuple(indices))
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
            return Batch(_concatenate(grids) if grids else self._no_grid(), label_tensor(self.task, samples), indices=tuple(good))

    def _no_grid(self) -> Tensor:
        return torch.empty(0, self.task.modality.eval_views, *self.task.modality.grid)

    def _decode(self, indices: Sequence[int], positions: Sequence[int]) -> Tensor:
        try:
            grid = self._call_decoder(indices, positions)
        except UnavailableError as error:
            raise DataError(f"task {self.name}: {error}") from error
        except DEFECTS as error:
            files = ", ".join(printable(self.samples[i].media.name) for i in self._find_culprits(indices, positions) or indices)
            error.add_note(f"task {self.name}: while decoding {files}. It is a bug in the decoder, not a broken file: please report it")
            raise
        self._report_note()
        media = [self.samples[i].media for i in indices]
        for text in describe_messages(self.reported, media, lambda row: self._call_decoder([indices[row]], [positions[row]])):
            self.report(f"task {self.name}: {text}")
        return grid

    def _call_decoder(self, indices: Sequence[int], positions: Sequence[int]) -> Tensor:
        rngs = [generator(self.config.seed, "augment", self.name, position) for position in positions]
        return decode_or_forget(self.decoder, [self.samples[i].media for i in indices], rngs)

    def _find_culprits(self, indices: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The samples of a batch with which the decoder's bug shows when each is decoded alone."""
        culprits = []
        for index, position in zip(indices, positions, strict=True):
            try:
                self._call_decoder([index], [position])
            except DEFECTS:
                culprits.append(index)
            except Exception:  # a broken file
                continue
        return culprits

    def release(self) -> None:
        """Let the decoder free the memory that it keeps for the next batch, when there is none soon."""
        if isinstance(self.decoder, GpuDecoder):
            self.decoder.release()

    def _report_note(self) -> None:
        """Report what a GPU decoder leaves to the CPU, and why, if that was not reported yet."""
        note = getattr(self.decoder, "note", "")
        if note != self.note:
            self.note = note
            self.report(f"task {self.name}: {note}")

    def _decode_or_replace(self, index: int, position: int) -> tuple[int, Tensor]:
        """The sample at this position and its grid: `index`, or the first of its substitutes that can be decoded there."""
        for attempt in count():
            candidate = self._choose_substitute(index, attempt)
            try:
                return candidate, self._decode([candidate], [position])
            except NO_FILES_FAULT:
                raise
            except Exception as error:
                self._mark_broken(candidate, error)
        raise AssertionError("there is always another substitute")

    def _choose_substitute(self, index: int, attempt: int) -> int:
        return key(self.config.seed, "replace", self.name, index, attempt) % len(self.samples) if attempt else index

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
                f"allows; the last one is {name} ({self.broken[index]}). `polyvit-fast check` names them all and writes a clean manifest. "
                f"{advise_on_broken(self.name, self.trains)}"
            )


def _concatenate(grids: list[Tensor]) -> Tensor:
    with own_stream(grids[0].device):
        return torch.cat(grids)


def local_batch_size(name: str, task: Task, world_size: int) -> int:
    """The number of examples that each process gets of a task's batch. Raises ValueError when the batch does not divide."""
    if task.batch % world_size:
        raise ValueError(f"tasks.{name}.batch = {task.batch} does not divide by the {world_size} processes")
    size = task.batch // world_size
    if size % task.micro_batches:
        raise ValueError(
            f"tasks.{name}: each of the {world_size} processes gets {size} examples of a batch, which do not divide into "
            f"micro_batches = {task.micro_batches}"
        )
    if task.mixes and task.mixup_pairs == "neighbours" and size % 2 and world_size > 1:
        raise ValueError(
            f"tasks.{name}: {'mixup' if task.mixup else 'CutMix'} pairs neighbours, but each of the {world_size} processes gets {size} "
            f"examples of the batch of {task.batch}; choose a batch that makes that number even, or mixup_pairs = reversed"
        )
    return size


def evaluation_size(task: Task) -> int:
    """How many samples an evaluation decodes and computes together."""
    # It does not depend on the number of processes, with which rounding would change, and so a metric in its last digits.
    return max(1, min(task.batch // task.micro_batches, EVAL_GRIDS) // task.modality.eval_views)


@dataclass(frozen=True)
class BatchRequest:
    """A batch to be made: of which loader and step, and how."""

    loader: Loader
    step: int
    samples: Callable[[], list[Sample]]
    run: Callable[[], Batch]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.loader.name


def request_batches(loaders: dict[str, Loader], plan: StepPlan, first_step: int) -> Iterator[BatchRequest]:
    """The batches of the plan's steps from `first_step` on, in order. Each is to be made before the next is asked for."""
    counts, last = dict.fromkeys(loaders, 0), {name: step for step, names in enumerate(plan) for name in names}
    for step, names in enumerate(plan):
        for name in names:
            if step >= first_step:
                yield _request_step(loaders[name], counts[name])
                if step == last[name]:
                    loaders[name].release()
            counts[name] += 1


def _request_step(loader: Loader, step: int) -> BatchRequest:
    return BatchRequest(loader, step, lambda: loader.step_samples(step), lambda: loader.load(step))


def request_validation_batches(loader: Loader, rank: int = 0, world_size: int = 1) -> Iterator[BatchRequest]:
    """The validation batches of `rank`: batches go to all ranks in turn, so that together they have every sample exactly once.

    Every rank has the same number of batches; those after the last sample are empty.
    """
    for first in range(0, len(loader.samples), loader.size * world_size):
        start = first + loader.size * rank
        yield BatchRequest(
            loader,
            start,
            lambda start=start: list(loader.samples[start : start + loader.size]),
            lambda start=start: loader.load_validation(start),
        )


def prefetch(
    requests: Iterable[BatchRequest], *, depth: int, timeout_seconds: float, stop: Callable[[], object] = lambda: False
) -> Iterator[tuple[str, Batch]]:
    """(task, batch) for each request in order, up to `depth` of them made ahead in a thread.

    What making a batch raised is raised when its turn comes. Raises DataError with the file's name when a batch takes longer than
    `timeout_seconds`, and Interrupted when `stop` becomes true while a batch is waited for.
    """
    worker = _PrefetchThread(requests, depth, stop)
    try:
        while True:
            item = worker.next(timeout_seconds)
            if item is None:
                return
            yield item
    finally:
        worker.stopped.set()
        worker.thread.join(2.0)  # Python must not end in the middle of a decoder


class _PrefetchThread:
    """The thread behind `prefetch`."""

    def __init__(self, requests: Iterable[BatchRequest], depth: int, stop: Callable[[], object]) -> None:
        self.queue: Queue[tuple[str, Batch] | Exception | None] = Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.running: tuple[BatchRequest, float] | None = None
        self.stop = stop
        self.gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread = threading.Thread(target=self._work, args=(requests,), daemon=True, name="prefetch")
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
                    raise DataError(_describe_hang(running[0], timeout_seconds)) from None
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _work(self, requests: Iterable[BatchRequest]) -> None:
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # a new thread's current GPU is the first one
        try:
            for request in requests:
                self.running = (request, time.monotonic())
                batch = request.run()
                self.running = None
                self._put((request.task, batch))
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


def _describe_hang(request: BatchRequest, seconds: float) -> str:
    """The message for a batch that does not end. Each of its files is decoded alone, in a process that can be killed."""
    from polyvit_fast.data.checking.check import find_broken

    try:
        split = "train" if request.loader.trains else "val"
        verdicts = find_broken(request.task, request.loader.task, request.samples(), deadline_seconds=seconds, split=split)
        cause = "; ".join(f"{printable(verdict.name)}: {verdict.reason}" for verdict in verdicts) or "each file alone is decoded in time"
    except (ValueError, RuntimeError) as error:  # that the files cannot be looked at must not hide the hang
        cause = str(error)
    remedy = "Replace the file by a good one, and start the same command again"
    if request.loader.trains:
        remedy = (
            "Start the same command again with a longer --decode-timeout-seconds; or once you have replaced the file by a good one, or "
        )
        remedy += f"made the clean manifest of `polyvit-fast check` tasks.{request.task}.train of the experiment. {CHANGED_FILES}"
    cause = f"within decode_timeout_seconds = {seconds:g} ({cause})"
    return f"task {request.task}: its batch {request.step} was not decoded {cause}. {remedy}"
