"""The all-reduce of gradients, in buckets that are sent while the backward pass still computes the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from polyvit_fast.train.distributed.process_group import translate_errors
from polyvit_fast.train.optim import FlatParameters

BUCKET_BYTES = 25 << 20
"""Large enough for the full bandwidth, small enough for the first to leave early; the size of DistributedDataParallel's."""

END = "end of the backward pass"
"""What a bucket waits for besides its parameters: the last one, for the loss may add to found_inf up to then; when clipping, the first."""


@dataclass(frozen=True)
class Bucket:
    """A range of the flat gradient that is reduced at once."""

    names: frozenset[str]
    grads: Tensor
    wire: Tensor
    """What is sent: the gradients themselves, or their copy in bf16."""


class Reducer:
    """Sums the flat gradient over all processes, in fp32 or bf16; the same buckets in the same order on every process.

    With `own_clip_norm`, this process's gradient is clipped to that norm before, so nothing is sent until all of it is computed.
    Nothing in it makes the host wait for a GPU, so that a CUDA graph can capture it.
    """

    def __init__(self, parameters: FlatParameters, precision: Literal["fp32", "bf16"], own_clip_norm: float = 0.0) -> None:
        self.parameters, self.own_clip_norm = parameters, own_clip_norm
        self.own_norm = torch.zeros_like(parameters.found_inf)
        """Of this process's gradient in the last step, before it was clipped."""
        self.buckets = list(_build_buckets(parameters, precision))
        self.pending: list[set[str]] | None = None
        self.works: list[dist.Work] = []
        for number, bucket in enumerate(self.buckets):
            for name in bucket.names:
                parameters.leaves[name].register_post_accumulate_grad_hook(partial(self._mark_ready, number, name))

    @contextmanager
    def overlap(self, used: Iterable[str]) -> Iterator[None]:
        """Inside, a step's last backward pass runs, which gives the parameters named in `used` their gradient; then all are summed.

        Earlier backward passes of the step run outside. All processes enter it, with the same names. Raises PeerLost.
        """
        used = frozenset(used)
        self.works, self.pending = [], [set(bucket.names & used) for bucket in self.buckets]
        self.pending[0 if self.own_clip_norm else -1].add(END)
        try:
            self._launch_ready()
            yield
            self._clip()
            for names in self.pending:
                names.clear()
            self._launch_ready()
            for bucket, work in zip(self.buckets, self.works, strict=True):
                _finish(bucket, work)
        finally:
            self.works, self.pending = [], None

    def _clip(self) -> None:
        if self.own_clip_norm:
            norm = self.own_norm.copy_(self.parameters.compute_grad_norm())
            scale = (self.own_clip_norm / norm).clamp(max=1.0)
            # NaN, for an infinite norm would scale the gradient to 0, and nobody would notice that it was not finite.
            self.parameters.grads.mul_(torch.where(norm.isfinite(), scale, torch.nan))

    def _mark_ready(self, number: int, name: str, parameter: Tensor) -> None:
        """A parameter has its whole gradient."""
        if self.pending is None:
            return
        if number < len(self.works):
            raise RuntimeError(f"{name} has a gradient that its bucket left without: it is missing in `used`, or came twice")
        self.pending[number].discard(name)
        self._launch_ready()

    def _launch_ready(self) -> None:
        """Send the next buckets that wait for nothing, up to the first that does."""
        while self.pending and len(self.works) < len(self.buckets) and not self.pending[len(self.works)]:
            self.works.append(_launch(self.buckets[len(self.works)]))


def _build_buckets(parameters: FlatParameters, precision: Literal["fp32", "bf16"]) -> Iterator[Bucket]:
    """In the order in which a backward pass completes them: weight matrices from the last to the first, then all the rest at once."""

    def build(names: set[str], grads: Tensor) -> Bucket:
        return Bucket(frozenset(names), grads, grads if precision == "fp32" else torch.empty_like(grads, dtype=torch.bfloat16))

    names: set[str] = set()
    stop = parameters.decayed
    matrices = [view for view in parameters.views if view.start < parameters.decayed]
    for view in reversed(matrices):
        names.add(view.name)
        grads = parameters.grads[view.start : stop]
        if grads.nbytes >= BUCKET_BYTES or not view.start:
            yield build(names, grads)
            names, stop = set(), view.start
    yield build({view.name for view in parameters.views[len(matrices) :]}, parameters.grads[parameters.decayed :])


def _launch(bucket: Bucket) -> dist.Work:
    if bucket.wire is not bucket.grads:
        bucket.wire.copy_(bucket.grads)
    with translate_errors():
        work = dist.all_reduce(bucket.wire, async_op=True)
    assert work is not None
    return work


def _finish(bucket: Bucket, work: dist.Work) -> None:
    with translate_errors():
        work.wait()  # on a GPU only what is queued after it waits
    if bucket.wire is not bucket.grads:
        bucket.grads.copy_(bucket.wire)
