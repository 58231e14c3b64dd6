"""How kernels are reported to pytest-benchmark, and the tables after the timings."""

import math
import time
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
        if "play" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=_REPLAY.read))


@pytest.fixture(scope="session")
def options(request) -> dict[str, float]:
    return {name: request.config.getoption(name) for name in ("rounds", "calls", "seconds")}


@pytest.fixture(scope="session")
def deadline(options) -> float:
    """On `time.monotonic`; nothing is begun after it."""
    return time.monotonic() + options["seconds"]


@pytest.fixture
def in_time(deadline) -> None:
    """Skips what would begin too late."""
    if time.monotonic() > deadline:
        pytest.skip(NO_TIME)


@pytest.fixture(scope="session")
def track(options) -> Track:
    return Track(**options)


@pytest.fixture(scope="session")
def step_track(options):
    from steps import StepTrack  # here, as it needs the whole package, of which kernels know nothing

    return StepTrack(**options)


@pytest.fixture
def play(benchmark) -> Callable[..., None]:
    """Gives times that were measured to pytest-benchmark, as a contender's of a group, with what is known beside them."""

    def run(group, info, seconds):
        benchmark.group = group
        benchmark.extra_info.update(info)
        times = iter(seconds)
        benchmark.pedantic(_REPLAY.play, setup=lambda: ((next(times),), {}), rounds=len(seconds))

    return run


@pytest.fixture
def report(benchmark, play, track) -> Callable[..., None]:
    """Measures the group when nobody has, and gives one contender's times to pytest-benchmark; skips one that is absent."""

    def run(problem_of, shape, direction, contender):
        group = track.group(problem_of, shape, direction)
        _fail_or_skip(benchmark, group, contender, f"has no {direction}")
        play(group.title, group.info(contender), group.lanes[contender].seconds)

    return run


@pytest.fixture
def report_step(benchmark, play, step_track) -> Callable[..., None]:
    """The same of a whole training step."""

    def run(rivals, contender):
        found = step_track.measured(rivals.title, rivals.contest, rivals.contenders)
        _fail_or_skip(benchmark, found, contender, "is not there")
        play(rivals.title, found.info(contender), found.lanes[contender].seconds)

    return run


def _fail_or_skip(benchmark, found, contender, otherwise):
    if found is None:
        pytest.skip(NO_TIME)
    if contender == OURS and OURS in found.absent:
        benchmark.pedantic(_fail, args=(found.absent[OURS],))
    if contender not in found.lanes:
        pytest.skip(found.absent.get(contender, otherwise))


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
    for title, lines in tables.sections(measured):
        terminalreporter.section(title)
        terminalreporter.write_line("\n".join(lines))
