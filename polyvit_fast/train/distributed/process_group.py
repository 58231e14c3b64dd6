"""The processes that train one model together, as torchrun starts them: who is who, and what they tell each other on the host."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""How torchrun tells a process its place."""

Value = TypeVar("Value")


class PeerLost(RuntimeError):  # noqa: N818 - an event more than an error
    """Another process of the run failed, ended or cannot be reached."""


@dataclass(frozen=True)
class World:
    """This process's place among all `size` of the run. What has to be called by all of them together says so."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine: the number of its GPU."""
    local_size: int = 1
    """Processes on this machine, which share its cores."""

    def agree(self, status: int) -> int:
        """The largest of all processes' numbers; all call it. Never waits for a GPU. Raises PeerLost."""
        if self.size == 1:
            return status
        largest = torch.tensor(status, dtype=torch.int64)
        with reachable():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value on the first one, in the order of ranks; an empty list elsewhere; all call it. Raises PeerLost."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = None if self.rank else [None] * self.size
        with reachable():
            dist.gather_object(value, values)
        return values or []

    def from_first(self, value: Value) -> Value:
        """The first process's value; all call it. Raises PeerLost."""
        if self.size == 1:
            return value
        values = [value]
        with reachable():
            dist.broadcast_object_list(values)
        return values[0]

    def sum_(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum of all processes' tensors, on its own device; all call it. On a GPU it is only queued."""
        if self.size > 1:
            with reachable():
                dist.all_reduce(tensor)

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process runs the body before the others, which then find what it made; all enter it.

        When it fails in the body, the others raise PeerLost instead of running theirs.
        """
        if self.rank:
            if self.agree(0):
                raise PeerLost("the first process of the run failed; it tells why")
            yield
            return
        try:
            yield
        except BaseException:
            with suppress(PeerLost):
                self.agree(1)
            raise
        self.agree(0)


ALONE = World()
"""A run of one process."""


@contextmanager
def reachable() -> Iterator[None]:
    """Inside, an error of the transport between processes becomes PeerLost."""
    try:
        yield
    except (PeerLost, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise PeerLost(f"another process of the run ended or cannot be reached ({reason})") from error


@contextmanager
def joined(device: Literal["cpu", "cuda"]) -> Iterator[World]:
    """Inside, this process is one of those that torchrun started, on its own GPU when `device` = "cuda"; alone without torchrun.

    Raises ValueError when it is not torchrun that started it or there are fewer GPUs than processes, PeerLost when others do not come.
    """
    world = _place()
    gpu = _own_gpu(world) if world and device == "cuda" else None
    if world is None or world.size == 1:
        yield world or ALONE
        return
    with reachable():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu)
    yield world
    # Not after an error: the others may be gone, and NCCL waits for ever for captured graphs, which the error's traceback keeps alive.
    gc.collect()
    dist.destroy_process_group()


def _place() -> World | None:
    """What torchrun says; None when it did not start this process."""
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if not found:
        return None
    if len(found) < len(TORCHRUN) or not all(value.isdecimal() for value in found.values()):
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"torchrun sets {', '.join(TORCHRUN)} to numbers, but here is only {told}; start with torchrun, or unset them")
    rank, size, local_rank = (int(found[name]) for name in TORCHRUN)
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _own_gpu(world: World) -> torch.device:
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise ValueError(
            f"device = cuda: PyTorch finds {count} GPUs here, none for process {world.local_rank} of this machine; start torchrun with "
            "no larger --nproc-per-node than there are GPUs, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
