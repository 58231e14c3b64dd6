"""Compiling peers and our kernels side by side, so that a later run finds them in torch's and Triton's caches."""

import fcntl
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from card import HAS_GPU
from problem import Problem
from race import COMPILED, FIRST, Rivalry, forget, to_compile, told

STEP_GIB = 26
"""What a process that trains a whole model may take of the card, at the sizes of `bench_step.py`."""
THREADS_OF_A_COMPILER = 4


@dataclass(frozen=True)
class Job:
    """A rivalry's contenders in one direction."""

    direction: str
    build: Callable[..., Rivalry]
    arguments: tuple[object, ...]


def compile_all(jobs: Sequence[Job], num_processes: int, phase: str = COMPILED) -> None:
    """Compile the peers of all jobs, or in the first phase our own kernels. What cannot be is told, and is compiled when it is timed.

    Kernels and whole steps have processes of their own: steps fill the card's memory, and compile with other settings.
    """
    began = time.monotonic()
    kinds = [
        list(dict.fromkeys((job.build, job.arguments) for job in jobs if bool(job.arguments) == is_kernel)) for is_kernel in (False, True)
    ]
    steps = max(1, torch.cuda.mem_get_info()[1] // (STEP_GIB << 30)) if HAS_GPU else 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(THREADS_OF_A_COMPILER)
        pools = [_pool(min(steps, num_processes), folder), _pool(max(1, num_processes - steps), folder)]
        futures = []
        try:
            for pool, rivalries in zip(pools, kinds, strict=True):
                for rivalry in rivalries:
                    directions = [job.direction for job in jobs if (job.build, job.arguments) == rivalry]
                    futures.append(pool.submit(compile_one, *rivalry, directions, phase))
            for future in as_completed(futures):
                error = future.exception()
                print(f"[{time.monotonic() - began:.0f} s] {told(error) if error else future.result()}", flush=True)
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)


def _pool(num_processes: int, folder: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=take_turns_on_the_card, initargs=(folder,))


def compile_one(build: Callable[..., Rivalry], arguments: Sequence[object], directions: Sequence[str], phase: str = COMPILED) -> str:
    """Call what is compiled of a rivalry once, each way; gives a line about it."""
    start, title, absent = time.monotonic(), "", {}
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rivalry = build(*arguments)
        if phase == FIRST and isinstance(rivalry, Problem):
            failed = {f"{name} {direction}": reason for direction in directions for name, reason in rivalry.compile_own(direction).items()}
            return _line(rivalry.title, start, failed)
        names = to_compile(rivalry.contenders)
        for direction in directions if names else ():
            group = rivalry.enter(direction, names)
            title, absent = group.title, absent | group.absent
    return _line(title, start, {name: reason for name, reason in absent.items() if name in names})


def _line(title: str, start: float, failed: dict[str, str]) -> str:
    reasons = "".join(f"; not {name}: {reason}" for name, reason in failed.items())
    return f"compiled {title or 'nothing'} in {time.monotonic() - start:.0f} s{reasons}"


def take_turns_on_the_card(folder: str) -> None:
    """Let torch's compiler, which times what it chooses from, do so in one process at a time."""
    from torch._inductor.runtime.benchmarking import benchmarker

    benchmarker.benchmark_gpu = one_at_a_time(benchmarker.benchmark_gpu, Path(folder) / "lock")


def one_at_a_time(function: Callable, path: Path) -> Callable:
    """The function, called by one process at a time."""

    @wraps(function)
    def run(*args, **kwargs):
        with locked(path):
            return function(*args, **kwargs)

    return run


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock that all processes share; that of a process that ends is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
