"""What holds for every test of a kernel."""

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_holds_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked_types():
    """As in production, where no annotation is checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
