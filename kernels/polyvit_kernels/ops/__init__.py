"""The public operations: differentiable functions of a Vision Transformer, and updates that overwrite flat buffers.

Each is registered with torch.library as `polyvit::<name>` (`registration`), which on CUDA launches the kernel that `tiles.pick` chooses.
On a CPU the functions call torch's own operators, as do the registered operations. `reference.py` states what each computes.
"""

from polyvit_kernels.ops.attention import AttentionBackend, attention, attention_varlen
from polyvit_kernels.ops.layer_norm import add_layer_norm, layer_norm, layer_norm_residual
from polyvit_kernels.ops.linear import linear
from polyvit_kernels.ops.mlp import Gelu, linear_add, linear_gelu, mlp
from polyvit_kernels.ops.patch_embed import patch_embed
from polyvit_kernels.ops.update import adamw_, sgd_

__all__ = [
    "AttentionBackend",
    "Gelu",
    "adamw_",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "layer_norm",
    "layer_norm_residual",
    "linear",
    "linear_add",
    "linear_gelu",
    "mlp",
    "patch_embed",
    "sgd_",
]
