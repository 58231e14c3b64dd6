"""The size and form of the Vision Transformer: `Model`, and the usual sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyvit_fast.config.record import Record, check_range


@dataclass(frozen=True, kw_only=True)
class Model(Record):
    """The Vision Transformer that all tasks train."""

    dim: int = 768
    """Width of the tokens (embedding dimension)."""
    depth: int = 12
    """Number of transformer blocks that an input passes through, including adaptor layers."""
    num_heads: int = 12
    """Number of attention heads. Must divide dim."""
    mlp_dim: int = 3072
    """Width of the MLP's hidden layer."""
    num_adaptor_layers: int = 0
    """The first so many blocks are separate for each modality; the others are common to all (the paper's L_adapt)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """tanh: the approximation of the paper's JAX code. erf: exact, as in timm and in Hugging Face's ViT."""
    norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm. 1e-6: the paper's code and timm. 1e-12: Hugging Face's ViT, DeiT and AST."""
    last_norm_eps: float = 0.0
    """The same in the last LayerNorm, where it differs, as in Hugging Face's VideoMAE (1e-5). 0: norm_eps."""
    dropout: float = 0.0
    """Dropout probability after the position embedding, the attention projection and both layers of the MLP."""
    rescale_drop_path: bool = False
    """Divide the residual branches that drop path keeps by their probability of being kept, as timm does. The paper's code does not."""

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "dim", "num_heads")
        check_range(self, "[1, 1024]", "depth")
        check_range(self, "[1, 1048576]", "mlp_dim")
        if self.dim % self.num_heads:
            raise ValueError(f"dim = {self.dim} does not divide by num_heads = {self.num_heads}")
        if not 0 <= self.num_adaptor_layers <= self.depth:
            raise ValueError(f"num_adaptor_layers = {self.num_adaptor_layers} must lie between 0 and depth = {self.depth}")
        check_range(self, "(0, 1]", "norm_eps")
        check_range(self, "[0, 1]", "last_norm_eps")
        check_range(self, "[0, 1)", "dropout")

    @classmethod
    def suggest(cls, value: object) -> str:
        """One of the usual sizes where its letter stands."""
        return f'write MODELS["{value}"]' if isinstance(value, str) and value in MODELS else super().suggest(value)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


MODELS: dict[str, Model] = {  # arXiv 2010.11929, table 1; Ti and S from arXiv 2106.04560, table 2
    "Ti": Model(dim=192, depth=12, num_heads=3, mlp_dim=768),
    "S": Model(dim=384, depth=12, num_heads=6, mlp_dim=1536),
    "B": Model(dim=768, depth=12, num_heads=12, mlp_dim=3072),
    "L": Model(dim=1024, depth=24, num_heads=16, mlp_dim=4096),
}
