"""polyvit-fast: one Vision Transformer for images, videos and audio (PolyViT, arXiv 2111.12993)."""

from polyvit_fast.model.fuse import Report, fuse, unfuse
from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp
from polyvit_fast.model.polyvit import PolyViT

__all__ = ["Attention", "Block", "LayerNorm", "Mlp", "PolyViT", "Report", "fuse", "unfuse"]
__version__ = "0.5.0"
