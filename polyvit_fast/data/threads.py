"""A function over many items on a few threads, for work that releases Python's lock (as decoding by FFmpeg does).

In these threads PyTorch uses no further threads, whatever `torch.set_num_threads` says: with a pool in each of them there would be more
threads than cores, to be woken and waited for at every operator.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch

MAX_DECODING_THREADS = 16
"""Of one task's decoder, unless more are asked for: every task has a decoder of its own, and each of its threads has buffers."""


def count_decoding_threads(num_threads: int, local_processes: int = 1) -> int:
    """Threads of each task's decoder; `num_threads` = 0: as many as this process has cores, when all on this machine divide them."""
    return num_threads or max(1, min(MAX_DECODING_THREADS, count_cores() // local_processes))


def count_cores() -> int:
    """Cores that this process may use, by its affinity and by the limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no limit: the quota is "max"
        return cores


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any], num_threads: int) -> list[Any]:
    """The results of `function` for `items`, in order. Raises what the first failing item raised, after all have ended."""
    if num_threads < 1:
        raise ValueError(f"num_threads = {num_threads} must be at least 1")
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}
    waiting = iter(range(len(items)))  # next() on a range iterator is atomic under Python's lock
    ended: SimpleQueue[None] = SimpleQueue()

    def work() -> None:
        for i in waiting:
            try:
                results[i] = function(items[i])
            except BaseException as error:
                errors[i] = error

    count = min(num_threads, len(items))
    for _ in range(count):
        _idle_thread().begin(work, ended)
    for _ in range(count):
        ended.get()
    if errors:
        raise errors[min(errors)]
    return results


class _DecodeThread:
    """A thread that is used again and again: PyTorch's number of threads belongs to a thread, and is set once when that starts."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # A daemon, not an executor's thread: Python waits for those at exit, so a hung decoder would hang the exit too.
        threading.Thread(target=self._live, daemon=True, name="decode").start()

    def begin(self, work: Callable[[], None], ended: SimpleQueue[None]) -> None:
        """Do the work, then be idle again and put None into `ended`."""

        def call() -> None:
            work()
            _idle.append(self)
            ended.put(None)

        self._calls.put(call)

    def _live(self) -> None:
        with suppress(RuntimeError):  # no further thread can be started
            _compute_alone()
        while True:
            self._calls.get()()


def _compute_alone() -> None:
    """Let PyTorch compute on this thread alone when this thread calls it. Raises RuntimeError when no helper thread can be started."""
    with _birth:
        number = torch.get_num_threads()
        # The number that is set here is also the default of every thread that uses PyTorch for the first time from now on. Another,
        # short thread restores the default for those after it.
        other = threading.Thread(target=torch.set_num_threads, args=(number,))
        torch.set_num_threads(1)
        try:
            other.start()
        except RuntimeError:
            torch.set_num_threads(number)
            raise
        other.join()


_idle: list[_DecodeThread] = []
_birth = threading.Lock()


def _idle_thread() -> _DecodeThread:
    try:
        return _idle.pop()
    except IndexError:
        return _DecodeThread()


def _forget_threads() -> None:
    """Forget all threads in a forked process, which has none of them."""
    global _birth
    _idle.clear()
    _birth = threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
