"""The step as CUDA graphs: captured once, then replayed by one call of the host, so that the GPU never waits for Python.

There is a graph for the forward and backward of each task on each of the two input buffers, and one for the update. All of them use one
memory pool, for no two run at the same time: a run of many tasks needs the memory of its largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product

import torch

from polyvit_fast.config import StepPlan
from polyvit_fast.train.feed import NUM_BUFFERS, InputBuffers, Inputs
from polyvit_fast.train.step import Step

WARMUP_RUNS = 3
"""Runs before a capture, in which libraries choose algorithms, kernels are compiled and communicators are made."""

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed, kept alive: the allocator still asks them which stream was theirs."""


class CaptureError(RuntimeError):
    """A step that cannot be captured; the message is the reason."""


class CapturedStep:
    """A `Step` whose forward, backward and update are replayed from CUDA graphs. Raises CaptureError when one cannot be captured.

    Everything that the step reads must stay at its address: the inputs are those of `buffers`.
    """

    def __init__(self, step: Step, buffers: InputBuffers, plan: StepPlan) -> None:
        if step.config.compute.recompute and step.config.model.dropout:
            raise CaptureError(
                "recompute = True with dropout reads the state of the random numbers, which is not possible during a capture"
            )
        self.step = step
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[tuple[str, int, bool], torch.cuda.CUDAGraph] = {}
        # All warm-ups first, with ordinary memory, which the first capture gives back; the largest first, into whose memory others fit.
        kinds = sorted(list_graphs(plan, is_reduced=step.reducer is not None), key=self._count_tokens, reverse=True)
        with step.rehearse():
            step.begin(plan[0], lr=0.0, step=0)
            for name, last in kinds:
                self._warm_up(partial(step.forward_backward, name, buffers.view(name, 0), last))
            self._warm_up(step.skip_update)
            for (name, last), index in product(kinds, range(NUM_BUFFERS)):
                run = partial(step.forward_backward, name, buffers.view(name, index), last)
                self.graphs[name, index, last] = self._capture(run, f"task {name}")
            self.update_graph = self._capture(step.update, "the update")

    def begin(self, names: tuple[str, ...], lr: float, step: int, weights: Sequence[float] = ()) -> None:
        """As `Step.begin`."""
        self.step.begin(names, lr, step, weights)

    def forward_backward(self, name: str, inputs: Inputs, last: bool = True) -> None:
        """As `Step.forward_backward`, on the inputs of a buffer."""
        self.graphs[name, inputs.index, last or self.step.reducer is None].replay()

    def update(self) -> None:
        """As `Step.update`."""
        self.update_graph.replay()

    def _count_tokens(self, kind: tuple[str, bool]) -> int:
        task = self.step.config.tasks[kind[0]]
        return task.batch // task.micro_batches * task.modality.num_tokens

    def _warm_up(self, run: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self, run: Callable[[], None], what: str) -> torch.cuda.CUDAGraph:
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            # The outer stream, for the inner context does not come back to it when the capture fails. Only this thread is captured:
            # others go on decoding, pinning and copying.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                run()
        except Exception as error:
            _failed.append(graph)
            generator.graphsafe_set_state(before)  # else the generator would go on as if it were captured
            # Private, and unnecessary from torch 2.13 on (pytorch pull request 180395): before, the allocator would stay in the pool too.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            torch.cuda.synchronize()
            raise CaptureError(f"{what}: {_find_cause(error)}") from error
        return graph


def _find_cause(error: BaseException) -> str:
    """The first line of what went wrong first: the errors that follow only say that the capture has failed before."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def list_graphs(plan: StepPlan, *, is_reduced: bool) -> list[tuple[str, bool]]:
    """(task, whether it is the last of its step) of all graphs that the plan needs; where nothing is reduced, all count as the last."""
    return sorted({(name, not is_reduced or number == len(names)) for names in set(plan) for number, name in enumerate(names, 1)})


def capture(step: Step, buffers: InputBuffers, plan: StepPlan, report: Callable[[str], None]) -> Step | CapturedStep:
    """The step captured, or as it is, after a report, when it cannot be."""
    captured, reason = None, "another process of the run cannot"
    try:
        captured = CapturedStep(step, buffers, plan)
    except CaptureError as error:
        reason = str(error)
    if step.world.all_reduce_max(int(captured is None)):  # all processes or none: a captured all-reduce meets no other
        report(f"the step cannot be captured as a CUDA graph ({reason}); it runs operation by operation, which may be slower")
        return step
    assert captured
    return captured
