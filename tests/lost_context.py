"""A CUDA error loses the context of its process: the test that lost it fails and says so, and no later test fails for it.

A worker of pytest-xdist ends, and another one starts; without workers the session stops.
"""

import os
import sys

import pytest
from cuda_errors import find_cuda_error

LOST = "lost the CUDA context"
_LOSER = pytest.StashKey[str]()
_REPORTED: set[str] = set()  # the tests whose own reports say so


def pytest_configure(config):
    """Makes this module a plugin, however many conftest files import the hook."""
    if not config.pluginmanager.has_plugin(__name__):
        config.pluginmanager.register(sys.modules[__name__], __name__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel may fail long after it was launched: a test that passed may have lost the context as well."""
    report = yield
    error = find_cuda_error()
    if error and not item.session.stash.get(_LOSER, ""):
        item.session.stash[_LOSER] = item.nodeid
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} {LOST}: {error}\n\n{report.longrepr or ''}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After the test's reports: the process ends, or the session."""
    done = yield
    loser = item.session.stash.get(_LOSER, "")
    if loser and hasattr(item.config, "workerinput"):
        # Before xdist hears that the test is done, so that it takes this very test for the one that crashed its worker.
        os._exit(1)
    if loser:
        item.session.shouldfail = f"{loser} {LOST}; no other test can run in this process"
    return done


def pytest_runtest_logreport(report):
    """Where workers send theirs to: who lost it."""
    if report.failed and LOST in str(report.longrepr):
        _REPORTED.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report):
    """What xdist reports of the end of a worker is no second failure of the test that caused it."""
    if crashitem in _REPORTED:
        report.outcome, report.when = "passed", "teardown"
