"""Groups of contenders measured once, on the first question about one of them."""

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import card
import torch
from problem import OURS, Problem, enter
from race import Lane, new_watch, race, told

from polyvit_kernels import tiles

ProblemOf = Callable[[Sequence[int]], Problem]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The lanes of one problem (without its tensors) and direction, why others are absent, and the clocks right after the race."""

    problem: Problem
    direction: str
    dtype: str
    lanes: dict[str, Lane]
    absent: dict[str, str]
    clocks: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self.problem.title.replace("|", self.direction)

    def info(self, contender: str) -> dict[str, object]:
        """What is written beside a contender's times."""
        problem, seconds = self.problem, median(self.lanes[contender].seconds)
        cost = problem.costs[self.direction]
        floor, target = card.floor_seconds(cost, card.name()), problem.targets.get(self.direction)
        entry = problem.contenders[contender]
        return {
            "contender": contender,
            "amount": problem.amount,
            "unit": problem.unit,
            "dtype": self.dtype,
            "alike": getattr(entry, "alike", True),
            "tflops": cost.flops / seconds / 1e12,
            "gb_per_second": cost.num_bytes / seconds / 1e9,
            "floor_us": floor and floor * 1e6,
            "share_of_floor": floor and floor / seconds,
            "target_us": target and target.us,
            "target_ratio": target and target.ratio,
            "absent": self.absent,
            "rows": self._rows() if contender == OURS else [],
            "card": card.name(),
            "clocks": self.clocks,
            "versions": card.versions(),
            "share_of_step": problem.step_seconds and seconds / problem.step_seconds,
        }

    def _rows(self) -> list[str]:
        if not card.HAS_GPU:
            return ["on a CPU, torch's operators"]
        return [_row(*question) for question in self.problem.rows.get(self.direction, ())]


def _row(op: str, tokens: int, features: int) -> str:
    dtype = torch.float32 if op.endswith("_update") else card.DTYPE
    tile = tiles.pick(op, tiles.architecture(card.DEVICE), dtype, tokens=tokens, features=features)
    blocks = " ".join(f"{name}={value}" for name, value in tile.blocks.items())
    return f"{op}: {tile.backend} {blocks} warps={tile.num_warps} stages={tile.num_stages}, {tile.source}"


class Track:
    """Remembers the groups that were measured; keeps the tensors of the last problem only."""

    def __init__(self, *, rounds: int, calls: int, seconds: float) -> None:
        self._rounds, self._calls = rounds, calls
        self._end = time.monotonic() + seconds
        self._watch = new_watch()
        self._key: Hashable = None
        self._problem: Problem | None = None
        self._failure = ""
        self._groups: dict[Hashable, Group | None] = {}

    def group(self, problem_of: ProblemOf, shape: Sequence[int], direction: str) -> Group | None:
        """Measured now or before; None when the time was over before its turn."""
        key = (problem_of.__module__, problem_of.__name__, tuple(shape))
        if (*key, direction) not in self._groups:
            self._groups[*key, direction] = self._measure(self._build(key, problem_of, shape), direction) if self._has_time() else None
        return self._groups[*key, direction]

    def _has_time(self) -> bool:
        return time.monotonic() < self._end

    def _build(self, key: Hashable, problem_of: ProblemOf, shape: Sequence[int]) -> Problem:
        if self._problem is None or key != self._key:
            self._problem = None
            if card.HAS_GPU:
                # Each problem compiles for its own sizes, and the compiler gives up on a function that it has seen at too many.
                torch.compiler.reset()
                torch.cuda.empty_cache()
            self._key, self._problem = key, problem_of(shape)
            self._failure = _failure(self._problem)
        return self._problem

    def _measure(self, problem: Problem, direction: str) -> Group:
        with warnings.catch_warnings():
            # Peers may warn of what they like.
            warnings.simplefilter("ignore")
            lanes, absent = enter(problem, direction)
            race(lanes, self._watch, self._rounds, self._calls)
        clocks = card.clocks() if card.HAS_GPU else {}
        absent |= {lane.name: lane.error for lane in lanes if lane.error} | ({OURS: self._failure} if self._failure else {})
        finished = {lane.name: lane for lane in lanes if lane.name not in absent}
        for lane in lanes:
            lane.run = _nothing
        dtype = str(next(tensor.dtype for tensor in problem.inputs.values() if tensor.is_floating_point()))
        bare = replace(problem, inputs={}, check=None)
        return Group(problem=bare, direction=direction, dtype=dtype, lanes=finished, absent=absent, clocks=clocks)


def _failure(problem: Problem) -> str:
    """Why ours is wrong; nothing when it is right."""
    try:
        if problem.check:
            problem.check()
    except Exception as error:
        return told(error)
    return ""


def _nothing() -> None:
    """Instead of a call that has been timed, whose tensors are no longer needed."""
