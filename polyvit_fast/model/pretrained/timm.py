"""timm's `vit_*` and `deit_*`: their state dict, with the config.json that timm puts next to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from polyvit_fast.model.pretrained.weights import (
    HEAD,
    HeadWeights,
    Pretrained,
    Tensors,
    TokenizerWeights,
    count_blocks,
    has_equal_heads,
    measure_model,
)

HEADS_OF_DIM = {1280: 16, 1408: 16, 1664: 16}
"""timm's models whose heads are not 64 wide."""
TOKENS = ("cls_token", "dist_token", "reg_token")
"""Those in front of the patches, in their order; a single register is a second class token that no head reads."""
UNKNOWN = {
    "norm_pre": "a norm before the blocks",
    "attn.q_norm": "normalised queries and keys",
    "attn.norm": "a norm of attention's outputs",
    "mlp.norm": "a norm within the MLP",
    "mlp.fc1_g": "a gated MLP",
    "attn_pool": "attention pooling",
    "rope": "rotary positions",
}


def recognise(tensors: Tensors) -> bool:
    """Whether these are the names of timm's Vision Transformer."""
    return "patch_embed.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors


def convert(tensors: Tensors, config: Mapping[str, Any], source: str) -> Pretrained:
    """The weights in our form. Raises ValueError for a part that our models do not have."""
    _refuse_unknown(tensors, source)
    arguments, files = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    depth, left_out = count_blocks(tensors), {}
    trunk: Tensors = {}
    for name in (name for name in tensors if name.startswith("blocks.")):
        if ".ls1." in name or ".ls2." in name:
            continue  # folded below
        trunk[name] = tensors[name]
    for number in range(depth):
        _complete_block(trunk, tensors, f"blocks.{number}.")
    pools_mean = "fc_norm.weight" in tensors
    norm = "fc_norm" if pools_mean else "norm"
    pool = config.get("global_pool", "avg" if pools_mean else "token")
    if pool not in ("token", "avg") or (pool == "avg") != pools_mean:
        raise ValueError(f"{source}: global_pool = {pool} with the norm before it is unknown here; token and avg are known")
    trunk |= {f"norm.{key}": tensors[f"{norm}.{key}"] for key in ("weight", "bias") if f"{norm}.{key}" in tensors}
    tokenizer = _read_tokenizer(tensors, config, files, pools_mean)
    heads = _read_heads(tensors, config, left_out)
    dim = trunk["blocks.0.attn.qkv.weight"].shape[1]
    if arguments.get("embed_dim", dim) != dim:
        raise ValueError(f"config.json says embed_dim = {arguments['embed_dim']}, the weights have {dim}")
    num_heads = int(arguments.get("num_heads", 0)) or HEADS_OF_DIM.get(dim, max(1, dim // 64))
    model = measure_model(trunk, num_heads, gelu=_read_gelu(arguments, config, source), norm_eps=1e-6)
    left_out |= dict.fromkeys(_find_rest(tensors, left_out), "no part of a Vision Transformer's forward pass here")
    return Pretrained(
        source=source, kind="timm ViT", model=model, tokenizers={"image": tokenizer}, trunk=trunk, heads=heads, left_out=left_out
    )


def _refuse_unknown(tensors: Tensors, source: str) -> None:
    if sum(tensors[name].shape[1] for name in TOKENS if name in tensors) > 2:
        raise ValueError(f"{source}: reg_token is of {tensors['reg_token'].shape[1]} register tokens; models here have two tokens at most")
    for part, meaning in UNKNOWN.items():
        found = next((name for name in tensors if name == part or f".{part}." in f".{name}."), None)
        if found:
            raise ValueError(f"{source}: {found} is of {meaning}, which models here do not have")


def _complete_block(trunk: Tensors, tensors: Tensors, block: str) -> None:
    """Give a block the biases that it may lack, and fold its LayerScale into what it scales."""
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        weight = trunk[f"{block}{layer}.weight"]
        trunk.setdefault(f"{block}{layer}.bias", weight.new_zeros(len(weight)))
    for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        gamma = tensors.get(f"{block}{scale}.gamma")
        if gamma is not None:
            trunk[f"{block}{layer}.weight"] = trunk[f"{block}{layer}.weight"] * gamma[:, None]
            trunk[f"{block}{layer}.bias"] = trunk[f"{block}{layer}.bias"] * gamma


def _read_tokenizer(tensors: Tensors, config: Mapping[str, Any], files: Mapping[str, Any], pools_mean: bool) -> TokenizerWeights:
    kernel = tensors["patch_embed.proj.weight"]
    found: Tensors = {"weight": kernel.permute(0, 2, 3, 1)[:, None]}
    found["bias"] = tensors.get("patch_embed.proj.bias", kernel.new_zeros(len(kernel)))
    class_tokens = [tensors[name] for name in TOKENS if name in tensors]
    if class_tokens:
        found["cls_token"] = torch.cat(class_tokens, 1)
    positions, tubelets = tensors["pos_embed"], None
    size = (config.get("model_args") or {}).get("img_size") or (files.get("input_size") or [0, 0, 0])[1:]
    rows, columns = (size, size) if isinstance(size, int) else size[-2:]
    grid = (rows // kernel.shape[2], columns // kernel.shape[3])
    counts = positions.shape[1], positions.shape[1] - len(class_tokens)
    for count in counts:  # without positions of class tokens, or with them
        if count == math.prod(grid):
            tubelets = (1, *grid)
        elif tubelets is None and math.isqrt(count) ** 2 == count:
            tubelets = (1, math.isqrt(count), math.isqrt(count))
    if tubelets and math.prod(tubelets) == positions.shape[1] and class_tokens:
        positions = torch.cat([positions.new_zeros(1, len(class_tokens), positions.shape[2]), positions], 1)
    found["pos_embed"] = positions
    mean, std = (tuple(255.0 * value for value in files.get(name) or (0.5, 0.5, 0.5)) for name in ("mean", "std"))
    pool = "mean" if pools_mean else "class_tokens" if has_equal_heads(tensors, "head", "head_dist") else "cls"
    return TokenizerWeights(tensors=found, tubelets=tubelets, num_class_tokens=len(class_tokens), pool=pool, mean=mean, std=std)


def _read_heads(tensors: Tensors, config: Mapping[str, Any], left_out: dict[str, str]) -> dict[str, HeadWeights]:
    if "head_dist.weight" in tensors and not has_equal_heads(tensors, "head", "head_dist"):
        left_out |= {f"head_dist.{key}": "the head of the distillation token; heads here read one token" for key in ("weight", "bias")}
    if "head.weight" not in tensors:
        return {}
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or ()
    if names and len(names) != len(tensors["head.weight"]):
        raise ValueError(f"config.json names {len(names)} classes, the head has {len(tensors['head.weight'])}")
    head = {key: tensors[f"head.{key}"] for key in ("weight", "bias")}
    return {HEAD: HeadWeights(modality="image", tensors=head, class_names=tuple(names) if names else None)}


def _read_gelu(arguments: Mapping[str, Any], config: Mapping[str, Any], source: str) -> str:
    name = arguments.get("act_layer") or ("quick_gelu" if "quickgelu" in str(config.get("architecture")) else "gelu")
    known = {"gelu": "erf", "gelu_erf": "erf", "gelu_tanh": "tanh"}
    if name not in known:
        raise ValueError(f"{source}: its activation is {name!r}; models here have {' and '.join(map(repr, known))}")
    return known[name]


def _find_rest(tensors: Tensors, left_out: Mapping[str, str]) -> list[str]:
    known = ("blocks.", "patch_embed.proj.", "norm.", "fc_norm.", "head.", "head_dist.")
    return [name for name in tensors if not name.startswith(known) and name not in (*TOKENS, "pos_embed") and name not in left_out]
