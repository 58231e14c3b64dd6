"""What holds for every test."""

import gc
import os
import sys

import annotations as annotations  # how the hook on polyvit_fast checks: before anything imports it
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from lost_context import pytest_configure as pytest_configure  # a hook
from tiny_runs import tiny_config

from polyvit_fast.config import Train

# Where there is no GPU, Triton's interpreter runs the kernels; whether it does is settled when their modules are imported.
# torch keeps each seed for a GPU that may come, with the stack of the call, which takes two milliseconds.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for backend in (torch.cuda, torch.xpu, torch.mtia):
        backend.manual_seed_all = lambda seed: None

# Small tensors gain nothing from more threads, and on a busy machine threads that wait for each other take ten times as long.
# Who sets OMP_NUM_THREADS tests with as many: no result may depend on their number.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A pytest that a test starts is a session of its own, no worker of this one, in which pytest-benchmark would measure nothing.
os.environ.pop("PYTEST_XDIST_WORKER", None)

# How long an example takes says something of the machine, not of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_finish():
    """What was imported and collected stays to the end: garbage collections, a twentieth of all time, pass over it, and are rarer.

    Where a test will start processes, the imports that these need begin while others run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    if processes := sys.modules.get("processes"):
        processes.begin()


@pytest.fixture
def config() -> Train:
    return tiny_config()


@pytest.fixture
def unchecked_types():
    """As in production: torch.compile cannot trace what checks annotations, which would also be the first to see a wrong argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
