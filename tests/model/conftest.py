"""What holds for every test of a model."""

import jaxtyping
import pytest
from interpreted import on_kernels as on_kernels  # a fixture
from interpreted import patched_once as patched_once  # another
from interpreted import registered as registered  # another
from torchvision_without_extension import declare_operators

# timm and, where it is installed, transformers import torchvision.
declare_operators()


@pytest.fixture
def unchecked_types():
    """As in production: torch.compile cannot trace what checks annotations, which would also be the first to see a wrong argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
