"""How the attention modules of torch, timm and transformers are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyvit_fast.drop_in.fused import read_member, unfit_member
from polyvit_fast.drop_in.members import (
    first_argument,
    hugging_face_input,
    not_identity,
    not_plain,
    read_drops,
    unfit_drops,
    unknown_members,
)
from polyvit_fast.drop_in.parts import Adapter, AttentionPart, Drop, NormPart
from polyvit_kernels import ops
from polyvit_kernels.layers import PLAIN, is_plain, is_untouched, project

HEAD_DIM_STEP, LARGEST_HEAD_DIM = 8, 128
"""Attention kernels take heads whose width is a multiple of the first, up to the second."""


def _unknown_heads(head_dim: int, scale: float) -> str:
    if head_dim % HEAD_DIM_STEP or head_dim > LARGEST_HEAD_DIM:
        return f"head_dim = {head_dim}, but kernels take multiples of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM}"
    return "" if abs(scale * head_dim**0.5 - 1) < 1e-6 else f"it scales scores by {scale:.4g}, not by head_dim ** -0.5"


def _pack(linears: tuple[Any, ...], x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Several linear layers of one input, concatenated: one product where all are plain, for weights are smaller than activations.

    Layers without a bias, such as VideoMAE's and EVA's keys, get one of zeros.
    """
    if packs(linears):
        biases = (linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears)
        return ops.linear(x, torch.cat([linear.weight for linear in linears]), torch.cat(list(biases)), shape)
    return torch.cat([linear(x) for linear in linears], -1).unflatten(-1, shape)


def packs(linears: tuple[Any, ...]) -> bool:
    """Whether such layers are computed as one."""
    return all(is_plain(linear) or _lacks_only_bias(linear) for linear in linears)


def _lacks_only_bias(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None and type(linear.weight) in PLAIN and is_untouched(linear)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A linear layer's function of parameters that belong to no such layer."""
    if bias is not None and type(weight) in PLAIN and type(bias) in PLAIN:
        return ops.linear(x, weight, bias, shape)
    return functional.linear(x, weight, bias).unflatten(-1, shape)


# torch


def _unknown_torch(m: Any) -> str:
    if not (m.batch_first and m._qkv_same_embed_dim) or m.bias_k is not None or m.add_zero_attn:
        return "it is not batch-first self-attention, or adds a key"
    return unknown_members(m, "in_proj_weight out_proj", "in_proj_bias") or _unknown_heads(m.head_dim, m.head_dim**-0.5)


def _unfit_torch(m: Any) -> str:
    return not_plain(m.out_proj, "out_proj")  # which torch does not call either


def _read_torch(m: Any) -> AttentionPart:
    pack = partial(_linear, m.in_proj_weight, m.in_proj_bias)
    return AttentionPart(pack, m.num_heads, m.head_dim, m.out_proj, True, (Drop(m.dropout, m.training),))


def _torch_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given.pop("query", None)
    given.pop("average_attn_weights", None)
    plain = given.pop("key", None) is x and given.pop("value", None) is x and given.pop("need_weights", True) is False
    return x if plain and not any(value is not None and value is not False for value in given.values()) else None


def _torch_note(_: Any) -> str:
    return "unless query, key and value are one tensor and need_weights=False"


# timm


def _unknown_timm(m: Any) -> str:
    if getattr(m, "num_kv_groups", 1) > 1:
        return "several queries use one key"
    members = unknown_members(m, "q_norm k_norm attn_drop proj proj_drop", "qkv q_proj k_proj v_proj q_bias k_bias v_bias norm")
    return members or _unknown_heads(m.head_dim, m.scale)


def _unfit_timm(m: Any) -> str:
    return (
        _unfit_head_norms(m)
        or not_identity(m, "the heads' outputs are normalised", "norm")
        or unfit_drops(m, "attn_drop", "proj_drop")
        or ("qkv is no nn.Linear" if getattr(m, "q_bias", None) is not None and type(m.qkv) is not torch.nn.Linear else "")
    )


def _has_head_norms(m: Any) -> bool:
    return bool(not_identity(m, "normalised", "q_norm", "k_norm"))


def _unfit_head_norms(m: Any) -> str:
    if not _has_head_norms(m):
        return ""
    return unfit_member(m.q_norm, "q_norm", NormPart) or unfit_member(m.k_norm, "k_norm", NormPart)


def _read_timm(m: Any) -> AttentionPart:
    linears = ()
    if getattr(m, "qkv", None) is None:
        linears = (m.q_proj, m.k_proj, m.v_proj)
        pack = partial(_pack, linears)
    elif getattr(m, "q_bias", None) is None:
        pack = partial(project, m.qkv)
    else:  # EVA, which itself reads the layer's weight and does not call the layer
        pack = partial(_linear, m.qkv.weight, torch.cat([m.q_bias, m.k_bias, m.v_bias]))
    norms = (read_member(m.q_norm), read_member(m.k_norm)) if _has_head_norms(m) else None
    drops = read_drops(m, "attn_drop", "proj_drop")
    return AttentionPart(pack, m.num_heads, m.head_dim, m.proj, False, drops, head_norms=norms, linears=linears)


# transformers


@dataclass(frozen=True)
class _AttentionNames:
    """What a class calls its projections, and its numbers."""

    proj: str | None = "o_proj"
    """None where the projection belongs to another module."""
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    num_heads: str = "num_attention_heads"
    head_dim: str = "head_dim"
    scale: str = "scaling"
    dropout: str = "attention_dropout"


def _unknown_hugging_face(names: _AttentionNames, m: Any) -> str:
    members = unknown_members(m, " ".join((*names.qkv, *([names.proj] if names.proj else []))))
    heads = members or _unknown_heads(getattr(m, names.head_dim), getattr(m, names.scale))
    return heads or ("it is causal" if m.is_causal else "")


def _unfit_hugging_face(m: Any) -> str:
    implementation = m.config._attn_implementation
    known = implementation in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
    return "" if known else f"its attention implementation is {implementation!r}"


def _read_hugging_face(names: _AttentionNames, m: Any) -> AttentionPart:
    linears = tuple(getattr(m, name) for name in names.qkv)
    heads, head_dim = getattr(m, names.num_heads), getattr(m, names.head_dim)
    proj = getattr(m, names.proj) if names.proj else None
    return AttentionPart(
        partial(_pack, linears), heads, head_dim, proj, True, (Drop(getattr(m, names.dropout), m.training),), linears=linears
    )


def _hugging_face_attention_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Eager attention returns its weights, which its caller may want; a fused block does not.
    return None if m.config._attn_implementation == "eager" else hugging_face_input(m, args, kwargs)


def _hugging_face_note(m: Any) -> str:
    return "outside a fused block, as eager attention returns its weights" if m.config._attn_implementation == "eager" else ""


TORCH_ATTENTION = Adapter(AttentionPart, _unknown_torch, _unfit_torch, _read_torch, _torch_input, note=_torch_note)
TIMM_ATTENTION = Adapter(AttentionPart, _unknown_timm, _unfit_timm, _read_timm, first_argument)
ROTARY_ATTENTION = replace(TIMM_ATTENTION, rotary=True)


def _hugging_face(names: _AttentionNames) -> Adapter:
    return Adapter(
        AttentionPart,
        partial(_unknown_hugging_face, names),
        _unfit_hugging_face,
        partial(_read_hugging_face, names),
        _hugging_face_attention_input,
        note=_hugging_face_note,
    )


HUGGING_FACE_ATTENTION = _hugging_face(_AttentionNames())
CLIP_ATTENTION = _hugging_face(_AttentionNames("out_proj", num_heads="num_heads", scale="scale", dropout="dropout"))
VIDEOMAE_ATTENTION = _hugging_face(
    _AttentionNames(None, ("query", "key", "value"), head_dim="attention_head_size", dropout="dropout_prob"),
)
