"""polyvit-fast: one Vision Transformer for images, videos and audio (PolyViT, arXiv 2111.12993)."""

__version__ = "0.1.0"
