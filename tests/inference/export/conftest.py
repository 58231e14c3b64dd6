"""What holds for every test of an export."""

from torchvision_without_extension import declare_operators

# timm and, where it is installed, transformers import torchvision.
declare_operators()
