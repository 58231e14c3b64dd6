"""How kernels are reported to pytest-benchmark, and the tables after the timings."""

import math
from collections.abc import Callable

import pytest
import tables
from card import HAS_GPU
from problem import OURS
from tables import Measurement
from track import Track

NO_TIME = "no time was left"


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption("--rounds", type=int, default=7 if HAS_GPU else 5, help="times that contenders of a kernel take turns")
    group.addoption("--calls", type=int, default=10 if HAS_GPU else 2, help="timed calls of each contender in a round")
    group.addoption("--seconds", type=float, default=math.inf, help="after so many seconds no other kernel is begun")


class Replay:
    """A clock that goes on by the times that were measured, while each is played: pytest-benchmark reads it as it reads any timer.

    It measures one function at a time, but contenders take turns.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """The time."""
        return self._now

    def play(self, seconds: float) -> None:
        """Let so much time pass."""
        self._now += seconds


_REPLAY = Replay()


def pytest_collection_modifyitems(items):
    for item in items:
        if "report" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=_REPLAY.read))


@pytest.fixture(scope="session")
def track(request) -> Track:
    options = {name: request.config.getoption(name) for name in ("rounds", "calls", "seconds")}
    return Track(**options)


@pytest.fixture
def report(benchmark, track) -> Callable[..., None]:
    """Measures the group when nobody has, and gives one contender's times to pytest-benchmark; skips one that is absent."""

    def run(problem_of, shape, direction, contender):
        group = track.group(problem_of, shape, direction)
        if group is None:
            pytest.skip(NO_TIME)
        if contender == OURS and OURS in group.absent:
            benchmark.pedantic(_fail, args=(group.absent[OURS],))
        if contender not in group.lanes:
            pytest.skip(group.absent.get(contender, f"has no {direction}"))
        benchmark.group = group.title
        benchmark.extra_info.update(group.info(contender))
        seconds = group.lanes[contender].seconds
        times = iter(seconds)
        benchmark.pedantic(_REPLAY.play, setup=lambda: ((next(times),), {}), rounds=len(seconds))

    return run


def _fail(reason: str) -> None:
    raise AssertionError(reason)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [
        Measurement(group=bench.group, median=bench.stats.median, info=bench.extra_info)
        for bench in (session.benchmarks if session else [])
        if not bench.has_error and "contender" in bench.extra_info
    ]
    kernels = [row for row in measured if "absent" in row.info]
    for title, lines in (
        ("rates (median)", tables.rate_lines(row for row in measured if "absent" not in row.info)),
        ("kernels (median)", tables.kernel_lines(kernels)),
    ):
        if lines:
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(lines))
