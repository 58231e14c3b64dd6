"""The processes that train one model together, as torchrun starts them, and the collectives that they call on the host."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Environment variables in which torchrun gives a process its ranks."""

Value = TypeVar("Value")


class PeerLost(RuntimeError):  # noqa: N818 - an event more than an error
    """Another process of the run failed, ended or cannot be reached."""


@dataclass(frozen=True)
class World:
    """This process's rank among all `size` processes of the run. Its methods are collectives: every process must call them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine: the index of its GPU."""
    local_size: int = 1
    """Processes on this machine; they divide its cores."""

    def all_reduce_max(self, status: int) -> int:
        """The largest number of all processes. Never waits for a GPU. Raises PeerLost."""
        if self.size == 1:
            return status
        largest = torch.tensor(status, dtype=torch.int64)
        with translate_errors():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum of all processes' tensors, on its own device; on a GPU it is only queued. Raises PeerLost."""
        if self.size > 1:
            with translate_errors():
                dist.all_reduce(tensor)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes on rank 0, in the order of ranks; an empty list on the others. Raises PeerLost."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = None if self.rank else [None] * self.size
        with translate_errors():
            dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0. Raises PeerLost."""
        if self.size == 1:
            return value
        values = [value]
        with translate_errors():
            dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 runs the body before the others, which then find what it made.

        When the body fails on rank 0, the others raise PeerLost instead of running theirs.
        """
        if self.rank:
            if self.all_reduce_max(0):
                raise PeerLost("process 0 of the run failed; its own output says why")
            yield
            return
        try:
            yield
        except BaseException:
            with suppress(PeerLost):
                self.all_reduce_max(1)
            raise
        self.all_reduce_max(0)


ALONE = World()
"""A run of one process."""


@contextmanager
def translate_errors() -> Iterator[None]:
    """Inside, an error of torch.distributed becomes PeerLost."""
    try:
        yield
    except (PeerLost, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise PeerLost(f"another process of the run ended or cannot be reached ({reason})") from error


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Inside, the processes that torchrun started are connected, each with its own GPU when `device` = "cuda"; without torchrun, one alone.

    Raises ValueError when torchrun's variables are incomplete or there are fewer GPUs than processes, PeerLost when others do not connect.
    """
    world = _read_environment()
    gpu = _select_gpu(world) if world and device == "cuda" else None
    if world is None or world.size == 1:
        yield world or ALONE
        return
    with translate_errors():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu)
    yield world
    # Not after an error: the others may be gone, and NCCL waits for ever for captured graphs, which the error's traceback keeps alive.
    gc.collect()
    dist.destroy_process_group()


def _read_environment() -> World | None:
    """The ranks that torchrun set; None when it did not start this process."""
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if not found:
        return None
    if len(found) < len(TORCHRUN) or not all(value.isdecimal() for value in found.values()):
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"torchrun sets {', '.join(TORCHRUN)} to numbers, but here is only {given}; start with torchrun, or unset them")
    rank, size, local_rank = (int(found[name]) for name in TORCHRUN)
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _select_gpu(world: World) -> torch.device:
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise ValueError(
            f"device = cuda: PyTorch finds {count} GPUs here, none for process {world.local_rank} of this machine; start torchrun with "
            "no larger --nproc-per-node than there are GPUs, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
