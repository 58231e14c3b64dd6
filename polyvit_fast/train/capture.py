"""The step as CUDA graphs: recorded once, then replayed by one call of the host, so that the GPU never waits for Python.

There is a graph for the forward and backward of each task in each of the two input slots, and one for the update. All of them share one
memory pool, for no two run at the same time: a run of many tasks needs the memory of its largest one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product

import torch

from polyvit_fast.config import StepPlan
from polyvit_fast.train.feed import NUM_SLOTS, Inputs, Slots
from polyvit_fast.train.step import Step

WARM_UPS = 3
"""Runs before a recording, in which libraries choose algorithms, kernels are compiled and communicators are made."""

_broken: list[torch.cuda.CUDAGraph] = []
"""Recordings that failed: the allocator still asks them which stream was theirs."""


class CaptureError(RuntimeError):
    """A step that cannot be recorded; the message is the reason."""


class Captured:
    """A `Step` whose forward, backward and update are replayed from recordings. Raises CaptureError when one cannot be made.

    Everything that the step reads must keep its place in memory: the inputs are those of `slots`.
    """

    def __init__(self, step: Step, slots: Slots, plan: StepPlan) -> None:
        if step.config.compute.recompute and step.config.model.dropout:
            raise CaptureError("recompute = True with dropout reads the state of the random numbers, which a recording cannot")
        self.step = step
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[tuple[str, int, bool], torch.cuda.CUDAGraph] = {}
        # All warm-ups first, with ordinary memory, which the first recording gives back; the largest first, into whose memory others fit.
        kinds = sorted(recordings(plan, is_reduced=step.reducer is not None), key=self._num_tokens, reverse=True)
        with step.rehearsal():
            step.begin(plan[0], lr=0.0, step=0)
            for name, last in kinds:
                self._warm_up(partial(step.forward_backward, name, slots.inputs(name, 0), last))
            self._warm_up(step.refuse)
            for (name, last), slot in product(kinds, range(NUM_SLOTS)):
                run = partial(step.forward_backward, name, slots.inputs(name, slot), last)
                self.graphs[name, slot, last] = self._record(run, f"task {name}")
            self.update_graph = self._record(step.update, "the update")

    def begin(self, names: tuple[str, ...], lr: float, step: int) -> None:
        """As `Step.begin`."""
        self.step.begin(names, lr, step)

    def forward_backward(self, name: str, inputs: Inputs, last: bool = True) -> None:
        """As `Step.forward_backward`, on the inputs of a slot."""
        self.graphs[name, inputs.slot, last or self.step.reducer is None].replay()

    def update(self) -> None:
        """As `Step.update`."""
        self.update_graph.replay()

    def _num_tokens(self, kind: tuple[str, bool]) -> int:
        task = self.step.config.tasks[kind[0]]
        return task.batch // task.micro_batches * task.modality.num_tokens

    def _warm_up(self, run: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self, run: Callable[[], None], what: str) -> torch.cuda.CUDAGraph:
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            # The outer stream, for the inner context does not come back to it when the recording fails. Only this thread is recorded:
            # others go on decoding, pinning and copying.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                run()
        except Exception as error:
            _broken.append(graph)
            generator.graphsafe_set_state(before)  # else it would stay in the broken recording
            with suppress(RuntimeError):  # until torch 2.13 the allocator would stay in it too (pytorch pull request 180395)
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            torch.cuda.synchronize()
            raise CaptureError(f"{what}: {_cause(error)}") from error
        return graph


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: what follows it only says that the recording has failed before."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def recordings(plan: StepPlan, *, is_reduced: bool) -> list[tuple[str, bool]]:
    """(task, whether it is the last of its step) of all that the plan needs; where nothing is reduced, all count as the last."""
    return sorted({(name, not is_reduced or place == len(names)) for names in set(plan) for place, name in enumerate(names, 1)})


def capture(step: Step, slots: Slots, plan: StepPlan, report: Callable[[str], None]) -> Step | Captured:
    """The step captured, or as it is, after a report, when it cannot be."""
    captured, reason = None, "another process of the run cannot"
    try:
        captured = Captured(step, slots, plan)
    except CaptureError as error:
        reason = str(error)
    if step.world.agree(int(captured is None)):  # all processes or none: recorded sums meet no others
        report(f"the step cannot be recorded as a CUDA graph ({reason}); it runs operation by operation, which may be slower")
        return step
    assert captured
    return captured
