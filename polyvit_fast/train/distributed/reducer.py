"""The sum of all processes' gradients, in buckets that travel while the backward pass still computes the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from polyvit_fast.train.distributed.process_group import reachable
from polyvit_fast.train.optim import FlatParameters

BUCKET_BYTES = 25 << 20
"""Large enough for the full bandwidth, small enough for the first to leave early."""

LEAVING = "leaving"
"""What a bucket waits for beside its parameters: the last one for the loss to be judged, up to the end; the first to be clipped."""


@dataclass(frozen=True)
class Bucket:
    """A stretch of the flat gradient that travels at once."""

    names: frozenset[str]
    grads: Tensor
    wire: Tensor
    """What travels: the gradients themselves, or their copy in bf16."""


class Reducer:
    """Sums the flat gradient over all processes, in fp32 or bf16; the same buckets in the same order on every process.

    With `own_clip_norm`, this process's gradient is clipped to that norm before; then it leaves when all of it is there, not earlier.
    Nothing in it waits on the host for a GPU, so that a CUDA graph can record it.
    """

    def __init__(self, parameters: FlatParameters, precision: Literal["fp32", "bf16"], own_clip_norm: float = 0.0) -> None:
        self.parameters, self.own_clip_norm = parameters, own_clip_norm
        self.buckets = list(_buckets(parameters, precision))
        self.waiting: list[set[str]] | None = None
        self.works: list[dist.Work] = []
        for number, bucket in enumerate(self.buckets):
            for name in bucket.names:
                parameters.leaves[name].register_post_accumulate_grad_hook(partial(self._arrived, number, name))

    @contextmanager
    def overlapped(self, used: Iterable[str]) -> Iterator[None]:
        """Inside, a step's last backward pass runs, which gives the parameters named in `used` their gradient; then all are summed.

        Earlier backward passes of the step run outside. All processes enter it, with the same names. Raises PeerLost.
        """
        used = frozenset(used)
        self.works, self.waiting = [], [set(bucket.names & used) for bucket in self.buckets]
        self.waiting[0 if self.own_clip_norm else -1].add(LEAVING)
        try:
            self._launch_complete()
            yield
            self._clip()
            for names in self.waiting:
                names.clear()
            self._launch_complete()
            for bucket, work in zip(self.buckets, self.works, strict=True):
                _finish(bucket, work)
        finally:
            self.works, self.waiting = [], None

    def _clip(self) -> None:
        if self.own_clip_norm:
            norm = self.parameters.norm()
            scale = (self.own_clip_norm / norm).clamp(max=1.0)
            self.parameters.grads.mul_(torch.where(norm.isfinite(), scale, torch.nan))  # as clipped to 0, it would be lost without a word

    def _arrived(self, number: int, name: str, parameter: Tensor) -> None:
        """A parameter has its whole gradient."""
        if self.waiting is None:
            return
        if number < len(self.works):
            raise RuntimeError(f"{name} has a gradient that its bucket left without: it is missing in `used`, or came twice")
        self.waiting[number].discard(name)
        self._launch_complete()

    def _launch_complete(self) -> None:
        """Send the next buckets that wait for nothing, up to the first that does."""
        while self.waiting and len(self.works) < len(self.buckets) and not self.waiting[len(self.works)]:
            self.works.append(_launch(self.buckets[len(self.works)]))


def _buckets(parameters: FlatParameters, precision: Literal["fp32", "bf16"]) -> Iterator[Bucket]:
    """In the order in which a backward pass completes them: weight matrices from the last to the first, then all the rest at once."""

    def bucket(names: set[str], grads: Tensor) -> Bucket:
        return Bucket(frozenset(names), grads, grads if precision == "fp32" else torch.empty_like(grads, dtype=torch.bfloat16))

    names: set[str] = set()
    stop = parameters.decayed
    matrices = [slot for slot in parameters.slots if slot.start < parameters.decayed]
    for slot in reversed(matrices):
        names.add(slot.name)
        grads = parameters.grads[slot.start : stop]
        if grads.nbytes >= BUCKET_BYTES or not slot.start:
            yield bucket(names, grads)
            names, stop = set(), slot.start
    yield bucket({slot.name for slot in parameters.slots[len(matrices) :]}, parameters.grads[parameters.decayed :])


def _launch(bucket: Bucket) -> dist.Work:
    if bucket.wire is not bucket.grads:
        bucket.wire.copy_(bucket.grads)
    with reachable():
        work = dist.all_reduce(bucket.wire, async_op=True)
    assert work is not None
    return work


def _finish(bucket: Bucket, work: dist.Work) -> None:
    with reachable():
        work.wait()  # on a GPU only what is queued after it waits
    if bucket.wire is not bucket.grads:
        bucket.grads.copy_(bucket.wire)
