"""What holds for every test of a kernel."""

import os

import jaxtyping
import pytest
import torch
from ahead_of_time import build_library, run_aot
from bounds import bounds as bounds  # a fixture
from interpreted import on_kernels as on_kernels  # another
from interpreted import registered as registered  # another
from lost_context import pytest_configure as pytest_configure  # a hook

from polyvit_kernels.aot.main import ARCHS

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
def kernels_keep_to_their_tensors(bounds):
    """In the interpreter; on a GPU an address beyond a tensor may well be another one's."""


@pytest.fixture(autouse=True)
def what_is_registered_is_called(registered):
    """Not torch's own operators, which would be called on a CPU."""


@pytest.fixture
def unchecked_types():
    """As in production, where no annotation is checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def table_folder(tmp_path_factory):
    """What the ahead-of-time compilation writes for bf16 and every generation of GPUs, with the table as `table.json`."""
    folder = tmp_path_factory.mktemp("aot")
    done = run_aot("--arch", *ARCHS, "--dtype", "bf16", "--out", folder, "--json", folder / "table.json")
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture(scope="session")
def c_library(table_folder):
    """The C library made of it."""
    assert (table_folder / "polyvit_table.c").exists(), (table_folder / "stderr").read_text()
    return build_library(table_folder)
