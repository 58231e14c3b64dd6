"""Ours and its peers on the same work: each is checked first, then all are timed in turn, and pytest-benchmark gets the times.

A `Group` holds the candidates for the same work and is a fixture of their tests. Each candidate's test builds it, asserts that it is
right and opens its entry in pytest-benchmark. After the group's last test the candidates take turns, so that what the machine does
meanwhile (clocks, heat, neighbours) happens to all of them alike.
"""

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import machine
import pytest
import torch
from machine import DEVICE, HAS_GPU
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import polyvit_kernels.flops as _registered  # noqa: F401 - importing it registers the formulas of our operations
from polyvit_fast import strict_json

Run = Callable[[], object]
Timer = Callable[[Run, int], list[float]]
"""Gives the seconds of each of so many calls."""
Inputs = dict[str, Any]
Operation = Callable[..., Tensor | tuple[Tensor, ...] | None]

OURS, EAGER = "ours", "eager"
FORWARD, BACKWARD, STEP = "forward", "backward", "step"
WARM_UP_CALLS = 3
FLUSHED_BYTES = 256 << 20
FEWEST_FLUSHES, MOST_FLUSHES = 32, 512
"""Before the first timed call, of 0.1 ms each on an H100."""
TOLERANCE = 0.05
"""How far a peer's results may be from eager's, ‖a − b‖ / ‖b‖: bf16, and tanh for erf, stay within 0.01; another function does not."""


@dataclass(kw_only=True)
class Runner:
    """A candidate that is right: `run` is one call. `flops` and `num_bytes` are of a call, and `describe` adds to what is reported."""

    run: Run
    flops: float = 0.0
    num_bytes: float = 0.0
    describe: Callable[[float], Mapping[str, Any]] = lambda seconds: {}
    """Asked after the measurement, with the median."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement of one candidate: the seconds of every call, each of which handles `amount` of `unit`."""

    group: str
    candidate: str
    amount: float
    unit: str
    seconds: list[float]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit_seconds(self) -> float:
        """The median of the time for one unit."""
        return median(self.seconds) / self.amount


@dataclass(kw_only=True)
class _Entry:
    name: str
    runner: Runner
    benchmark: Any
    error: Exception | None = None


@dataclass(kw_only=True)
class Group:
    """Candidates that do the same work, `amount` of `unit` a call; the one of the first name is ours.

    A candidate is a function that builds its `Runner` and raises where its results are wrong, or a string: why there is none. `turns` are
    (rounds, calls in a round) where the command line's would take too long; then nothing warms up either.
    """

    title: str
    amount: float
    unit: str
    candidates: Mapping[str, Callable[[], Runner] | str]
    timer: Timer
    turns: tuple[int, int] | None = None
    entries: list[_Entry] = field(default_factory=list)

    def enter(self, name: str, benchmark: Any) -> None:
        """Build a candidate and open its entry in pytest-benchmark. A peer that is absent or wrong is skipped, ours fails."""
        build = self.candidates[name]
        if isinstance(build, str):
            pytest.skip(build)
        try:
            with _any_warning():
                runner = build()
                benchmark.group = self.title
                benchmark.pedantic(runner.run, warmup_rounds=0 if self.turns else WARM_UP_CALLS)
        except Exception as error:
            if name.startswith(OURS):
                raise
            pytest.skip(format_error(error))
        if benchmark.stats:  # not with --benchmark-disable
            self.entries.append(_Entry(name=name, runner=runner, benchmark=benchmark))

    def take_turns(self, rounds: int, calls: int) -> list[Row]:
        """Time all who entered, each round beginning with another, and give their times to pytest-benchmark.

        One that raises takes no further turns.
        """
        rounds, calls = self.turns or (rounds, calls)
        for turn in range(rounds):
            first = turn % max(len(self.entries), 1)
            for entry in (*self.entries[first:], *self.entries[:first]):
                if not entry.error:
                    self._time(entry, calls, is_first=not turn)
        machine_info = {"device": machine.find_name(), "clocks": machine.read_clocks(), "versions": machine.find_versions()}
        return [row for entry in self.entries if (row := self._close(entry, machine_info))]

    @property
    def error(self) -> Exception | None:
        """What ended ours, if anything did."""
        return next((entry.error for entry in self.entries if entry.error and entry.name.startswith(OURS)), None)

    def _close(self, entry: _Entry, machine_info: dict[str, Any]) -> Row | None:
        """Complete an entry of pytest-benchmark; the same as a row, unless it ended with an error."""
        extra_info, seconds = entry.benchmark.extra_info, list(entry.benchmark.stats.stats.data)
        extra_info.update(candidate=entry.name, amount=self.amount, unit=self.unit, **machine_info)
        if entry.error:
            extra_info["error"] = format_error(entry.error)
            return None
        extra_info.update(describe(entry.runner, median(seconds)))
        return Row(group=self.title, candidate=entry.name, amount=self.amount, unit=self.unit, seconds=seconds, info=dict(extra_info))

    def _time(self, entry: _Entry, calls: int, *, is_first: bool) -> None:
        try:
            with _any_warning():
                seconds = self.timer(entry.runner.run, calls)
        except Exception as error:
            entry.error = error
            return
        stats = entry.benchmark.stats.stats
        if is_first:
            stats.data.clear()  # the call that opened the entry was a warm-up too
        for duration in seconds:
            stats.update(duration)


@contextmanager
def _any_warning() -> Iterator[None]:
    """Inside, nobody hears what peers warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def describe(runner: Runner, seconds: float) -> dict[str, Any]:
    """What is reported with a median."""
    floor = machine.floor_seconds(runner.num_bytes, runner.flops)
    return {
        "tflops": runner.flops / seconds / 1e12,
        "gb_per_second": runner.num_bytes / seconds / 1e9,
        "mfu": machine.compute_mfu(runner.flops, seconds),
        "of_floor": floor and floor / seconds,
        **runner.describe(seconds),
    }


def format_error(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


# Timers


def time_on_host(run: Run, calls: int) -> list[float]:
    """By the clock of the host."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def time_in_a_row(run: Run, calls: int) -> list[float]:
    """By events between calls that follow one another. The GPU's waits for the host count, as in training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def time_cold(run: Run, calls: int) -> list[float]:
    """By events around each call, with caches that hold none of its data, and without the host's time.

    Reading 256 MB before a call empties the L2 cache; writing them would leave lines in it that the call has to write back. All calls are
    queued while the GPU still reads, as it would else wait for the host between them. Where it was done too early, it reads twice as often.
    """
    flushed, total = torch.ones(FLUSHED_BYTES // 4, device=DEVICE), torch.empty((), device=DEVICE)
    flushes = FEWEST_FLUSHES
    while True:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize()
        for _ in range(flushes):
            torch.sum(flushed, 0, out=total)
        for start, end in events:
            torch.sum(flushed, 0, out=total)
            start.record()
            run()
            end.record()
        is_late = events[0][0].query()
        torch.cuda.synchronize()
        if not is_late or flushes >= MOST_FLUSHES:  # a call that waits for the GPU itself is always late
            return [start.elapsed_time(end) / 1e3 for start, end in events]
        flushes *= 2


TIME_KERNELS: Timer = time_cold if HAS_GPU else time_on_host
TIME_STEPS: Timer = time_in_a_row if HAS_GPU else time_on_host


# Operations on given inputs


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to compute an operation, from the problem's inputs by keyword or from what `take` makes of them.

    One that is not `comparable` does less than ours or gives something else: it is shown, and not held against eager.
    """

    operation: Operation
    take: Callable[[Inputs], Inputs] = dict
    directions: tuple[str, ...] = (FORWARD, BACKWARD, STEP)
    comparable: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An operation on `inputs`, whose floating-point tensors it is differentiated by, and the ways to compute it.

    `check` holds ours to the truth. `num_bytes`, by direction, are the fewest that any way has to move: each tensor once.
    """

    title: str
    inputs: Inputs
    candidates: Mapping[str, Candidate | str]
    num_bytes: Mapping[str, float]
    amount: float
    unit: str
    check: Callable[[], None] = lambda: None

    def group(self, direction: str) -> Group:
        """What is timed of it: the forward pass, the backward pass, or a step that changes its inputs."""
        builders = {name: self._builder(name, candidate, direction) for name, candidate in self.candidates.items()}
        title = f"{self.title}, {direction}"
        return Group(title=title, amount=self.amount, unit=self.unit, candidates=builders, timer=TIME_KERNELS)

    def _builder(self, name: str, candidate: Candidate | str, direction: str) -> Callable[[], Runner] | str:
        if isinstance(candidate, str):
            return candidate
        if direction not in candidate.directions:
            return f"has no {direction}"
        return lambda: self._build(name, candidate, direction)

    def _build(self, name: str, candidate: Candidate, direction: str) -> Runner:
        if name == OURS:
            self.check()
        run = bind(candidate, self.inputs, direction)
        if direction != STEP and candidate.comparable:
            eager = self.candidates[EAGER]
            assert isinstance(eager, Candidate)
            assert_near(run(), bind(eager, self.inputs, direction)())
        first = next(iter(self.candidates.values()))
        assert isinstance(first, Candidate)
        return Runner(run=run, flops=count_flops(bind(first, self.inputs, direction)), num_bytes=self.num_bytes[direction])


def group_params(build: Callable[..., Problem], shapes: Sequence[Any], directions: Sequence[str] = (FORWARD, BACKWARD)) -> list[Any]:
    """Parameters of the `group` fixture: the problem of every shape, each way."""

    def build_group(shape: Any, direction: str) -> Group:
        torch.manual_seed(0)
        return build(shape).group(direction)

    name, cases = build.__name__.removesuffix("_of"), product(shapes, directions)
    return [pytest.param(partial(build_group, shape, direction), id=f"{name}-{shape}-{direction}") for shape, direction in cases]


def candidate_params(groups: Mapping[str, tuple[Callable[[], Group], Sequence[str]]]) -> list[Any]:
    """Parameters of (`group` fixture, candidate) where groups, by title, have candidates of their own."""
    return [pytest.param(build, name, id=f"{title}-{name}") for title, (build, names) in groups.items() for name in names]


def bind(candidate: Candidate, inputs: Inputs, direction: str) -> Run:
    """One call: the forward as in training, or the gradients of one graph that stays; upstream gradients are the same for everybody."""
    tensors = candidate.take(inputs)
    if direction == STEP:
        return lambda: candidate.operation(**tensors)
    leaves = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    if direction == FORWARD:
        return lambda: candidate.operation(**leaves)
    outputs = _as_tuple(candidate.operation(**leaves))
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype) for out in outputs]
    return lambda: torch.autograd.grad(outputs, differentiated, upstream, retain_graph=True)


def count_flops(run: Run) -> float:
    """Operations of a call, by torch's counter with the formulas of `polyvit_kernels.flops`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def assert_near(found: object, expected: object) -> None:
    """ValueError unless tensors are of the same shapes and within `TOLERANCE`."""
    found, expected = _as_tuple(found), _as_tuple(expected)
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the results have the shapes {shapes[0]}, eager's {shapes[1]}")
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        distance = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()
        if not distance <= TOLERANCE:  # nor is a NaN near
            raise ValueError(f"result {index} is {distance:.2g} from eager's, relative to its norm")


def _as_tuple(results: object) -> tuple[Tensor, ...]:
    if isinstance(results, Tensor):
        return (results,)
    assert isinstance(results, tuple)
    return results


def release_memory() -> None:
    """Free what no tensor needs, and what torch's compiler keeps: it gives up on a function that it has seen at too many sizes."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.compiler.reset()
        torch.cuda.empty_cache()
        # Private, and without a public form: cuBLAS's workspace may lie in the memory of a captured graph that is gone.
        torch._C._cuda_clearCublasWorkspaces()


# Rows in a file and in a table

_NOTES = {
    "tflops": "{:.3g} TFLOP/s",
    "gb_per_second": "{:.3g} GB/s",
    "of_floor": "{:.0%} of the floor",
    "mfu": "MFU {:.1%}",
    "peak_gib": "{:.1f} GiB",
    "host_ratio": "host {:.1%}",
    "note": "{}",
}
"""How a table shows what is known of a candidate, where it is known."""


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """A line more in a file for each row; a process that is killed afterwards has written them."""
    with path.open("a") as file:
        file.writelines(f"{strict_json.dumps(asdict(row))}\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """What was appended; nothing where nothing was, and without a last line that was cut."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def format_rows(rows: Sequence[Row]) -> str:
    """A block of lines for each group: ours, then the others from fast to slow, each with its rate and what is known of it."""
    lines = []
    for title in dict.fromkeys(row.group for row in rows):
        members = sorted((row for row in rows if row.group == title), key=lambda row: (row.candidate != OURS, row.unit_seconds))
        lines += [title, *(_format_row(row, members[0]) for row in members)]
    return "\n".join(lines)


def _format_row(row: Row, first: Row) -> str:
    seconds = median(row.seconds)
    time = f"{seconds * 1e6:.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"
    notes = [text.format(row.info[key]) for key, text in _NOTES.items() if row.info.get(key)]
    if first.candidate == OURS and row is not first:
        notes.insert(0, f"{OURS} / it = {row.unit_seconds / first.unit_seconds:.2f}")
    return f"  {row.candidate:28} {time:>10} {1 / row.unit_seconds:11.4g} {row.unit}/s  {', '.join(notes)}".rstrip()
