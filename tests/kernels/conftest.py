"""What holds for every test of a kernel."""

import fcntl
import os

import jaxtyping
import pytest
import torch
from ahead_of_time import build_library, choose_few_rows, compile_table
from bounds import bounds as bounds  # a fixture
from interpreted import on_kernels as on_kernels  # another
from interpreted import patched_once as patched_once  # another
from interpreted import registered as registered  # another
from lost_context import pytest_configure as pytest_configure  # a hook

from polyvit_kernels.aot.main import ARCHS
from polyvit_kernels.tiles import load_rows, lookup
from polyvit_kernels.tiles.table import TABLE

# cuBLAS repeats its results only with this, and without TF32 the baselines are as exact as their dtype.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_holds_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_keep_to_their_tensors(bounds, patched_once):
    """In the interpreter; on a GPU an address beyond a tensor may well be another one's."""


@pytest.fixture(autouse=True)
def what_is_registered_is_called(registered):
    """Not torch's own operators, which would be called on a CPU."""


@pytest.fixture
def unchecked_types():
    """As in production, where no annotation is checked. On a GPU these tests go without tests/conftest.py, which has another."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", params=["few rows", pytest.param("every row", marks=pytest.mark.long)])
def table_folder(tmp_path_factory, request):
    """What the ahead-of-time compilation writes for bf16 and every generation of GPUs; see `compile_table`.

    The first worker that needs it makes it, and the C library made of it, for all.
    """
    common = tmp_path_factory.getbasetemp()
    folder = (common.parent if hasattr(request.config, "workerinput") else common) / f"aot of {request.param}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "stdout").exists():
            compile_table(folder, choose_few_rows() if request.param == "few rows" else TABLE, ARCHS)
            if (folder / "polyvit_table.c").exists():
                build_library(folder)
    return folder


@pytest.fixture
def compiled_rows(table_folder, monkeypatch):
    """The rows of that table, from which alone `tiles.pick` now chooses."""
    rows = load_rows(table_folder / "rows.json")
    monkeypatch.setattr(lookup, "TABLE", rows)
    for cached in (lookup._pick, lookup._rows):
        cached.cache_clear()
    yield rows
    for cached in (lookup._pick, lookup._rows):
        cached.cache_clear()


@pytest.fixture(scope="session")
def c_library(table_folder):
    """The C library made of it."""
    assert (table_folder / "polyvit_table.c").exists(), (table_folder / "stderr").read_text()
    return table_folder / "libpolyvit_kernels.so"
