"""polyvit-fast: one Vision Transformer for images, videos and audio (PolyViT, arXiv 2111.12993)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyvit_fast.drop_in.api import Report, fuse, unfuse
    from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp
    from polyvit_fast.model.polyvit import PolyViT

__all__ = ["Attention", "Block", "LayerNorm", "Mlp", "PolyViT", "Report", "fuse", "unfuse"]
__version__ = "0.5.0"

_MODULES = {
    "Attention": "model.modules",
    "Block": "model.modules",
    "LayerNorm": "model.modules",
    "Mlp": "model.modules",
    "PolyViT": "model.polyvit",
    "Report": "drop_in.api",
    "fuse": "drop_in.api",
    "unfuse": "drop_in.api",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: PyTorch takes seconds, in which the command line could not hear signals."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
