"""Contenders take turns, so that what a machine does meanwhile (clocks, heat, neighbours) happens to all of them alike."""

import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import card
import torch
from card import HAS_GPU

Run = Callable[[], object]
Watch = Callable[["Lane", int], list[float]]

WARM_UP_CALLS = 3
FLUSHED_BYTES = 256 << 20
LONGEST_SPIN = 1 << 27  # cycles, 70 ms


@dataclass(kw_only=True)
class Lane:
    """A contender: `run` is one call, `seconds` what each timed call took, `error` why there are no more of them."""

    name: str
    run: Run
    seconds: list[float] = field(default_factory=list)
    error: str = ""
    spin: int = 1 << 19


def race(lanes: Sequence[Lane], watch: Watch, rounds: int, calls: int) -> None:
    """`calls` timed calls of every lane in each round, a round beginning with another lane. A lane that raises leaves the race."""
    for lane in lanes:
        _attempt(lane, lambda lane=lane: [lane.run() for _ in range(WARM_UP_CALLS)])
    for turn in range(rounds):
        first = turn % max(len(lanes), 1)
        for lane in (*lanes[first:], *lanes[:first]):
            if not lane.error:
                _attempt(lane, lambda lane=lane: lane.seconds.extend(watch(lane, calls)))


def _attempt(lane: Lane, do: Run) -> None:
    try:
        do()
    except Exception as error:
        lane.error = told(error)


def told(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


def time_on_cpu(lane: Lane, calls: int) -> list[float]:
    """The time of each call."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        lane.run()
        seconds.append(time.perf_counter() - start)
    return seconds


def time_steps_on_card(lane: Lane, calls: int) -> list[float]:
    """The time of each of so many calls in a row, by events between them. The card's waits for the host count, as in training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        lane.run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


time_steps = time_steps_on_card if HAS_GPU else time_on_cpu


class CardWatch:
    """Times each call by events on the card, with caches that hold none of its data, and without the host's share.

    Reading 256 MB before a call empties L2. Writing them would leave L2 full of lines that the call itself has to write back. All calls
    are queued while the card spins: were it to wait for the host between them, that would count. A spin that was too short is doubled,
    up to `LONGEST_SPIN`; what a contender that itself waits for the card then costs is its own.
    """

    def __init__(self) -> None:
        self._flushed = torch.ones(FLUSHED_BYTES // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")

    def __call__(self, lane: Lane, calls: int) -> list[float]:
        while True:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
            torch.cuda.synchronize()
            torch.cuda._sleep(lane.spin)
            for start, end in events:
                torch.sum(self._flushed, 0, out=self._sum)
                start.record()
                lane.run()
                end.record()
            began_early = events[0][0].query()
            torch.cuda.synchronize()
            if not began_early or lane.spin >= LONGEST_SPIN:
                return [start.elapsed_time(end) / 1e3 for start, end in events]
            lane.spin *= 2


def new_watch() -> Watch:
    """For the device that measures."""
    return CardWatch() if HAS_GPU else time_on_cpu


FIRST, COMPILED, ALL = "first", "compiled", "all"
PEER_COMPILERS = ("torch.compile", "torch.compile max-autotune", "reduce-overhead")
"""How the names of contenders end that torch compiles."""


def is_compiled(contender: str) -> bool:
    """Whether it has to be compiled, which takes longer than all that is measured of it."""
    return contender.endswith(PEER_COMPILERS)


def to_compile(contenders: Mapping[str, object]) -> set[str]:
    """Those that are there and have to be compiled."""
    return {name for name, way in contenders.items() if is_compiled(name) and not isinstance(way, str)}


def choose(contenders: Mapping[str, object], phase: str) -> set[str]:
    """Who takes part: first those that need no compiler, later the compiled ones against ours, or against eager where there is no ours."""
    compiled = to_compile(contenders)
    if phase == COMPILED:
        return compiled | {next(iter(contenders))} if compiled else set()
    return set(contenders) - (compiled if phase == FIRST else set())


@dataclass(frozen=True, kw_only=True)
class Group:
    """A race to come: its lanes, why other contenders are absent, how it is timed, and what is written beside a lane's times."""

    title: str
    lanes: list[Lane]
    absent: dict[str, str]
    watch: Watch
    info: Callable[[Lane], dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class Raced:
    """Each contender's seconds and what is known beside them, and why others are absent, or why there was no race."""

    title: str = ""
    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    infos: dict[str, dict[str, object]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


class Rivalry(Protocol):
    """What can be raced in one or more directions."""

    @property
    def contenders(self) -> Mapping[str, object]:
        """By name; one that is a string is not there, for that reason."""
        ...

    def enter(self, direction: str, names: set[str]) -> Group:
        """Those of `names` that can run and are right."""
        ...


class Track:
    """Races each group once, on the first question about one of its contenders; keeps the tensors of the last rivalry only."""

    def __init__(self, *, rounds: int, calls: int, phase: str) -> None:
        self._rounds, self._calls, self.phase = rounds, calls, phase
        self._key: object = None
        self._rivalry: Rivalry | None = None
        self._raced: dict[object, Raced] = {}

    def raced(self, direction: str, build: Callable[..., Rivalry], *arguments: object) -> Raced:
        """Now or before."""
        key = (direction, build, *arguments)
        if key not in self._raced:
            with warnings.catch_warnings():
                # Peers may warn of what they like.
                warnings.simplefilter("ignore")
                self._raced[key] = self._race(direction, build, *arguments)
        return self._raced[key]

    def _race(self, direction: str, build: Callable[..., Rivalry], *arguments: object) -> Raced:
        torch.manual_seed(0)  # whether a contender is right must not depend on what was raced before it
        if self._rivalry is None or (build, *arguments) != self._key:
            self._rivalry = None
            forget()
            self._key = (build, *arguments)
            try:
                self._rivalry = build(*arguments)
            except Exception as error:
                return Raced(failure=told(error))
        group = self._rivalry.enter(direction, choose(self._rivalry.contenders, self.phase))
        race(group.lanes, group.watch, self._rounds, self._calls)
        common = {"race": self.phase, "card": card.name(), "clocks": card.clocks() if HAS_GPU else {}, "versions": card.versions()}
        absent = group.absent | {lane.name: lane.error for lane in group.lanes if lane.error}
        finished = [lane for lane in group.lanes if lane.name not in absent]
        infos = {lane.name: {"contender": lane.name, **group.info(lane), **common, "absent": absent} for lane in finished}
        return Raced(title=group.title, seconds={lane.name: lane.seconds for lane in finished}, infos=infos, absent=absent)


def release() -> None:
    """Give memory back that no tensor needs."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def forget() -> None:
    """The same, and what was compiled and recorded: the compiler gives up on a function that it has seen at too many sizes."""
    release()
    if HAS_GPU:
        torch.compiler.reset()
        # It may lie in the memory of a recording that is gone; one that lives would still use it.
        torch._C._cuda_clearCublasWorkspaces()
