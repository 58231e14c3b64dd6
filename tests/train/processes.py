"""Real processes for tests: those of one run, as torchrun would start them, and commands as a shell starts them.

All are copies of a process that has imported what they need. Two of one run are started once, for all tests of a session.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polyvit_fast import __main__
from polyvit_fast.train.distributed.process_group import process_group

SECONDS = 120.0  # many times what any of these tests takes


@contextmanager
def _own_path() -> Iterator[None]:
    """Inside, processes inherit a path without the folder that `torchvision_without_extension` adds: what it declares they do not have."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if folder != str(Path(sys.prefix) / "foreign")]
    try:
        yield
    finally:
        sys.path[:] = path


# The process that they are copies of imports all this once, which takes ten seconds.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(
    ["polyvit_fast.cli", "polyvit_fast.data.checking.check", "polyvit_fast.train.loop", "polyvit_fast.train.distributed.fsdp"]
    + ["torchmetrics.classification", "torch._dynamo", "torch.utils.tensorboard"]
)


def begin() -> None:
    """Start the process that others are copies of. A session has one alone: this has to come before that of `polyvit-fast check`."""
    with _own_path():
        forkserver.ensure_running()


class Processes:
    """Processes that run one function after another, each time with the environment of a new torchrun."""

    def __init__(self, size: int) -> None:
        self.pipes = [_START.Pipe() for _ in range(size)]
        threads = torch.get_num_threads()
        self.processes = [
            _START.Process(target=_serve, args=(rank, size, threads, self.pipes[rank][1]), daemon=True) for rank in range(size)
        ]
        with _own_path():
            for process in self.processes:
                process.start()
        self.deadline = 0.0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let all of them call `function(*arguments)`, and do not wait."""
        message = pickle.dumps((free_port(), function, arguments))
        for pipe, _ in self.pipes:
            pipe.send_bytes(message)
        self.deadline = time.monotonic() + SECONDS

    def wait(self) -> list[Any]:
        """What they gave back, in the order of ranks; None from a process that was killed.

        Fails with a process's traceback when one has an error, and when they are not done in time.
        """
        answers = [self._receive(rank) for rank in range(len(self.processes))]
        failed = [answer for good, answer in answers if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        pipe, process = self.pipes[rank][0], self.processes[rank]
        while not pipe.poll(0.05):
            if not process.is_alive() and not pipe.poll():
                return True, None
            if time.monotonic() > self.deadline:
                return False, f"process {rank} was not done in time"
        return pickle.loads(pipe.recv_bytes())

    def kill(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.kill()
            process.join()


_shared: list[Processes] = []
"""The two processes of the session, while no test uses them."""


@contextmanager
def start_processes(size: int) -> Iterator[Processes]:
    """`size` processes; of two, those of the session. After a failure they are ended, for they may wait for each other."""
    processes = _shared.pop() if size == 2 and _shared else Processes(size)
    try:
        yield processes
        if size == 2 and all(process.is_alive() for process in processes.processes):
            _shared.append(processes)
    finally:
        if processes not in _shared:
            processes.kill()


def run_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives on each of `size` processes, in the order of ranks."""
    with start_processes(size) as processes:
        processes.submit(function, *arguments)
        return processes.wait()


def run_together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` gives on each of `size` processes of one process group, in the order of ranks."""
    return run_processes(size, _call_with_world, function, *arguments)


@atexit.register
def _end_shared() -> None:
    for processes in _shared:
        processes.kill()


class Command:
    """`polyvit-fast ARGUMENTS` in a process of its own and in a folder, with its output in a file there, a pipe or a terminal.

    It leads a session, so that a terminal becomes its own. Signals that are ignored are so from its start, as under nohup.
    """

    def __init__(self, *arguments: str, folder: Path, output: str = "said", ignored: Sequence[int] = ()) -> None:
        self._process = _START.Process(target=_run_command, args=(arguments, folder, output, ignored))
        with _own_path():
            self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, minus the number of a signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code, when it has ended."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it did not end in {seconds} seconds"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def _run_command(arguments: Sequence[str], folder: Path, output: str, ignored: Sequence[int]) -> None:
    os.setsid()
    os.chdir(folder)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with open(output, "ab", buffering=0) as said:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(said.fileno(), stream.fileno())
        if said.isatty():
            os.open(output, os.O_RDWR)  # to read a terminal makes it that of the session
    # Not those of the process that this is a copy of, which know whether its output could seek.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["polyvit-fast", *arguments]
    __main__.main()


def _serve(rank: int, size: int, threads: int, pipe: Connection) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(threads)  # as many as here: their number is in the last digits
    good = True
    while good:  # after an error the process ends, as a real one does, so that the others do not wait for it
        port, function, arguments = pickle.loads(pipe.recv_bytes())
        environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in environment.items()})
        faulthandler.dump_traceback_later(SECONDS - 5)  # where it hangs
        try:
            answer = function(*arguments)
        except BaseException:
            good, answer = False, f"process {rank}: {traceback.format_exc()}"
        faulthandler.cancel_dump_traceback_later()
        if good and dist.is_initialized():  # the function caught an error that left its process group open
            dist.destroy_process_group()
        # Not by the pipe's own way with tensors, which needs this process to stay.
        pipe.send_bytes(pickle.dumps((good, answer)))


def _call_with_world(function: Callable[..., Any], *arguments: Any) -> Any:
    with process_group("cpu") as world:
        return function(world, *arguments)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
