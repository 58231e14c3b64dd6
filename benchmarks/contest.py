"""How a case is decided: which candidates compile, which of them are right, and which of these is the fastest."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import lab
from candidates import candidates, label, neighbours
from lab import Job, LostCardError, Request
from race import told

from polyvit_kernels.aot import jobs as plan
from polyvit_kernels.aot.compile import compile_kernel
from polyvit_kernels.tiles import Tile

FINALISTS = 8
GAIN = 0.01
"""What a row must be faster by to take the place of the one in use."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """(rounds, calls in a round) of the first race, and of the last one."""

    first: tuple[int, int] = (2, 3)
    last: tuple[int, int] = (5, 5)
    candidates: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The row in use and the one chosen; seconds of every call of the last race, and why rows were refused, by label.

    None is chosen where no candidate was right.
    """

    job: Job
    old: Tile
    new: Tile | None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def us(self, row: Tile | None) -> float | None:
        """The median of a row in the last race."""
        seconds = self.seconds.get(label(row)) if row else None
        return median(seconds) * 1e6 if seconds else None


def choose(seconds: dict[str, list[float]], in_use: str) -> list[str]:
    """Labels from best to worst by their medians; the one in use comes first when it is within `GAIN` of the best."""
    ranking = sorted(seconds, key=lambda name: median(seconds[name]))
    if in_use in seconds and median(seconds[in_use]) <= (1 + GAIN) * median(seconds[ranking[0]]):
        ranking = [in_use, *(name for name in ranking if name != in_use)]
    return ranking


class Crew:
    """The processes that tune: one that has the card, and one for each core that compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self._spawn = multiprocessing.get_context("spawn")
        self._lab: ProcessPoolExecutor | None = None
        self._compilers: ProcessPoolExecutor | None = None
        self._reasons: dict[str, str] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._lab, self._compilers):
            if pool:
                pool.shutdown(cancel_futures=True)

    def ask(self, function: Callable[..., dict], job: Job, rows: list[Tile], refused: dict[str, str], *rest: int) -> dict[str, Any]:
        """`function(job, rows, *rest)` where the card is; without the rows after which the card was lost, which are refused."""
        rows = [row for row in rows if label(row) not in refused]
        while rows:
            self._lab = self._lab or ProcessPoolExecutor(1, mp_context=self._spawn)
            try:
                return self._lab.submit(function, job, rows, *rest).result()
            except LostCardError as lost:
                _, name, error = lost.args
                refused[name] = f"the card was lost: {error}"
                rows = [row for row in rows if label(row) != name]
            except Exception as error:
                # The process is gone, and nobody knows by which row.
                refused |= dict.fromkeys(map(label, rows), f"the process was lost: {told(error)}")
                rows = []
            self._lab.shutdown(wait=False, cancel_futures=True)
            self._lab = None
        return {}

    def compile(self, requests: Sequence[Request]) -> list[str]:
        """Why each kernel will not do, or nothing; each is compiled once."""
        new = {repr(request): request for request in requests if repr(request) not in self._reasons}
        if new:
            self._reasons |= dict(zip(new, self._map(lab.compile_apart, new.values()), strict=True))
        return [self._reasons[repr(request)] for request in requests]

    def excesses(self, row: Tile, dtype: str) -> list[str]:
        """What is beyond the budget in any kernel that the row stands for."""
        count = len(list(plan.variants(row, dtype)))
        return [reason for found in self._map(_excesses, [(row, dtype, index) for index in range(count)]) for reason in found]

    def _map(self, function: Callable[..., Any], arguments) -> list[Any]:
        self._compilers = self._compilers or ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=self._spawn)
        return list(self._compilers.map(function, arguments, [self.arch] * len(arguments)))


def _excesses(kernel: tuple[Tile, str, int], arch: int) -> list[str]:
    row, dtype, index = kernel
    variant = plan.CompileJob(tile=row, dtype=dtype, arch=arch, index=index).variant()
    try:
        return compile_kernel(variant, arch).excesses()
    except Exception as error:
        return [told(error)]


def hold(job: Job, old: Tile, crew: Crew, lengths: Lengths, check_budget: bool = True) -> Outcome:
    """Decide a case; `old` is the row in use."""
    refused: dict[str, str] = {}
    rows = candidates(job.case, old, crew.arch)[: lengths.candidates]
    right = _right(job, rows, old, crew, refused)
    first = _race(job, right, crew, refused, lengths.first)
    finalists = choose(first, label(old))[:FINALISTS]
    rows_by_label = {label(row): row for row in right}
    if label(old) in first and label(old) not in finalists:
        finalists.append(label(old))
    last = _race(job, [rows_by_label[name] for name in finalists], crew, refused, lengths.last)
    if last and lengths.candidates is None:
        best = rows_by_label[choose(last, label(old))[0]]
        near = _right(job, [row for row in neighbours(job.case, best) if label(row) not in rows_by_label], old, crew, refused)
        rows_by_label |= {label(row): row for row in near}
        again = [best, *near, *([old] if label(old) in last and label(old) != label(best) else [])]
        last |= _race(job, again, crew, refused, lengths.last) if near else {}
    for name in choose(last, label(old)):
        row = rows_by_label[name]
        excesses = crew.excesses(row, job.case.dtypes()[0]) if check_budget and name != label(old) and row.op == job.case.op else []
        if not excesses:
            return Outcome(job=job, old=old, new=row, seconds=last, refused=refused)
        refused[name] = excesses[0]
    return Outcome(job=job, old=old, new=None, seconds=last, refused=refused)


def _right(job: Job, rows: list[Tile], old: Tile, crew: Crew, refused: dict[str, str]) -> list[Tile]:
    """Those that compile well and are right; the one in use need only be right."""
    asked = crew.ask(lab.requests, job, rows, refused)
    kernels = {name: found for name, found in asked.items() if not isinstance(found, str)}
    reasons = iter(crew.compile([request for found in kernels.values() for request in found]))
    for name, found in asked.items():
        reason = found if isinstance(found, str) else next(filter(None, [next(reasons) for _ in found]), "")
        if reason and name != label(old):
            refused[name] = reason
    rows = [row for row in rows if label(row) not in refused]
    refused |= {name: reason for name, reason in crew.ask(lab.judge, job, rows, refused).items() if reason}
    return [row for row in rows if label(row) not in refused]


def _race(job: Job, rows: list[Tile], crew: Crew, refused: dict[str, str], length: tuple[int, int]) -> dict[str, list[float]]:
    found = crew.ask(lab.times, job, rows, refused, *length)
    refused |= {name: seconds for name, seconds in found.items() if isinstance(seconds, str)}
    return {name: seconds for name, seconds in found.items() if not isinstance(seconds, str)}
