"""A task as Hugging Face's ViT, DeiT, ViViT, VideoMAE or AST: the folder that `from_pretrained` loads, with names of transformers 4 and 5.

Which of them it is follows from what the model does: how many frames, class tokens and norms it has, and what its head reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyvit_fast.model.export.plain import Converted, PlainViT, find_unit_levels, make_contiguous
from polyvit_fast.model.pretrained.weights import Tensors

LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Layers of a block here, and there."""
TOKENS = ("cls_token", "distillation_token")
GELUS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One of the library's model types, and what a model must be like that it can hold."""

    name: str
    model_type: str
    prefix: str
    """Before the names of its tensors, where it has a head."""
    classifier: str
    """Its class with a head."""
    bare: str
    """Its class without one."""
    describe_input: Callable[[PlainViT, int], dict[str, Any]]
    """The fields of config.json for the grid, given the number of channels."""
    one_frame: bool | None = True
    """None: any number."""
    num_class_tokens: int = 1
    pool: str = "cls"
    """What its head reads: cls, class_tokens (several) or mean."""
    normalises_in_head: bool = False
    may_overlap: bool = False
    has_fixed_positions: bool = False
    takes_one_channel: bool = False
    last_norm: str = "layernorm"
    last_norm_eps: float | None = None
    """None: that of all its norms."""


def convert(vit: PlainViT) -> Converted:
    """The model in the first of the library's forms that holds it. Raises ValueError that says what keeps it out of the nearest."""
    reasons = {}
    for shape in SHAPES:
        reasons[shape.name] = _find_faults(vit, shape)
        if not reasons[shape.name]:
            return _convert(vit, shape)
    fewest = min(map(len, reasons.values()))
    close = {name: faults for name, faults in reasons.items() if len(faults) == fewest}
    listed = ", or ".join(f"{name}, but {' and '.join(faults)}" for name, faults in close.items())
    raise ValueError(f"no class of Hugging Face's transformers computes what this model does; the nearest is {listed}")


def _convert(vit: PlainViT, shape: Shape) -> Converted:
    own, weight = vit.tensors, vit.merge_channels()
    tensors: Tensors = {}
    for name, token in zip(TOKENS, vit.class_tokens, strict=False):
        tensors[f"embeddings.{name}"] = token
    if shape is not VIDEO_MAE:
        tensors["embeddings.position_embeddings"] = _turn(own["pos_embed"], vit) if shape is AST else own["pos_embed"]
    tensors["embeddings.patch_embeddings.projection.weight"] = _lay_out_kernel(weight, shape)
    tensors["embeddings.patch_embeddings.projection.bias"] = own["bias"]
    for number in range(vit.model.depth):
        tensors |= _write_block(own, number, has_key_bias=shape is not VIDEO_MAE)
    if shape.last_norm == "layernorm":
        tensors |= {f"layernorm.{key}": own[f"norm.{key}"] for key in ("weight", "bias")}
    if vit.head:
        tensors = {f"{shape.prefix}.{name}": tensor for name, tensor in tensors.items()} | _write_head(vit, shape)
    channels = weight.shape[4]
    configs = {"config.json": _make_config(vit, shape, channels)}
    if vit.preprocessing.hugging_face:
        configs["preprocessor_config.json"] = vit.preprocessing.hugging_face | _describe_normalisation(vit, channels)
    return Converted(tensors=make_contiguous(tensors), configs=configs, remarks=_list_remarks(vit, shape))


def _write_block(own: Tensors, number: int, *, has_key_bias: bool) -> Tensors:
    ours, theirs = f"blocks.{number}.", f"encoder.layer.{number}."
    attention = f"{theirs}attention.attention."
    weights, biases = (own[f"{ours}attn.qkv.{key}"].chunk(3) for key in ("weight", "bias"))
    block = {f"{attention}{name}.weight": part for name, part in zip(("query", "key", "value"), weights, strict=True)}
    if has_key_bias:
        block |= {f"{attention}{name}.bias": part for name, part in zip(("query", "key", "value"), biases, strict=True)}
    else:
        block |= {f"{attention}q_bias": biases[0], f"{attention}v_bias": biases[2]}
    for here, there in LAYERS.items():
        block |= {f"{theirs}{there}.{key}": own[f"{ours}{here}.{key}"] for key in ("weight", "bias")}
    return block


def _write_head(vit: PlainViT, shape: Shape) -> Tensors:
    assert vit.head
    head = vit.head.tensors
    if shape is AST:
        found = {f"classifier.dense.{key}": head[key] for key in ("weight", "bias")}
        return found | {f"classifier.layernorm.{key}": head[f"norm.{key}"] for key in ("weight", "bias")}
    if shape is DEIT_OF_TWO:  # the mean of two equal heads' logits is that of the tokens' mean
        names = ("cls_classifier", "distillation_classifier")
        return {f"{name}.{key}": head[key] for name in names for key in ("weight", "bias")}
    found = {f"classifier.{key}": head[key] for key in ("weight", "bias")}
    if shape.last_norm != "layernorm":
        found |= {f"{shape.last_norm}.{key}": vit.tensors[f"norm.{key}"] for key in ("weight", "bias")}
    return found


def _lay_out_kernel(weight: Tensor, shape: Shape) -> Tensor:
    if shape is AST:
        return weight[:, 0].movedim(-1, 1).transpose(2, 3)  # its rows are our columns: frequencies
    return weight.movedim(-1, 1) if shape in (VIVIT, VIDEO_MAE) else weight[:, 0].movedim(-1, 1)


def _turn(positions: Tensor, vit: PlainViT) -> Tensor:
    """Positions in the order (columns, rows) that are in the order (rows, columns)."""
    first, rest = positions.tensor_split([vit.grid.num_class_tokens], 1)
    _, rows, columns = vit.grid.tubelets
    return torch.cat([first, rest.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)], 1)


def _make_config(vit: PlainViT, shape: Shape, channels: int) -> dict[str, Any]:
    model = vit.model
    classes = vit.class_names or [f"LABEL_{number}" for number in range(vit.num_classes)]
    labels = {
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": "multi_label_classification" if vit.loss == "sigmoid" else "single_label_classification",
    }
    return {
        "architectures": [shape.classifier if vit.head else shape.bare],
        "model_type": shape.model_type,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": GELUS[model.gelu],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm_eps,
        "qkv_bias": True,
        **shape.describe_input(vit, channels),
        **(labels if vit.head else {}),
        "dtype": str(vit.tensors["weight"].dtype).removeprefix("torch."),
    }


def _describe_normalisation(vit: PlainViT, channels: int) -> dict[str, Any]:
    mean, std = (values[:channels] for values in vit.grid.normalisation)
    if "feature_extractor_type" in vit.preprocessing.hugging_face:
        return {"mean": mean[0], "std": std[0] / 2}  # it divides by twice its std
    return {"image_mean": find_unit_levels(mean), "image_std": find_unit_levels(std)}


def _list_remarks(vit: PlainViT, shape: Shape) -> list[str]:
    found = {
        "The fixed sines and cosines of the positions are weights here.": vit.grid.positions == "sinusoidal" and shape is not VIDEO_MAE,
        "VideoMAE has no biases of keys. They are left out: attention does not depend on them.": shape is VIDEO_MAE,
        "Both heads of the model are the run's one head, which reads the mean of both tokens.": shape is DEIT_OF_TWO,
    }
    return vit.describe_merging() + [text for text, is_so in found.items() if is_so]


def _square(sizes: tuple[int, ...]) -> int | list[int]:
    rows, columns = sizes
    return rows if rows == columns else [rows, columns]


def _describe_picture(vit: PlainViT, channels: int) -> dict[str, Any]:
    size, patch = _square(vit.grid.sizes[1:3]), _square(vit.grid.tubelet[1:])
    return {"image_size": size, "patch_size": patch, "num_channels": channels}


def _describe_clip(vit: PlainViT, channels: int) -> dict[str, Any]:
    size = _square(vit.grid.sizes[1:3])
    return {"image_size": size, "num_frames": vit.grid.sizes[0], "tubelet_size": list(vit.grid.tubelet), "num_channels": channels}


def _describe_masked_clip(vit: PlainViT, channels: int) -> dict[str, Any]:
    frames, patch = vit.grid.tubelet[0], _square(vit.grid.tubelet[1:])
    own = {"tubelet_size": frames, "patch_size": patch, "qv_bias": True, "use_mean_pooling": vit.head is not None}
    return _describe_clip(vit, channels) | own


def _describe_spectrogram(vit: PlainViT, channels: int) -> dict[str, Any]:
    _, rows, columns, _ = vit.grid.sizes
    _, time_stride, frequency_stride = vit.grid.token_stride
    sizes = {"max_length": rows, "num_mel_bins": columns, "patch_size": vit.grid.tubelet[1]}
    return sizes | {"time_stride": time_stride, "frequency_stride": frequency_stride}


def _count_tokens(number: int) -> str:
    return f"{number or 'no'} class token{'s' * (number != 1)}"


def _find_faults(vit: PlainViT, shape: Shape) -> list[str]:
    """In what the model differs from what the library's class computes."""
    grid, several = vit.grid, vit.reads_mean_of_class_tokens
    reads = "class_tokens" if several else "cls" if grid.pool == "class_tokens" else grid.pool
    eps = shape.last_norm_eps or vit.model.norm_eps
    faults = {
        f"it takes {'one picture' if shape.one_frame else 'several frames'}": shape.one_frame not in (None, grid.sizes[0] == 1),
        f"it has {_count_tokens(shape.num_class_tokens)}, not {grid.num_class_tokens}": shape.num_class_tokens != grid.num_class_tokens,
        f"its head reads {shape.pool}, not {reads}": shape.pool != reads,
        "its head normalises what it reads (head_norm)": shape.normalises_in_head and vit.head and not vit.has_head_norm,
        "its head has no norm of its own (head_norm)": vit.has_head_norm and not shape.normalises_in_head,
        "its tokens do not overlap": grid.token_stride != grid.tubelet and not shape.may_overlap,
        "its positions are fixed, not learned": shape.has_fixed_positions and grid.positions != "sinusoidal",
        f"it takes one channel, not {grid.sizes[3]}": shape.takes_one_channel and vit.merge_channels().shape[4] != 1,
        "its patches are square": shape.may_overlap and grid.tubelet[1] != grid.tubelet[2],
        f"its last norm has an eps of {eps:g}, not {vit.last_norm_eps:g} (last_norm_eps)": eps != vit.last_norm_eps,
    }
    return [text for text, is_fault in faults.items() if is_fault]


VIT = Shape(
    name="ViT", model_type="vit", prefix="vit", classifier="ViTForImageClassification", bare="ViTModel", describe_input=_describe_picture
)
DEIT = Shape(
    name="DeiT",
    model_type="deit",
    prefix="deit",
    classifier="DeiTForImageClassification",
    bare="DeiTModel",
    describe_input=_describe_picture,
    num_class_tokens=2,
)
DEIT_OF_TWO = replace(DEIT, name="DeiT with two heads", classifier="DeiTForImageClassificationWithTeacher", pool="class_tokens")
VIVIT = Shape(
    name="ViViT",
    model_type="vivit",
    prefix="vivit",
    classifier="VivitForVideoClassification",
    bare="VivitModel",
    describe_input=_describe_clip,
    one_frame=False,
)
VIDEO_MAE = Shape(
    name="VideoMAE",
    model_type="videomae",
    prefix="videomae",
    classifier="VideoMAEForVideoClassification",
    bare="VideoMAEModel",
    describe_input=_describe_masked_clip,
    one_frame=None,
    num_class_tokens=0,
    pool="mean",
    has_fixed_positions=True,
    last_norm="fc_norm",
    last_norm_eps=1e-5,  # PyTorch's own, as its class gives this norm none
)
AST = Shape(
    name="AST",
    model_type="audio-spectrogram-transformer",
    prefix="audio_spectrogram_transformer",
    classifier="ASTForAudioClassification",
    bare="ASTModel",
    describe_input=_describe_spectrogram,
    num_class_tokens=2,
    pool="class_tokens",
    normalises_in_head=True,
    may_overlap=True,
    takes_one_channel=True,
)
SHAPES = (VIT, DEIT, VIVIT, VIDEO_MAE, AST, DEIT_OF_TWO)
"""In the order in which they are tried."""
