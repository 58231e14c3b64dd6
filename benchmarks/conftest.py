"""`pytest benchmarks`: candidates of a group take turns after the last of their tests, and what was measured is written down at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import machine
import pytest
from harness import Group, Row, append_rows, format_rows, release_memory
from lost_context import pytest_configure as watch_context

ROWS = pytest.StashKey[list[Row]]()
OPEN = pytest.StashKey[tuple[Callable[[], Group], Group]]()
"""The group whose tests are running, after the function that built it."""


def pytest_addoption(parser):
    group = parser.getgroup("polyvit")
    group.addoption("--rounds", type=int, default=7 if machine.HAS_GPU else 5, help="how often candidates take turns")
    group.addoption("--calls", type=int, default=10 if machine.HAS_GPU else 2, help="timed calls of each candidate in a round")
    group.addoption("--rows", type=Path, help="file that each group's results are appended to, a line for each candidate")
    group.addoption("--tiny", action="store_true", help="sizes that only show that the benchmarks run")


def pytest_configure(config):
    watch_context(config)
    machine.IS_TINY = config.getoption("--tiny")
    config.stash[ROWS] = []


@pytest.fixture
def keep(request):
    """A function that takes rows for the file and for the table at the end."""
    return partial(_keep, request.config)


def _keep(config, rows: list[Row]) -> None:
    config.stash[ROWS] += rows
    if path := config.getoption("--rows"):
        append_rows(path, rows)


@pytest.fixture
def group(request):
    """What `request.param` builds, the same group for all tests in a row that have this parameter."""
    build, found = request.config.stash.get(OPEN, (None, None))
    if build is not request.param:
        found = request.param()
        request.config.stash[OPEN] = (request.param, found)
    return found


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last test of a group, those who entered take turns."""
    config = item.config
    build, found = config.stash.get(OPEN, (None, None))
    if not found or (hasattr(nextitem, "callspec") and nextitem.callspec.params.get("group") is build):
        return
    del config.stash[OPEN]
    _keep(config, found.take_turns(config.getoption("--rounds"), config.getoption("--calls")))
    error = found.error
    del found
    release_memory()
    if error:
        raise error


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.section("in turn (medians)")
        terminalreporter.write_line(format_rows(rows))
