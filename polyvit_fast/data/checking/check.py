"""Check whether every file is good: each is really decoded, in separate processes, which may hang or crash without harm."""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from polyvit_fast.config import Decoder, Source, Task, Train
from polyvit_fast.data.checking.digests import CheckedSplit, Split, sha256
from polyvit_fast.data.checking.findings import SPLITS, Findings, Verdict
from polyvit_fast.data.dali import UnavailableError
from polyvit_fast.data.decoders import build_task_decoder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.extras import DECODING, require
from polyvit_fast.media import DEFECTS, Media, MediaError, Sample, printable
from polyvit_fast.randomness import generator

START_SECONDS = 120.0  # for imports and the decoder; the deadline of a file counts from the moment it is handed over
AHEAD = 100  # samples per process with which the others may go on while one hangs


Prepare = Callable[[], object]
"""Makes the classes of a task known in a process that decodes its files: runs the experiment file that has them."""


def check_files(config: Train, out: Path, num_workers: int, deadline_seconds: float, prepare: Prepare | None = None) -> int:
    """Check all files of all tasks with a progress bar; return the number of broken ones. Findings are reported and stored at once.

    `out` gets broken.tsv with task, split, file and reason; for each split that was checked completely TASK-SPLIT.csv, a manifest of the
    good files, and TASK-SPLIT.sha256, with which the next check finds what has changed; and duplicates.tsv with files whose bytes are
    equal although one of them is held out, or their labels differ. Raises ValueError at the end when some splits could not be
    checked.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    require("checking files", *DECODING)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    judge = partial(scan, num_workers=num_workers, deadline_seconds=deadline_seconds, prepare=prepare)
    findings = Findings(out, lambda text: console.print(printable(text), markup=False, highlight=False, soft_wrap=True))
    with Progress(*columns, console=console, transient=True) as progress:
        try:
            for name, task in config.tasks.items():
                checked: dict[Split, CheckedSplit] = {}
                for split in SPLITS:
                    if isinstance(_find_source(task, split), Synthetic | None):
                        continue
                    try:
                        checked[split] = _check_split(name, task, split, findings, progress, judge)
                    except ValueError as error:
                        findings.fail(name, split, error)
                findings.compare(name, task, checked)
        except KeyboardInterrupt:
            findings.report(f"stopped; so far {findings.summarise()}")
            raise
    findings.report(findings.summarise())
    if findings.failures:
        raise ValueError(f"{len(findings.failures)} splits could not be checked, for the reasons above: {'; '.join(findings.failures)}")
    return findings.num_broken


def _check_split(
    name: str, task: Task, split: Split, findings: Findings, progress: Any, judge: Callable[..., Generator[Verdict, None, None]]
) -> CheckedSplit:
    """Check a split and store the findings. Raises ValueError when it cannot be listed, or its kind of files cannot be decoded."""
    source = _find_source(task, split) or task.val
    try:
        samples = source.samples(task)
        remarks = source.remarks(task)
    except (ValueError, OSError) as error:
        if split != "train" and _lacks_classes(task):
            raise ValueError("its files were not checked: its labels need the class list of train, which cannot be read") from error
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    if not samples:
        raise ValueError(f"{source} has no samples")
    for remark in remarks:
        findings.report(f"{name} {split}: {remark}")
    bar = progress.add_task(f"{name} {split}", total=len(samples))
    verdicts = []
    try:
        with closing(judge(name, task, split, samples)) as judged:
            for verdict in judged:
                verdicts.append(verdict)
                if verdict.reason:
                    findings.add(name, split, verdict)
                progress.advance(bar)
    finally:
        progress.remove_task(bar)
    return findings.finish(name, task, split, samples, verdicts)


def _lacks_classes(task: Task) -> bool:
    """Whether the class list of the training source, which holds for every split, cannot be read."""
    try:
        task.train.class_names(task)
    except (ValueError, OSError):
        return True
    return False


def find_broken(
    task_name: str, task: Task, samples: Sequence[Sample], *, deadline_seconds: float, num_workers: int = 2, split: Split = "train"
) -> list[Verdict]:
    """The verdicts on those of `samples` that are broken, hang or crash the decoder, each decoded alone."""
    return [verdict for verdict in scan(task_name, task, split, samples, num_workers, deadline_seconds) if verdict.reason]


def _find_source(task: Task, split: Split) -> Source | None:
    """The samples of a split; None: the task has no test files."""
    return {"train": task.train, "val": task.val, "test": task.test}[split]


def scan(
    name: str,
    task: Task,
    split: Split,
    samples: Sequence[Sample],
    num_workers: int,
    deadline_seconds: float,
    prepare: Prepare | None = None,
) -> Generator[Verdict, None, None]:
    """The verdict on every sample, in order, from `num_workers` processes.

    A file that takes longer than `deadline_seconds` or crashes the decoder counts as broken.
    """
    # Each thread waits for one process; some samples are handed out ahead.
    workers = [_CheckProcess(name, task, split, prepare) for _ in range(min(num_workers, len(samples)))]
    idle: SimpleQueue[_CheckProcess] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def judge(index: int) -> Verdict:
        worker, media = idle.get(), samples[index].media
        try:
            return Verdict(index, media.name, *worker.judge(media, deadline_seconds))
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


class _CheckProcess:
    """A process that decodes one file at a time. It is started for the first file, and again after a file that ended it."""

    def __init__(self, name: str, task: Task, split: Split, prepare: Prepare | None) -> None:
        self.name, self.task, self.split, self.prepare = name, task, split, prepare
        self.process: BaseProcess | None = None
        self.pipe: Any = None

    def judge(self, media: Media, deadline_seconds: float) -> tuple[str, str]:
        """(why a file cannot be used, empty if it can; the SHA-256 of its bytes, empty if they cannot be read).

        Raises ValueError when no file of its kind can be decoded on this machine, RuntimeError when the decoder has a bug.
        """
        if self.process is None or not self.process.is_alive():
            self._start()
        self.pipe.send(media)
        if not self.pipe.poll(deadline_seconds):
            self.kill()
            return f"it was not decoded within {deadline_seconds:g} seconds", ""
        try:
            answer = self.pipe.recv()
        except EOFError:
            return f"the decoder crashed on it ({self._cause_of_death()})", ""
        if isinstance(answer, UnavailableError):
            raise ValueError(f"task {self.name}: {answer}") from answer
        if isinstance(answer, _Defect):
            fault = "the decoder has a bug, and the file is not to blame; please report it with what follows"
            raise RuntimeError(f"task {self.name}, file {printable(media.name)}: {fault}\n{answer.traceback}")
        with suppress(EOFError):
            if self.pipe.poll(deadline_seconds):
                return answer, self.pipe.recv()
        self.kill()
        return answer, ""

    def kill(self) -> None:
        """End the process, if it runs."""
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
        # A fork of this process would hold DALI's locks but not its threads. The fork server imports PyTorch once for all processes.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        _start_fork_server()
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.prepare, self.split), daemon=True)
        process.start()
        self.process = process  # once there is one to be killed
        theirs.close()
        try:
            self.pipe.send(self.task)
        except Exception as error:
            self.kill()
            fault = f"it cannot be sent to the processes that check its files; define its classes in an importable module ({error})"
            raise ValueError(f"task {self.name}: {fault}") from error
        try:
            fault = self.pipe.recv() if self.pipe.poll(START_SECONDS) else f"it took over {START_SECONDS:g} seconds"
        except EOFError:
            fault = self._cause_of_death()
        if fault:
            self.kill()
            raise RuntimeError(f"task {self.name}: a process that checks its files did not start: {fault}")


def _start_fork_server() -> None:
    """Start it with SIGINT and SIGTERM blocked: Ctrl-C reaches all processes of a terminal, and this one ends the others itself."""
    resource_tracker.ensure_running()  # which would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Any, prepare: Prepare | None, split: Split) -> None:
    """The main function of such a process: it answers each file with the reason why it cannot be used."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent, which then ends its processes
    torch.set_num_threads(1)
    try:
        if prepare:
            prepare()
        task: Task = pipe.recv()
        task = replace(task, modality=task.modality.thorough())
        decoder = build_task_decoder(_find_source(task, split) or task.val, task, batch=1, train=False, num_threads=1)
    except Exception as error:
        return pipe.send(f"{type(error).__name__}: {error}")
    pipe.send("")
    with suppress(EOFError):
        while True:
            media = pipe.recv()
            reason = _reason(decoder, media)
            pipe.send(reason)
            if isinstance(reason, str):
                pipe.send(sha256(media))


@dataclass(frozen=True)
class _Defect:
    """The traceback of what a decoder raised because of a bug in its code."""

    traceback: str


def _reason(decoder: Decoder, media: Media) -> str | UnavailableError | _Defect:
    try:
        grid = decoder([media], [generator("check", media.name)])
    except MediaError as error:
        return str(error)
    except UnavailableError as error:
        return error
    except DEFECTS:
        return _Defect(traceback.format_exc())
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "" if torch.isfinite(grid).all() else "some of its numbers are not finite"
