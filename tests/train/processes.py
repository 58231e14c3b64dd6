"""Several real processes of one run, as torchrun would start them, for tests."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from polyvit_fast.train.distributed.process_group import joined

SECONDS = 120.0  # many times what any of these tests takes

# Processes are copies of one that has imported all this once: an import takes seconds.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(
    ["polyvit_fast.train.evaluate", "polyvit_fast.train.distributed.fsdp", "torchmetrics.classification", "torch._dynamo"]
)


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` gives on each of `size` processes that have joined, in the order of ranks; as `started`."""
    return started(size, _join, function, *arguments)


def started(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives on each of `size` processes, in the order of ranks.

    Fails with a process's traceback when one has an error, and when they have not ended in time.
    """
    deadline, port, threads = time.monotonic() + SECONDS, free_port(), torch.get_num_threads()
    pipes = [_START.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _START.Process(target=_work, args=(rank, size, port, threads, pipes[rank][1], function, arguments)) for rank in range(size)
    ]
    with _own_path():
        for process in processes:
            process.start()
    try:
        answers = [_answer(rank, pipe, deadline) for rank, (pipe, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            process.kill()
    failed = [answer for good, answer in answers if not good]
    assert not failed, "\n".join(failed)
    return [answer for _, answer in answers]


@contextmanager
def _own_path() -> Iterator[None]:
    """Inside, processes inherit a path without the folder that `torchvision_without_extension` adds: what it declares they do not have."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if folder != str(Path(sys.prefix) / "foreign")]
    try:
        yield
    finally:
        sys.path[:] = path


def _answer(rank: int, pipe: Connection, deadline: float) -> tuple[bool, Any]:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return False, f"process {rank} did not end in time"
    return pickle.loads(pipe.recv_bytes())


def _work(
    rank: int, size: int, port: int, threads: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(threads)  # as many as here: their number is in the last digits
    faulthandler.dump_traceback_later(SECONDS - 5)  # where it hangs
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        answer = True, function(*arguments)
    except BaseException:
        answer = False, f"process {rank}: {traceback.format_exc()}"
    # Not by the pipe's own way with tensors, which needs this process to stay.
    pipe.send_bytes(pickle.dumps(answer))


def _join(function: Callable[..., Any], *arguments: Any) -> Any:
    with joined("cpu") as world:
        return function(world, *arguments)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
