"""Weights of JAX: original ViT and AugReg (.npz), big_vision, and scenic's ViT, ViViT and PolyViT (Flax msgpack).

The names are paths, with "/" between their parts. A dense layer's kernel is the transpose of ours, and attention's are split into heads.
All these models have GELU's tanh approximation and LayerNorms with an eps of 1e-6.
"""

from __future__ import annotations

import math
import re
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
    measure_model,
    shift_block,
)

ROOTS = re.compile(r"^(opt|optimizer|target|params|model|state|0)/")
"""What old and new training states put before the names of their weights."""
TOKENIZERS = {"tokenizer2d": "image", "tokenizer3d": "video", "tokenizer_spec": "audio"}
"""Scenic's PolyViT's, and the modalities that they are for."""
DATASETS = {"kinetics400": "video", "moments_in_time": "video", "balanced_audioset": "audio", "audioset": "audio", "vggsound": "audio"}
"""The modality of the heads that scenic's only configuration has; those whose names begin with bit_ are for images."""
SQUARE, MEASURED = {"image"}, {"audio"}
"""Modalities whose grids are square, and those whose grids are no levels of 0 to 255."""
LEVELS = (127.5,) * 3


def recognise(tensors: Tensors) -> bool:
    """Whether these are the names of one of the models known here."""
    return any(name.endswith("embedding/kernel") for name in tensors)


def convert(tensors: Tensors, config: Mapping[str, Any], source: str) -> Pretrained:
    """The weights in our form. Raises ValueError for ViViT's factorised encoders and other models than a plain Transformer."""
    tensors = _unstack({_strip(name): tensor for name, tensor in tensors.items() if not _is_state(name)})
    if any(name.startswith(("SpatialTransformer/", "TemporalTransformer/")) for name in tensors):
        raise ValueError(f"{source}: a factorised encoder; models here attend to all tubelets at once (ViViT's model 1)")
    if any(name.startswith("tokenizer/") for name in tensors):
        return _convert_polyvit(tensors, source)
    if any(name.startswith("MAPHead_0/") for name in tensors):
        raise ValueError(f"{source}: its head pools by attention (MAPHead_0), which models here do not")
    if "cls" not in tensors:
        raise ValueError(f"{source}: it has no class token, and takes the mean of normalised tokens, where models here normalise the mean")
    encoder = {name.removeprefix("Transformer/"): tensor for name, tensor in tensors.items() if name.startswith("Transformer/")}
    trunk = _read_blocks(encoder, source)
    trunk |= {f"norm.{key}": encoder[f"encoder_norm/{there}"] for key, there in (("weight", "scale"), ("bias", "bias"))}
    key = next((key for key in ("posembed_input/pos_embedding", "pos_embedding") if key in encoder), None)
    positions = encoder[key] if key else tensors.get("pos_embedding")
    if positions is None:
        raise ValueError(f"{source}: it has no position embeddings; fixed ones of two axes (sincos2d) are unknown here")
    modality = "video" if tensors["embedding/kernel"].ndim == 5 else "image"
    tokenizer = _read_tokenizer({**tensors, "posembed_input/pos_embedding": positions}, modality)
    stem = next((stem for stem in ("head", "output_projection") if f"{stem}/kernel" in tensors), None)
    hidden = [name for name in tensors if name.startswith("pre_logits/")]
    heads = {HEAD: _read_head(tensors, stem, modality)} if stem and not hidden else {}
    left_out = dict.fromkeys(hidden, "a hidden layer of the head, which models here do not have")
    if stem and hidden:
        left_out |= dict.fromkeys((f"{stem}/kernel", f"{stem}/bias"), "it reads pre_logits, which models here do not have")
    known = ("Transformer/", "embedding/", "pre_logits/", f"{stem}/")
    left_out |= {name: "of no use here" for name in tensors if not name.startswith(known) and name not in ("cls", "pos_embedding")}
    model = measure_model(trunk, _count_heads(encoder), gelu="tanh", norm_eps=1e-6)
    return Pretrained(
        source=source, kind="JAX ViT", model=model, tokenizers={modality: tokenizer}, trunk=trunk, heads=heads, left_out=left_out
    )


def _convert_polyvit(tensors: Tensors, source: str) -> Pretrained:
    tokenizers = {}
    for theirs, ours in TOKENIZERS.items():
        own = {name.removeprefix(f"tokenizer/{theirs}/"): t for name, t in tensors.items() if name.startswith(f"tokenizer/{theirs}/")}
        if own:
            tokenizers[ours] = _read_tokenizer(own, ours, _read_blocks(own, source))
    num_adaptors = count_blocks(next(iter(tokenizers.values())).tensors)
    encoder = {name.removeprefix("vit_encoder/"): tensor for name, tensor in tensors.items() if name.startswith("vit_encoder/")}
    trunk = _read_blocks(encoder, source)
    first = min((int(name.split(".")[1]) for name in trunk), default=0)
    trunk = {shift_block(name, num_adaptors - first): tensor for name, tensor in trunk.items()}
    blocks = trunk or {shift_block(n, 0): t for n, t in next(iter(tokenizers.values())).tensors.items()}
    depth = count_blocks(trunk) + num_adaptors
    trunk |= {"norm.weight": encoder["encoder_norm/scale"], "norm.bias": encoder["encoder_norm/bias"]}
    heads = {}
    for name in (name for name in tensors if name.startswith("classification_head_") and name.endswith("output_projection/kernel")):
        stem = name.removesuffix("/kernel")
        task = stem.split("/")[0].removeprefix("classification_head_").removeprefix("bit_")
        heads[task] = _read_head(tensors, stem, DATASETS.get(task, "image"))
    qkv = next(tensor for name, tensor in blocks.items() if name.endswith("attn.qkv.weight"))
    fc1 = next(tensor for name, tensor in blocks.items() if name.endswith("mlp.fc1.weight"))
    sample = {name.split("/", 2)[-1] if name.startswith("tokenizer/") else name.split("/", 1)[-1]: t for name, t in tensors.items()}
    settings: dict[str, Any] = {"num_heads": _count_heads(sample), "num_adaptor_layers": num_adaptors, "gelu": "tanh", "norm_eps": 1e-6}
    renumbered = {"blocks.0.attn.qkv.weight": qkv, "blocks.0.mlp.fc1.weight": fc1}
    model = measure_model(renumbered | {f"blocks.{number}.": qkv for number in range(depth)}, **settings)
    return Pretrained(source=source, kind="scenic PolyViT", model=model, tokenizers=tokenizers, trunk=trunk, heads=heads)


def _is_state(name: str) -> bool:
    """Whether it is a number of the training state, not a weight: moments of the optimizer, counters."""
    return bool(re.search(r"(^|/)(state|param_states|opt_state|rng|global_step|accum_train_time|metadata)(/|$)", name))


def _strip(name: str) -> str:
    while ROOTS.match(name):
        name = ROOTS.sub("", name)
    return name


def _unstack(tensors: Tensors) -> Tensors:
    """Layers that a scan stacked, [depth, …] under `encoderblock/`, as one entry each."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "encoderblock/" in name:
            found |= {name.replace("encoderblock/", f"encoderblock_{number}/"): layer for number, layer in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _read_blocks(encoder: Tensors, source: str) -> Tensors:
    blocks: Tensors = {}
    layers: dict[int, Tensors] = {}
    for name, tensor in encoder.items():
        match = re.match(r"encoderblock_(\d+)/(.*)", name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    for number, layer in layers.items():
        try:
            blocks |= {f"blocks.{number}.{name}": tensor for name, tensor in _read_block(layer).items()}
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{source}: encoderblock_{number} is none of a plain Transformer, it holds {', '.join(sorted(layer))}"
            ) from error
    return blocks


def _read_block(layer: Tensors) -> Tensors:
    """A block's tensors by our names. The numbers in theirs differ from library to library, their order does not."""
    norm1, norm2 = sorted({name.split("/")[0] for name in layer if name.startswith("LayerNorm_")})
    [attention] = {name.split("/")[0] for name in layer if name.startswith("MultiHeadDotProductAttention_")}
    [mlp] = {name.split("/")[0] for name in layer if name.startswith("MlpBlock_")}
    found: Tensors = {}
    for ours, theirs in (("norm1", norm1), ("norm2", norm2)):
        found |= {f"{ours}.weight": layer[f"{theirs}/scale"], f"{ours}.bias": layer[f"{theirs}/bias"]}
    parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
    found["attn.qkv.weight"] = torch.cat([layer[f"{part}/kernel"].flatten(1).t() for part in parts])
    found["attn.qkv.bias"] = torch.cat([layer[f"{part}/bias"].flatten() for part in parts])
    found["attn.proj.weight"] = layer[f"{attention}/out/kernel"].flatten(0, -2).t()
    found["attn.proj.bias"] = layer[f"{attention}/out/bias"]
    for ours, theirs in (("mlp.fc1", "Dense_0"), ("mlp.fc2", "Dense_1")):
        found |= {f"{ours}.weight": layer[f"{mlp}/{theirs}/kernel"].t(), f"{ours}.bias": layer[f"{mlp}/{theirs}/bias"]}
    return found


def _read_tokenizer(tensors: Tensors, modality: str, adaptors: Tensors | None = None) -> TokenizerWeights:
    kernel = tensors["embedding/kernel"].movedim(-1, 0)  # [dim, (frames,) rows, columns, channels]
    kernel = kernel if kernel.ndim == 5 else kernel[:, None]
    found = {"weight": kernel, "bias": tensors["embedding/bias"], **(adaptors or {})}
    found["cls_token"], positions, tubelets = tensors["cls"], tensors["posembed_input/pos_embedding"], None
    positions = positions if positions.ndim == 3 else positions[None]
    if modality in SQUARE:
        count = positions.shape[1]
        side = math.isqrt(count)
        if side * side == count:  # big_vision adds them before the class token, which then has none
            positions = torch.cat([positions.new_zeros(1, 1, positions.shape[2]), positions], 1)
        side = math.isqrt(positions.shape[1] - 1)
        tubelets = (1, side, side) if side * side == positions.shape[1] - 1 else None
    found["pos_embed"] = positions
    levels = None if modality in MEASURED else LEVELS
    return TokenizerWeights(tensors=found, tubelets=tubelets, mean=levels, std=levels)


def _read_head(tensors: Tensors, stem: str, modality: str) -> HeadWeights:
    return HeadWeights(modality=modality, tensors={"weight": tensors[f"{stem}/kernel"].t(), "bias": tensors[f"{stem}/bias"]})


def _count_heads(encoder: Tensors) -> int:
    """From the shape [dim, heads, head_dim] of any query's kernel."""
    return next(tensor.shape[1] for name, tensor in encoder.items() if name.endswith("/query/kernel"))
