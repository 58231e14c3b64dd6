"""Contenders take turns, so that what a machine does meanwhile (clocks, heat, neighbours) happens to all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

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


def race(lanes: Sequence[Lane], watch: Watch, rounds: int, calls: int, has_time: Callable[[], bool] = lambda: True) -> None:
    """`calls` timed calls of every lane in each round, a round beginning with another lane. A lane that raises leaves the race.

    The first round is run in any case, another only while `has_time`.
    """
    for lane in lanes:
        _attempt(lane, lambda lane=lane: [lane.run() for _ in range(WARM_UP_CALLS)])
    for turn in range(rounds):
        if turn and not has_time():
            break
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
