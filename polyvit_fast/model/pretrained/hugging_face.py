"""Hugging Face's ViT, DeiT, ViViT, AST and VideoMAE: the folder that `save_pretrained` writes, with names of transformers 4 and 5."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from polyvit_fast.config import Model
from polyvit_fast.model.pretrained.weights import HEAD, HeadWeights, Pretrained, Tensors, TokenizerWeights, has_equal_heads, measure_model

PREFIXES = ("vit.", "deit.", "vivit.", "audio_spectrogram_transformer.", "videomae.")
RENAMED = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.q_proj\.", ".attention.query."),
    (r"\.attention\.k_proj\.", ".attention.key."),
    (r"\.attention\.v_proj\.", ".attention.value."),
    (r"\.attention\.attention\.(q|v)_bias", r".attention.\1_bias"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".fc2."),
)
"""Spellings of transformers 4 (which 5 still writes) and 5, and one for both."""
GELUS: dict[str, Literal["erf", "tanh"]] = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_fast": "tanh",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


@dataclass(frozen=True)
class Family:
    """What is particular to one of the model types."""

    kind: str
    modality: str
    norm_eps: float
    """When config.json does not say."""
    gelu: str = "gelu"
    is_turned: bool = False
    """Whether its grid's rows are frequencies and its columns times; ours are the other way round."""


FAMILIES = {
    "vit": Family("Hugging Face ViT", "image", 1e-12),
    "deit": Family("Hugging Face DeiT", "image", 1e-12),
    "vivit": Family("Hugging Face ViViT", "video", 1e-6, "gelu_fast"),
    "audio-spectrogram-transformer": Family("Hugging Face AST", "audio", 1e-12, is_turned=True),
    "videomae": Family("Hugging Face VideoMAE", "video", 1e-12),
}
CLASSIFIERS = ("cls_classifier", "distillation_classifier")
"""DeiT's, where it has one for each of its class tokens, and gives the mean of their logits."""
AST_MEAN, AST_STD = -4.2677393, 2 * 4.5689974
"""AudioSet's, which AST's feature extractor has by default; it divides by twice the standard deviation."""


def recognise(tensors: Tensors) -> bool:
    """Whether these are the names of one of the models known here."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)


def convert(tensors: Tensors, config: Mapping[str, Any], source: str) -> Pretrained:
    """The weights in our form. `config` is config.json, with preprocessor_config.json under "preprocessor" where there is one."""
    tensors = {_rename(name): tensor for name, tensor in tensors.items()}
    family = _find_family(tensors, config, source)
    trunk, num_blocks = {}, len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    for number in range(num_blocks):
        trunk |= _read_block(tensors, number)
    norm = "fc_norm" if "fc_norm.weight" in tensors else "layernorm"
    trunk |= {f"norm.{key}": tensors[f"{norm}.{key}"] for key in ("weight", "bias") if f"{norm}.{key}" in tensors}
    dim = trunk["blocks.0.attn.qkv.weight"].shape[1]
    gelu = GELUS.get(config.get("hidden_act", family.gelu))
    if gelu is None:
        raise ValueError(f"{source}: its activation is {config['hidden_act']!r}; models here have {', '.join(GELUS)}")
    eps = float(config.get("layer_norm_eps", family.norm_eps))
    last_eps = 1e-5 if norm == "fc_norm" else 0.0  # torch's own, as VideoMAE's class gives it none
    model = measure_model(trunk, config.get("num_attention_heads") or max(1, dim // 64), gelu=gelu, norm_eps=eps, last_norm_eps=last_eps)
    _check_config(config, model)
    heads, left_out = _read_heads(tensors, config, family.modality)
    known = ("layers.", "embeddings.", "layernorm.", "fc_norm.", "classifier.", "cls_classifier.")
    rest = [name for name in tensors if not name.startswith((*known, *left_out))]
    left_out |= dict.fromkeys(rest, "no part of a Vision Transformer's forward pass here")
    return Pretrained(
        source=source,
        kind=family.kind,
        model=model,
        tokenizers={family.modality: _read_tokenizer(tensors, config, family)},
        trunk=trunk,
        heads=heads,
        left_out=left_out,
    )


def _check_config(config: Mapping[str, Any], model: Model) -> None:
    """Raise ValueError where config.json says other sizes than the weights have."""
    sizes = {"hidden_size": model.dim, "num_hidden_layers": model.depth, "intermediate_size": model.mlp_dim}
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise ValueError(f"config.json says {name} = {config[name]}, the weights have {size}")


def _rename(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for pattern, spelling in RENAMED:
        name = re.sub(pattern, spelling, name)
    return name


def _find_family(tensors: Tensors, config: Mapping[str, Any], source: str) -> Family:
    kernel = tensors["embeddings.patch_embeddings.projection.weight"]
    stem = "audio-spectrogram-transformer" if kernel.shape[1] == 1 else "deit" if "embeddings.distillation_token" in tensors else "vit"
    if kernel.ndim == 5:
        stem = "vivit" if "embeddings.cls_token" in tensors else "videomae"
    name = config.get("model_type", stem)
    if name not in FAMILIES:
        raise ValueError(f"{source}: its model_type is {name!r}; known are {', '.join(FAMILIES)}")
    if config.get("use_mean_pooling") is False:
        raise ValueError(f"{source}: use_mean_pooling = False reads the first tubelet's token, which heads here do not")
    return FAMILIES[name]


def _read_block(tensors: Tensors, number: int) -> Tensors:
    theirs, ours = f"layers.{number}.", f"blocks.{number}."
    found = {}
    weights = [tensors[f"{theirs}attention.{name}.weight"] for name in ("query", "key", "value")]
    # VideoMAE's keys have no bias; other models may have none at all.
    biases = [tensors.get(f"{theirs}attention.{name}.bias") for name in ("query", "key", "value")]
    short = [tensors.get(f"{theirs}attention.{name}_bias") for name in ("q", "k", "v")]
    zero = weights[0].new_zeros(len(weights[0]))
    found[f"{ours}attn.qkv.weight"] = torch.cat(weights)
    found[f"{ours}attn.qkv.bias"] = torch.cat(
        [next((one for one in pair if one is not None), zero) for pair in zip(biases, short, strict=True)]
    )
    for there, here in {
        "attention.proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }.items():
        found |= {f"{ours}{here}.{key}": tensors[f"{theirs}{there}.{key}"] for key in ("weight", "bias")}
    return found


def _read_tokenizer(tensors: Tensors, config: Mapping[str, Any], family: Family) -> TokenizerWeights:
    kernel, found = tensors["embeddings.patch_embeddings.projection.weight"], {}
    if family.is_turned:
        kernel = kernel.transpose(2, 3)
    found["weight"] = kernel.movedim(1, -1) if kernel.ndim == 5 else kernel.movedim(1, -1)[:, None]
    found["bias"] = tensors["embeddings.patch_embeddings.projection.bias"]
    class_tokens = [tensors[f"embeddings.{name}"] for name in ("cls_token", "distillation_token") if f"embeddings.{name}" in tensors]
    if class_tokens:
        found["cls_token"] = torch.cat(class_tokens, 1)
    stride = (1, int(config.get("time_stride", 10)), int(config.get("frequency_stride", 10))) if family.is_turned else None
    tubelets = _count_tubelets(tensors, config, tuple(found["weight"].shape[1:4]), stride, len(class_tokens))
    positions = tensors.get("embeddings.position_embeddings")
    if positions is not None:
        count = positions.shape[1] - len(class_tokens)
        if tubelets and math.prod(tubelets) != count:
            raise ValueError(f"its config.json means {' × '.join(map(str, tubelets))} tokens, there are {count} positions")
        found["pos_embed"] = _turn(positions, len(class_tokens), tubelets) if family.is_turned and tubelets else positions
    mean, std = _read_normalisation(config, family)
    return TokenizerWeights(
        tensors=found,
        tubelets=tubelets,
        token_stride=stride,
        num_class_tokens=len(class_tokens),
        pool="class_tokens" if family.is_turned or has_equal_heads(tensors, *CLASSIFIERS) else "cls" if class_tokens else "mean",
        positions="sinusoidal" if positions is None else "learned",
        mean=mean,
        std=std,
    )


def _count_tubelets(
    tensors: Tensors, config: Mapping[str, Any], sizes: tuple[int, ...], stride: tuple[int, int, int] | None, num_class_tokens: int
) -> tuple[int, int, int] | None:
    if stride:
        lengths = (1, int(config.get("max_length", 1024)), int(config.get("num_mel_bins", 128)))
        frames, rows, columns = ((length - size) // step + 1 for length, size, step in zip(lengths, sizes, stride, strict=True))
        return frames, rows, columns
    if config.get("image_size"):
        size = config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.get("num_frames", 1)) // sizes[0], height // sizes[1], width // sizes[2]
    positions = tensors.get("embeddings.position_embeddings")
    count = 0 if positions is None else positions.shape[1] - num_class_tokens
    side = math.isqrt(count)
    return (1, side, side) if sizes[0] == 1 and side and side * side == count else None


def _turn(positions: torch.Tensor, num_class_tokens: int, tubelets: tuple[int, int, int]) -> torch.Tensor:
    """Positions in the order (time, frequency) that were in the order (frequency, time)."""
    first, rest = positions[:, :num_class_tokens], positions[:, num_class_tokens:]
    _, rows, columns = tubelets
    return torch.cat([first, rest.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)], 1)


def _read_normalisation(config: Mapping[str, Any], family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    preprocessor = config.get("preprocessor") or {}
    if family.is_turned or "feature_extractor_type" in preprocessor:
        return (float(preprocessor.get("mean", AST_MEAN)),), (2 * float(preprocessor["std"]) if "std" in preprocessor else AST_STD,)
    mean, std = (tuple(255.0 * value for value in preprocessor.get(f"image_{name}") or (0.5,) * 3) for name in ("mean", "std"))
    return mean, std


def _read_heads(tensors: Tensors, config: Mapping[str, Any], modality: str) -> tuple[dict[str, HeadWeights], dict[str, str]]:
    names = config.get("id2label") or {}
    classes = tuple(str(names[key]) for key in sorted(names, key=int)) or None
    if classes and all(name == f"LABEL_{number}" for number, name in enumerate(classes)):
        classes = None  # what the library writes where nobody named them
    left_out = {
        name: "the head of the distillation token; heads here read one token"
        for name in tensors
        if "distillation_classifier" in name and not has_equal_heads(tensors, *CLASSIFIERS)
    }
    stem = next((stem for stem in ("classifier.dense", "cls_classifier", "classifier") if f"{stem}.weight" in tensors), None)
    if stem is None:
        return {}, left_out
    head = {key: tensors[f"{stem}.{key}"] for key in ("weight", "bias")}
    if classes and len(classes) != len(head["weight"]):
        raise ValueError(f"config.json names {len(classes)} classes, the head has {len(head['weight'])}")
    head |= {
        f"norm.{key}": tensors[f"classifier.layernorm.{key}"] for key in ("weight", "bias") if f"classifier.layernorm.{key}" in tensors
    }
    return {HEAD: HeadWeights(modality=modality, tensors=head, class_names=classes)}, left_out
