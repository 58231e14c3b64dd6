"""torchvision's `vit_*`: their state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyvit_fast.model.pretrained.weights import HEAD, HeadWeights, Pretrained, Tensors, TokenizerWeights, measure_model

BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.3.": "mlp.fc2.",
    "mlp.linear_1.": "mlp.fc1.",  # up to torchvision 0.13
    "mlp.linear_2.": "mlp.fc2.",
}
"""How the names within a block begin there, and here."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's, with which all its Vision Transformers were trained."""


def recognise(tensors: Tensors) -> bool:
    """Whether these are the names of torchvision's Vision Transformer."""
    return "conv_proj.weight" in tensors and "encoder.pos_embedding" in tensors


def convert(tensors: Tensors, config: Mapping[str, Any], source: str) -> Pretrained:
    """The weights in our form."""
    trunk = {f"norm.{key}": tensors[f"encoder.ln.{key}"] for key in ("weight", "bias")}
    for name, tensor in tensors.items():
        if name.startswith("encoder.layers."):
            number, _, rest = name.removeprefix("encoder.layers.encoder_layer_").partition(".")
            start = next(start for start in BLOCK if rest.startswith(start))
            trunk[f"blocks.{number}.{BLOCK[start]}{rest.removeprefix(start)}"] = tensor
    kernel, positions = tensors["conv_proj.weight"], tensors["encoder.pos_embedding"]
    side = math.isqrt(positions.shape[1] - 1)
    tokenizer = TokenizerWeights(
        tensors={
            "weight": kernel.permute(0, 2, 3, 1)[:, None],
            "bias": tensors["conv_proj.bias"],
            "cls_token": tensors["class_token"],
            "pos_embed": positions,
        },
        tubelets=(1, side, side),
        mean=MEAN,
        std=STD,
    )
    heads = {}
    hidden = [name for name in tensors if name.startswith("heads.pre_logits.")]
    left_out = dict.fromkeys(hidden, "a hidden layer of the head, which models here do not have")
    if hidden:
        left_out |= dict.fromkeys(("heads.head.weight", "heads.head.bias"), "it reads pre_logits, which models here do not have")
    elif "heads.head.weight" in tensors:
        heads[HEAD] = HeadWeights(modality="image", tensors={key: tensors[f"heads.head.{key}"] for key in ("weight", "bias")})
    dim = len(kernel)
    model = measure_model(trunk, 16 if dim == 1280 else max(1, dim // 64), gelu="erf", norm_eps=1e-6)
    return Pretrained(
        source=source, kind="torchvision ViT", model=model, tokenizers={"image": tokenizer}, trunk=trunk, heads=heads, left_out=left_out
    )
