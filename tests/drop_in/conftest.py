"""What holds for every test of other people's models."""

from interpreted import on_kernels as on_kernels  # a fixture
from interpreted import patched_once as patched_once  # another
from interpreted import registered as registered  # another
from torchvision_without_extension import declare_operators

# timm and, where it is installed, transformers import torchvision.
declare_operators()
