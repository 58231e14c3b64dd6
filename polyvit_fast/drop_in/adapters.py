"""Other libraries' modules that `fuse` knows: a row per class, found by the class's full name, so that no such library is imported.

A row tells why a module cannot be computed here, or reads what the operations need off it. Both happen at every call, so that whatever is
done to a model afterwards is seen: weights loaded, moved or sharded, adapters, hooks, dropout switched on.

| library | blocks | parts |
|---|---|---|
| torch | | LayerNorm, MultiheadAttention |
| timm | Block, EvaBlock | Attention; EvaAttention, AttentionRope (both without rotary positions); Mlp, LayerNorm |
| transformers 5 | ViT, ViViT, AST, DeiT, ViTMAE, ViTMSN, I-JEPA, DINOv2 (with and without registers) | their attention and MLP |
| torchvision | EncoderBlock | MLPBlock |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyvit_fast.drop_in.parts import Attention, Block, Drop, Mlp, Norm, Row, full_name, fused_row
from polyvit_fast.model.modules import PLAIN, has_hooks, is_plain, is_untouched, project
from polyvit_kernels import ops
from polyvit_kernels.ops import Gelu

HEAD_DIM_STEP, LARGEST_HEAD_DIM = 8, 128
"""Attention kernels take heads whose width is a multiple of the first, up to the second."""


def row_of(module: nn.Module) -> Row | None:
    """The row of the module's very class: a subclass may compute anything."""
    return ROWS.get(full_name(module))


def _first_argument(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    rest = [*args[1:], *kwargs.values()]
    return args[0] if args and all(value is None or value is False for value in rest) else None


def _unknown_members(module: Any, required: str, optional: str = "") -> str:
    """The class in another version may have grown a part that changes its value."""
    present = {name for members in (module._modules, module._parameters, module._buffers) for name in members if members[name] is not None}
    missing, extra = set(required.split()) - present, present - set(required.split()) - set(optional.split())
    if missing:
        return f"another version of the class: it lacks {', '.join(sorted(missing))}"
    return f"another version of the class: it has {', '.join(sorted(extra))}" if extra else ""


def _unknown_heads(head_dim: int, scale: float) -> str:
    if head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM:
        return f"head_dim = {head_dim}, but kernels take multiples of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM}"
    return "" if abs(scale * head_dim**0.5 - 1) < 1e-6 else f"it scales scores by {scale:.4g}, not by head_dim ** -0.5"


# What may stand in a module's places


def _not_identity(module: Any, meaning: str, *names: str) -> str:
    for name in names:
        part = getattr(module, name, None)
        if part is not None and not (type(part) is nn.Identity and is_untouched(part)):
            return f"{meaning} ({name} is a {type(part).__name__})"
    return ""


_DROP_PATH = "timm.layers.drop.DropPath"

_RATES: dict[str, Callable[[Any], float]] = {
    "torch.nn.modules.linear.Identity": lambda _: 0.0,
    "torch.nn.modules.dropout.Dropout": lambda m: m.p,
    _DROP_PATH: lambda m: m.drop_prob or 0.0,
    "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath": lambda m: m.drop_prob,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersDropPath": lambda m: m.drop_prob,
}


def _unfit_drops(module: Any, *names: str) -> str:
    for name in names:
        part = module._modules[name]
        if full_name(part) not in _RATES or not is_untouched(part):
            return f"{name} ({type(part).__name__}) is no plain dropout"
    return ""


def _drops(module: Any, *names: str) -> tuple[Drop, ...]:
    parts = [module._modules[name] for name in names]
    return tuple(Drop(_RATES[full_name(part)](part), part.training) for part in parts)


_GELUS: dict[str, Callable[[Any], Gelu]] = {
    "torch.nn.modules.activation.GELU": lambda m: "tanh" if m.approximate == "tanh" else "erf",
    "timm.layers.activations.GELU": lambda _: "erf",
    "timm.layers.activations.GELUTanh": lambda _: "tanh",
    "transformers.activations.GELUActivation": lambda _: "erf",
    "transformers.activations.GELUTanh": lambda _: "tanh",
    "transformers.activations.NewGELUActivation": lambda _: "tanh",
    "transformers.activations.FastGELUActivation": lambda _: "tanh",  # sqrt(2 / pi) to ten digits
    "transformers.activations.AccurateGELUActivation": lambda _: "tanh",
}


def _pack(linears: tuple[Any, ...], x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Several linear layers of one input, side by side: as one where all are plain, for weights are smaller than activations."""
    if all(is_plain(linear) for linear in linears):
        weight, bias = torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])
        return ops.linear(x, weight, bias, shape)
    return torch.cat([linear(x) for linear in linears], -1).unflatten(-1, shape)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A linear layer's function of parameters that belong to no such layer."""
    if bias is not None and type(weight) in PLAIN and type(bias) in PLAIN:
        return ops.linear(x, weight, bias, shape)
    return functional.linear(x, weight, bias).unflatten(-1, shape)


def _not_plain(linear: Any, name: str) -> str:
    return "" if is_plain(linear) else f"{name} ({type(linear).__name__}) is more than a linear layer with a bias, or less"


# Norms


def _unknown_norm(m: Any) -> str:
    if len(m.normalized_shape) != 1:
        return "it normalises over several axes"
    return "timm's fast norm, which rounds under autocast" if getattr(m, "_fast_norm", False) else ""


def _unfit_norm(m: Any) -> str:
    return "" if type(m.weight) in PLAIN and type(m.bias) in PLAIN else "its weight or bias is missing or no plain tensor"


def _read_norm(m: Any) -> Norm:
    return Norm(m.weight, m.bias, m.eps)


# Attention of torch


def _unknown_torch_attention(m: Any) -> str:
    if not (m.batch_first and m._qkv_same_embed_dim) or m.bias_k is not None or m.add_zero_attn:
        return "it is not batch-first self-attention, or adds a key"
    return _unknown_members(m, "in_proj_weight out_proj", "in_proj_bias") or _unknown_heads(m.head_dim, m.head_dim**-0.5)


def _unfit_torch_attention(m: Any) -> str:
    return _not_plain(m.out_proj, "out_proj")  # which torch does not call either


def _read_torch_attention(m: Any) -> Attention:
    pack = partial(_linear, m.in_proj_weight, m.in_proj_bias)
    return Attention(pack, m.num_heads, m.out_proj, True, (Drop(m.dropout, m.training),))


def _torch_attention_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given.pop("query", None)
    given.pop("average_attn_weights", None)
    plain = given.pop("key", None) is x and given.pop("value", None) is x and given.pop("need_weights", True) is False
    return x if plain and not any(value is not None and value is not False for value in given.values()) else None


def _torch_attention_note(_: Any) -> str:
    return "unless query, key and value are one tensor and need_weights=False"


# Attention of timm


def _unknown_timm_attention(m: Any) -> str:
    if getattr(m, "num_kv_groups", 1) > 1:
        return "several queries share a key"
    members = _unknown_members(m, "q_norm k_norm attn_drop proj proj_drop", "qkv q_proj k_proj v_proj q_bias k_bias v_bias norm")
    return members or _unknown_heads(m.head_dim, m.scale)


def _unfit_timm_attention(m: Any) -> str:
    return (
        _not_identity(m, "queries and keys are normalised", "q_norm", "k_norm")
        or _not_identity(m, "the heads' outputs are normalised", "norm")
        or _unfit_drops(m, "attn_drop", "proj_drop")
        or ("qkv is no nn.Linear" if getattr(m, "q_bias", None) is not None and type(m.qkv) is not nn.Linear else "")
    )


def _read_timm_attention(m: Any) -> Attention:
    if getattr(m, "qkv", None) is None:
        pack = partial(_pack, (m.q_proj, m.k_proj, m.v_proj))
    elif getattr(m, "q_bias", None) is None:
        pack = partial(project, m.qkv)
    else:  # EVA: as there, the layer's weight is read and the layer not called
        pack = partial(_linear, m.qkv.weight, torch.cat([m.q_bias, m.k_bias, m.v_bias]))
    return Attention(pack, m.num_heads, m.proj, False, _drops(m, "attn_drop", "proj_drop"))


# Attention of transformers


def _unknown_hugging_face_attention(m: Any) -> str:
    members = _unknown_members(m, "q_proj k_proj v_proj o_proj")
    return members or _unknown_heads(m.head_dim, m.scaling) or ("it is causal" if m.is_causal else "")


def _unfit_hugging_face_attention(m: Any) -> str:
    implementation = m.config._attn_implementation
    known = implementation in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
    return "" if known else f"its attention implementation is {implementation!r}"


def _read_hugging_face_attention(m: Any) -> Attention:
    pack = partial(_pack, (m.q_proj, m.k_proj, m.v_proj))
    return Attention(pack, m.num_attention_heads, m.o_proj, True, (Drop(m.attention_dropout, m.training),))


def _hugging_face_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Hidden states are collected by hooks on the blocks, whoever computes them.
    return _first_argument(m, args, {name: value for name, value in kwargs.items() if name != "output_hidden_states"})


def _hugging_face_attention_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Eager attention returns its weights, which its caller may want; a fused block does not.
    return None if m.config._attn_implementation == "eager" else _hugging_face_input(m, args, kwargs)


def _hugging_face_attention_note(m: Any) -> str:
    return "outside a fused block, as eager attention returns its weights" if m.config._attn_implementation == "eager" else ""


def _hugging_face_block_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Activation checkpointing is part of the class's own `forward`.
    return None if m.gradient_checkpointing and m.training else _hugging_face_input(m, args, kwargs)


# MLPs


@dataclass(frozen=True)
class _MlpNames:
    """What an MLP calls its parts, dropouts, and a norm that must not be there."""

    fc1: str
    activation: str
    fc2: str
    drops: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def _unknown_mlp(names: _MlpNames, m: Any) -> str:
    return _unknown_members(m, " ".join((names.fc1, names.activation, names.fc2, *names.drops)), " ".join(names.norms))


def _unfit_mlp(names: _MlpNames, m: Any) -> str:
    activation = m._modules[names.activation]
    if full_name(activation) not in _GELUS or not is_untouched(activation):
        return f"its activation {type(activation).__name__} is neither GELU nor GELU's tanh form, or has hooks"
    return (
        _not_identity(m, "the hidden layer is normalised", *names.norms)
        or _not_plain(m._modules[names.fc1], names.fc1)
        or _not_plain(m._modules[names.fc2], names.fc2)
        or _unfit_drops(m, *names.drops)
    )


def _read_mlp(names: _MlpNames, m: Any) -> Mlp:
    activation = m._modules[names.activation]
    return Mlp(m._modules[names.fc1], m._modules[names.fc2], _GELUS[full_name(activation)](activation), _drops(m, *names.drops))


# Blocks


@dataclass(frozen=True)
class _BlockNames:
    """What a block calls its branches, in the order of their use, its dropouts, and what scales a branch, which must not be there."""

    branches: tuple[str, str, str, str]
    drops: tuple[str, ...]
    scales: tuple[str, ...] = ()


def _unknown_block(names: _BlockNames, m: Any) -> str:
    return _unknown_members(m, " ".join((*names.branches, *names.drops)), " ".join(names.scales))


def _unfit_block(names: _BlockNames, m: Any) -> str:
    reason = _not_identity(m, "LayerScale", *names.scales) or _unfit_drops(m, *names.drops)
    for name, kind in zip(names.branches, (Norm, Attention, Norm, Mlp), strict=True):
        reason = reason or _unfit_branch(m._modules[name], name, kind)
    return reason


def _unfit_branch(part: nn.Module, name: str, kind: type) -> str:
    row = fused_row(part)
    if row is None or row.kind is not kind:
        return f"{name}: {type(part).__name__} is left"
    reason = "it has hooks" if has_hooks(part) else row.unfit(part)
    return f"{name}: {reason}" if reason else ""


def _read_block(names: _BlockNames, m: Any) -> Block:
    norm1, attention, norm2, mlp = parts = [_read_branch(m._modules[name]) for name in names.branches]
    paths = {name: m._modules[name] for name in names.drops if full_name(m._modules[name]) == _DROP_PATH}
    drops = _drops(m, *(name for name in names.drops if name not in paths))
    # Of classes that have drop path, one for each branch.
    first, second = (path if path and path.training and path.drop_prob else None for path in map(paths.get, _TIMM_DROPS))
    return Block(norm1, attention, norm2, mlp, drops + tuple(drop for part in parts for drop in part.drops), (first, second))


def _read_branch(part: nn.Module) -> Any:
    row: Any = fused_row(part)
    return row.read(part)


# The table


def _mlp(names: _MlpNames, sole_input: Any = _first_argument) -> Row:
    return Row(Mlp, partial(_unknown_mlp, names), partial(_unfit_mlp, names), partial(_read_mlp, names), sole_input)


def _block(names: _BlockNames, sole_input: Any = _first_argument, rotary: bool = False) -> Row:
    return Row(Block, partial(_unknown_block, names), partial(_unfit_block, names), partial(_read_block, names), sole_input, rotary)


def _hugging_face(package: str, prefix: str, block: Row) -> dict[str, Row]:
    path = f"transformers.models.{package}.modeling_{package}.{prefix}"
    return {f"{path}Attention": _HF_ATTENTION, f"{path}MLP": _HF_MLP, f"{path}Layer": block}


_LAYER_NORM = Row(Norm, _unknown_norm, _unfit_norm, _read_norm, _first_argument)
_TORCH_ATTENTION = Row(
    Attention,
    _unknown_torch_attention,
    _unfit_torch_attention,
    _read_torch_attention,
    _torch_attention_input,
    note=_torch_attention_note,
)
_TIMM_ATTENTION = Row(Attention, _unknown_timm_attention, _unfit_timm_attention, _read_timm_attention, _first_argument)
_ROTARY_ATTENTION = replace(_TIMM_ATTENTION, rotary=True)
_TIMM_MLP = _mlp(_MlpNames("fc1", "act", "fc2", ("drop1", "drop2"), ("norm",)))
_TIMM_BRANCHES, _TIMM_DROPS = ("norm1", "attn", "norm2", "mlp"), ("drop_path1", "drop_path2")
_TIMM_BLOCK = _block(_BlockNames(_TIMM_BRANCHES, _TIMM_DROPS, ("ls1", "ls2")))
_EVA_BLOCK = _block(_BlockNames(_TIMM_BRANCHES, _TIMM_DROPS, ("gamma_1", "gamma_2")), rotary=True)
_TORCHVISION_MLP = _mlp(_MlpNames("0", "1", "3", ("2", "4")))
_TORCHVISION_BLOCK = _block(_BlockNames(("ln_1", "self_attention", "ln_2", "mlp"), ("dropout",)))
_HF_ATTENTION = Row(
    Attention,
    _unknown_hugging_face_attention,
    _unfit_hugging_face_attention,
    _read_hugging_face_attention,
    _hugging_face_attention_input,
    note=_hugging_face_attention_note,
)
_HF_MLP = _mlp(_MlpNames("fc1", "activation_fn", "fc2"), _hugging_face_input)
_HF_BRANCHES, _DINO_BRANCHES = ("layernorm_before", "attention", "layernorm_after", "mlp"), ("norm1", "attention", "norm2", "mlp")
_HF_BLOCK = _block(_BlockNames(_HF_BRANCHES, ("dropout",)), _hugging_face_block_input)
_DINO_BLOCK = _block(_BlockNames(_DINO_BRANCHES, ("drop_path",), ("layer_scale1", "layer_scale2")), _hugging_face_block_input)

ROWS: dict[str, Row] = {
    "torch.nn.modules.normalization.LayerNorm": _LAYER_NORM,
    "torch.nn.modules.activation.MultiheadAttention": _TORCH_ATTENTION,
    "timm.layers.norm.LayerNorm": _LAYER_NORM,
    "timm.layers.attention.Attention": _TIMM_ATTENTION,
    "timm.models.vision_transformer.Attention": _TIMM_ATTENTION,  # where older versions have it
    "timm.layers.attention.AttentionRope": _ROTARY_ATTENTION,
    "timm.models.eva.EvaAttention": _ROTARY_ATTENTION,
    "timm.layers.mlp.Mlp": _TIMM_MLP,
    "timm.models.vision_transformer.Block": _TIMM_BLOCK,
    "timm.models.eva.EvaBlock": _EVA_BLOCK,
    **_hugging_face("vit", "ViT", _HF_BLOCK),
    **_hugging_face("vivit", "Vivit", _HF_BLOCK),
    **_hugging_face("audio_spectrogram_transformer", "AST", _HF_BLOCK),
    **_hugging_face("deit", "DeiT", _HF_BLOCK),
    **_hugging_face("vit_mae", "ViTMAE", _HF_BLOCK),
    **_hugging_face("vit_msn", "ViTMSN", _HF_BLOCK),
    **_hugging_face("ijepa", "IJepa", _HF_BLOCK),
    **_hugging_face("dinov2", "Dinov2", _DINO_BLOCK),
    **_hugging_face("dinov2_with_registers", "Dinov2WithRegisters", _DINO_BLOCK),
    "torchvision.models.vision_transformer.MLPBlock": _TORCHVISION_MLP,
    "torchvision.models.vision_transformer.EncoderBlock": _TORCHVISION_BLOCK,
}
