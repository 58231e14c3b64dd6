"""How what was raced is reported to pytest-benchmark, written down at once, and told in tables at the end."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import tables
import warm
from card import HAS_GPU
from lost_context import pytest_configure as pytest_configure  # a hook
from problem import EAGER, OURS
from race import ALL, COMPILED, FIRST, Track, is_compiled
from tables import Measurement

JOBS = pytest.StashKey[dict[warm.Job, None]]()


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption("--rounds", type=int, default=7 if HAS_GPU else 5, help="times that contenders take turns")
    group.addoption("--calls", type=int, default=10 if HAS_GPU else 2, help="timed calls of each contender in a round")
    group.addoption(
        "--contenders",
        choices=(ALL, FIRST, COMPILED),
        default=ALL if HAS_GPU else FIRST,  # on a CPU compiling takes minutes
        help="all, those that need no compiler, or the compiled ones against the first of the others",
    )
    group.addoption(
        "--warm",
        type=int,
        default=0,
        metavar="N",
        help="time nothing: compile peers, or among the first ones our kernels, in N processes, for a run that comes after",
    )
    group.addoption("--measurements", type=Path, help="file that each result is appended to, when it is there")


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


def takes_part(contender: str, phase: str) -> bool:
    """Whether it is asked for in a phase; in that of the compiled ones ours is too, and eager where there is no kernel of ours."""
    return phase == ALL or (phase == COMPILED) == is_compiled(contender) or (phase == COMPILED and contender in (OURS, EAGER))


def pytest_collection_modifyitems(config, items):
    phase = config.getoption("contenders")
    for item in items:
        if "play" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=_REPLAY.read))
    kept = [item for item in items if not hasattr(item, "callspec") or takes_part(item.callspec.params.get("contender", OURS), phase)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def track(request) -> Track:
    return Track(**{name: request.config.getoption(name) for name in ("rounds", "calls")}, phase=request.config.getoption("contenders"))


@pytest.fixture
def play(benchmark, request) -> Callable[..., None]:
    """Gives times that were measured to pytest-benchmark and to the file, as a contender's of a group, with what is known beside them."""

    def run(group, info, seconds):
        if path := request.config.getoption("measurements"):
            tables.append(path, Measurement(group=group, median=median(seconds), info=info), seconds)
        benchmark.group = group
        benchmark.extra_info.update(info)
        times = iter(seconds)
        benchmark.pedantic(_REPLAY.play, setup=lambda: ((next(times),), {}), rounds=len(seconds))

    return run


@pytest.fixture
def report(benchmark, play, track, request) -> Callable[..., None]:
    """Races the group when nobody has, and gives one contender's times to pytest-benchmark; skips one that is absent."""

    def run(direction, contender, build, *arguments):
        if request.config.getoption("warm"):
            request.config.stash.setdefault(JOBS, {})[warm.Job(direction, build, arguments)] = None
            pytest.skip("compiled afterwards, with all others")
        found = track.raced(direction, build, *arguments)
        reason = found.failure or found.absent.get(contender, "does not take part")
        if contender == OURS and (found.failure or OURS in found.absent):
            benchmark.pedantic(_fail, args=(reason,))
        if contender not in found.seconds:
            pytest.skip(reason)
        play(found.title, found.infos[contender], found.seconds[contender])

    return run


def _fail(reason: str) -> None:
    raise AssertionError(reason)


def pytest_sessionfinish(session):
    if jobs := list(session.config.stash.get(JOBS, {})):
        warm.compile_all(jobs, session.config.getoption("warm"), session.config.getoption("contenders"))


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
