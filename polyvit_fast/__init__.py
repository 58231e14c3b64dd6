"""polyvit-fast: one Vision Transformer for images, videos and audio (PolyViT, arXiv 2111.12993)."""

TYPE_CHECKING = False  # typing's takes longer to import than all else that stands before the command line handles signals
if TYPE_CHECKING:
    from typing import Any

    from polyvit_fast.drop_in.api import fuse, unfuse
    from polyvit_fast.drop_in.fuse_report import FuseReport
    from polyvit_fast.inference.export.api import Exported, export
    from polyvit_fast.inference.loading import load
    from polyvit_fast.inference.trained_model import TrainedModel
    from polyvit_fast.inference.training import train
    from polyvit_fast.model import pretrained
    from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp
    from polyvit_fast.model.polyvit import PolyViT

__all__ = [
    "Attention",
    "Block",
    "Exported",
    "FuseReport",
    "LayerNorm",
    "Mlp",
    "PolyViT",
    "TrainedModel",
    "export",
    "fuse",
    "load",
    "pretrained",
    "train",
    "unfuse",
]
__version__ = "0.8.0"

_MODULES = {
    "Attention": "model.modules",
    "Block": "model.modules",
    "Exported": "inference.export.api",
    "FuseReport": "drop_in.fuse_report",
    "LayerNorm": "model.modules",
    "Mlp": "model.modules",
    "PolyViT": "model.polyvit",
    "TrainedModel": "inference.trained_model",
    "export": "inference.export.api",
    "fuse": "drop_in.api",
    "load": "inference.loading",
    "pretrained": "model.pretrained",
    "train": "inference.training",
    "unfuse": "drop_in.api",
}


def __getattr__(name: str) -> "Any":
    """Imports a name when it is first used: PyTorch takes seconds, during which the command line could not handle signals."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_MODULES[name]}")
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)
