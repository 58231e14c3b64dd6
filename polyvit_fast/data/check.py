"""Is every file good? Each is really decoded, in processes of their own, which may hang or crash without harm."""

from __future__ import annotations

import csv
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from uuid import uuid4

import torch

from polyvit_fast.config import Decoder, Source, Task, Train
from polyvit_fast.data.dali import UnavailableError
from polyvit_fast.data.synthetic import Synthetic
from polyvit_fast.media import Media, MediaError, Sample
from polyvit_fast.randomness import generator

Split = Literal["train", "val"]
START_SECONDS = 120.0  # for importing and building a decoder; the deadline of a file counts from the moment it is handed over
AHEAD = 100  # samples per process that others may go on with while one hangs


@dataclass(frozen=True)
class Verdict:
    """What the decoder says of one sample."""

    index: int
    """Its place among the samples."""
    name: str
    """Its media's name."""
    reason: str = ""
    """Why it cannot be used; empty: it can."""


def check_files(config: Train, out: Path, num_workers: int, deadline_seconds: float) -> int:
    """Check all files of all tasks with a progress bar; give the number of broken ones.

    `out` gets TASK-SPLIT.csv, manifests of the good files, and broken.tsv with task, split, file and reason.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    broken: list[tuple[str, str, str, str]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        for name, task, split in _splits(config):
            samples = _source(task, split).samples(task)
            verdicts = scan(name, task, split, samples, num_workers, deadline_seconds)
            verdicts = list(progress.track(verdicts, len(samples), description=f"{name} {split}"))
            found = [(name, split, verdict.name, verdict.reason) for verdict in verdicts if verdict.reason]
            write_clean_manifest(out / f"{name}-{split}.csv", task, samples, verdicts)
            lines = [f"{name} {split}: {len(samples) - len(found)} of {len(samples)} files are good"]
            console.print("\n".join(lines + [f"  {file}: {reason}" for *_, file, reason in found]), markup=False, soft_wrap=True)
            broken += found
    if broken:
        _write_table(out / "broken.tsv", ("task", "split", "path", "reason"), broken)
    console.print(f"{len(broken)} broken files; the manifests of good ones are in {out}", markup=False, soft_wrap=True)
    return len(broken)


def find_broken(
    task_name: str, task: Task, samples: Sequence[Sample], *, deadline_seconds: float, num_workers: int = 2, split: Split = "train"
) -> list[Verdict]:
    """The verdicts on those of `samples` that are broken, hang or crash, each decoded alone."""
    return [verdict for verdict in scan(task_name, task, split, samples, num_workers, deadline_seconds) if verdict.reason]


def write_clean_manifest(path: Path, task: Task, samples: Sequence[Sample], verdicts: Iterable[Verdict]) -> None:
    """Write a table that `Manifest` reads, of the samples that no verdict calls broken. Paths in it are absolute."""
    broken = {verdict.index for verdict in verdicts if verdict.reason}
    good = [sample for index, sample in enumerate(samples) if index not in broken]
    rows = [(os.path.abspath(sample.media.name), " ".join(map(str, sample.labels))) for sample in good]
    _write_table(path, ("path", "labels" if task.multi_label else "label"), rows)


def _splits(config: Train) -> list[tuple[str, Task, Split]]:
    every: list[tuple[str, Task, Split]] = [(name, task, split) for name, task in config.tasks.items() for split in ("train", "val")]
    return [(name, task, split) for name, task, split in every if not isinstance(_source(task, split), Synthetic)]


def _source(task: Task, split: Split) -> Source:
    return {"train": task.train, "val": task.val}[split]


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    with open(temporary, "x", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(temporary, path)


def scan(name: str, task: Task, split: Split, samples: Sequence[Sample], num_workers: int, deadline_seconds: float) -> Iterator[Verdict]:
    """The verdict on every sample, in order, from `num_workers` processes.

    A file that takes longer than `deadline_seconds` or brings the decoder down is named like any other broken one.
    """
    # Each thread waits for a process at a time; a few samples are handed out ahead.
    workers = [_Worker(name, task, split) for _ in range(min(num_workers, len(samples)))]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def judge(index: int) -> Verdict:
        worker = idle.get()
        try:
            return Verdict(index, samples[index].media.name, worker.decode(samples[index].media, deadline_seconds))
        finally:
            idle.put(worker)

    executor = ThreadPoolExecutor(max(1, len(workers)), thread_name_prefix="check")
    pending: deque[Future[Verdict]] = deque()
    try:
        for index in range(len(samples)):
            pending.append(executor.submit(judge, index))
            if len(pending) > AHEAD * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        executor.shutdown()


class _Worker:
    """A process that decodes one file at a time; started when there is one, and again after each that it did not survive."""

    def __init__(self, name: str, task: Task, split: Split) -> None:
        self.name, self.task, self.split = name, task, split
        self.process: BaseProcess | None = None
        self.pipe: Any = None

    def decode(self, media: Media, deadline_seconds: float) -> str:
        """Why a file cannot be used; empty when it can. Raises ValueError when nothing of its kind can be decoded on this machine."""
        if self.process is None or not self.process.is_alive():
            self._start()
        self.pipe.send(media)
        if not self.pipe.poll(deadline_seconds):
            self.kill()
            return f"it was not decoded within {deadline_seconds:g} seconds"
        try:
            answer = self.pipe.recv()
        except EOFError:
            return f"the decoder crashed on it ({self._cause_of_death()})"
        if isinstance(answer, UnavailableError):
            raise ValueError(f"task {self.name}: {answer}") from answer
        return answer

    def kill(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def _cause_of_death(self) -> str:
        assert self.process is not None
        self.process.join(5)
        self.kill()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        # A fork of this process would hold DALI's locks but not its threads; the server imports PyTorch once for all of them.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.task, self.split), daemon=True)
        try:
            process.start()
        except Exception as error:
            fault = f"it cannot be sent to the processes that check its files; define its classes in an importable module ({error})"
            raise ValueError(f"task {self.name}: {fault}") from error
        self.process = process
        theirs.close()
        try:
            fault = self.pipe.recv() if self.pipe.poll(START_SECONDS) else f"it took over {START_SECONDS:g} seconds"
        except EOFError:
            fault = self._cause_of_death()
        if fault:
            self.kill()
            raise RuntimeError(f"task {self.name}: a process that checks its files did not start: {fault}")


def _work(pipe: Any, task: Task, split: Split) -> None:
    """The life of such a process: it answers each file with the reason against it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its processes
    torch.set_num_threads(1)
    try:
        task = replace(task, modality=task.modality.thorough())
        decoder = _source(task, split).decoder(task, batch=1, train=False, num_threads=1)
    except Exception as error:
        return pipe.send(f"{type(error).__name__}: {error}")
    pipe.send("")
    with suppress(EOFError):
        while True:
            media = pipe.recv()
            pipe.send(_reason(decoder, media))


def _reason(decoder: Decoder, media: Media) -> str | UnavailableError:
    try:
        grid = decoder([media], [generator("check", media.name)])
    except MediaError as error:
        return str(error)
    except UnavailableError as error:
        return error
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "" if torch.isfinite(grid).all() else "some of its numbers are not finite"
