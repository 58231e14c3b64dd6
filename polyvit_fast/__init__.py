"""polyvit-fast: one Vision Transformer for images, videos and audio (PolyViT, arXiv 2111.12993)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyvit_fast.model.fuse import Report, fuse, unfuse
    from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp
    from polyvit_fast.model.polyvit import PolyViT

__all__ = ["Attention", "Block", "LayerNorm", "Mlp", "PolyViT", "Report", "fuse", "unfuse"]
__version__ = "0.5.0"

HOMES = dict.fromkeys(("Report", "fuse", "unfuse"), "fuse") | {"PolyViT": "polyvit"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: PyTorch takes seconds, in which the command line could not hear signals."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.model.{HOMES.get(name, 'modules')}"), name)
