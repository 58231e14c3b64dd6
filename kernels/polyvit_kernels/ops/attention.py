"""Attention."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def attention(qkv: Float[Tensor, "batch tokens 3 heads head_dim"]) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Softmax attention of every token to all tokens of its example, scores divided by sqrt(head_dim) (arXiv 1706.03762, eq. 1)."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but attention needs [batch, tokens, 3, heads, head_dim]")
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
