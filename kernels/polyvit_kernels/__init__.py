"""The operations of a Vision Transformer as functions on tensors, for anybody's model; `reference` states their mathematics."""

from polyvit_kernels.ops import (
    adamw_,
    add_layer_norm,
    attention,
    attention_varlen,
    layer_norm,
    layer_norm_residual,
    linear_add,
    linear_gelu,
    mlp,
    patch_embed,
    sgd_,
)

__all__ = [
    "adamw_",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "layer_norm",
    "layer_norm_residual",
    "linear_add",
    "linear_gelu",
    "mlp",
    "patch_embed",
    "sgd_",
]
