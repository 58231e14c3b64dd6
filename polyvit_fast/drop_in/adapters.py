"""Other libraries' modules that `fuse` knows: an adapter per class, found by the class's full name, so that no library is imported.

An adapter says why a module cannot be computed here, or reads from it what the operations need. Both happen at every call, so that
whatever is done to a model later takes effect: weights loaded, moved or sharded, LoRA put in, hooks, dropout switched on.

| library | blocks | parts |
|---|---|---|
| torch | | LayerNorm, MultiheadAttention |
| timm | Block, EvaBlock | Attention; EvaAttention, AttentionRope (both without rotary positions); Mlp, LayerNorm |
| transformers 5 | ViT, ViViT, AST, DeiT, ViTMAE, ViTMSN, I-JEPA | their attention and MLP |
| | DINOv2 (with and without registers), CLIP, SigLIP, SigLIP2 | the same |
| | VideoMAE | its attention |
| torchvision | EncoderBlock | MLPBlock |

To add the classes of a ViT of your own, give the names of their members, and let `verify` compare what is computed:

    ADAPTERS["my_vit.FeedForward"] = mlp_adapter(MlpNames("up", "act", "down"))
    ADAPTERS["my_vit.Layer"] = block_adapter(BlockNames(("norm_1", "attention", "norm_2", "feed_forward")))
    fuse(model, verify=batch)

A block is fused when all its parts are: an attention class of your own needs an `Adapter` as those in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from polyvit_fast.drop_in import videomae
from polyvit_fast.drop_in.attention import (
    CLIP_ATTENTION,
    HUGGING_FACE_ATTENTION,
    ROTARY_ATTENTION,
    TIMM_ATTENTION,
    TORCH_ATTENTION,
    VIDEOMAE_ATTENTION,
)
from polyvit_fast.drop_in.fused import read_member, unfit_member
from polyvit_fast.drop_in.members import (
    DROP_PATH,
    first_argument,
    full_name,
    hugging_face_block_input,
    hugging_face_input,
    not_identity,
    not_plain,
    read_drops,
    read_gelu,
    read_scale,
    unfit_drops,
    unfit_gelu,
    unfit_scales,
    unknown_members,
)
from polyvit_fast.drop_in.parts import Adapter, AttentionPart, BlockPart, MlpPart, NormPart
from polyvit_kernels.layers import PLAIN

SoleInput = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""See `Adapter`."""


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the module's very class: a subclass may compute anything."""
    return ADAPTERS.get(full_name(module))


# Norms


def _unknown_norm(m: Any) -> str:
    if len(m.normalized_shape) != 1:
        return "it normalises over several axes"
    return "timm's fast norm, which rounds under autocast" if getattr(m, "_fast_norm", False) else ""


def _unfit_norm(m: Any) -> str:
    return "" if type(m.weight) in PLAIN and type(m.bias) in PLAIN else "its weight or bias is missing or no plain tensor"


def _read_norm(m: Any) -> NormPart:
    return NormPart(m.weight, m.bias, m.eps)


# MLPs


@dataclass(frozen=True)
class MlpNames:
    """What an MLP calls its layers, its dropouts, and a norm that must not be there."""

    fc1: str
    activation: str
    fc2: str
    drops: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def mlp_adapter(names: MlpNames, sole_input: SoleInput = first_argument) -> Adapter:
    """Of a class that computes fc2(gelu(fc1(x)))."""
    return Adapter(MlpPart, partial(_unknown_mlp, names), partial(_unfit_mlp, names), partial(_read_mlp, names), sole_input)


def _unknown_mlp(names: MlpNames, m: Any) -> str:
    return unknown_members(m, " ".join((names.fc1, names.activation, names.fc2, *names.drops)), " ".join(names.norms))


def _unfit_mlp(names: MlpNames, m: Any) -> str:
    return (
        unfit_gelu(getattr(m, names.activation))
        or not_identity(m, "the hidden layer is normalised", *names.norms)
        or not_plain(getattr(m, names.fc1), names.fc1)
        or not_plain(getattr(m, names.fc2), names.fc2)
        or unfit_drops(m, *names.drops)
    )


def _read_mlp(names: MlpNames, m: Any) -> MlpPart:
    return MlpPart(getattr(m, names.fc1), getattr(m, names.fc2), read_gelu(getattr(m, names.activation)), read_drops(m, *names.drops))


# Blocks


@dataclass(frozen=True)
class BlockNames:
    """What a block calls norm, attention, norm and MLP, its dropouts, and the LayerScales of both branches, which need not be there."""

    branches: tuple[str, str, str, str]
    drops: tuple[str, ...] = ()
    scales: tuple[()] | tuple[str, str] = ()


def block_adapter(names: BlockNames, sole_input: SoleInput = first_argument, rotary: bool = False) -> Adapter:
    """Of a class that computes x + attention(norm1(x)), then x + mlp(norm2(x))."""
    return Adapter(BlockPart, partial(_unknown_block, names), partial(_unfit_block, names), partial(_read_block, names), sole_input, rotary)


def _unknown_block(names: BlockNames, m: Any) -> str:
    return unknown_members(m, " ".join((*names.branches, *names.drops)), " ".join(names.scales))


def _unfit_block(names: BlockNames, m: Any) -> str:
    reason = unfit_scales(m, *names.scales) or unfit_drops(m, *names.drops)
    for name, kind in zip(names.branches, (NormPart, AttentionPart, NormPart, MlpPart), strict=True):
        reason = reason or unfit_member(getattr(m, name), name, kind)
    return reason


def _read_block(names: BlockNames, m: Any) -> BlockPart:
    norm1, attention, norm2, mlp = parts = [read_member(getattr(m, name)) for name in names.branches]
    paths = {name: getattr(m, name) for name in names.drops if full_name(getattr(m, name)) == DROP_PATH}
    drops = read_drops(m, *(name for name in names.drops if name not in paths))
    # Of classes that have drop path, one for each branch.
    first, second = (path if path and path.training and path.drop_prob else None for path in map(paths.get, _TIMM_DROPS))
    drops += tuple(drop for part in parts for drop in part.drops)
    scale1, scale2 = (read_scale(m, name) for name in names.scales or ("", ""))
    return BlockPart(norm1, attention, norm2, mlp, drops, (first, second), (scale1, scale2))


# The table


def _hugging_face(package: str, prefix: str, block: Adapter) -> dict[str, Adapter]:
    path = f"transformers.models.{package}.modeling_{package}.{prefix}"
    return {f"{path}Attention": HUGGING_FACE_ATTENTION, f"{path}MLP": _HUGGING_FACE_MLP, f"{path}Layer": block}


def _clip(package: str, prefix: str) -> dict[str, Adapter]:
    path = f"transformers.models.{package}.modeling_{package}.{prefix}"
    return {f"{path}Attention": CLIP_ATTENTION, f"{path}MLP": _HUGGING_FACE_MLP, f"{path}EncoderLayer": _CLIP_BLOCK}


_LAYER_NORM = Adapter(NormPart, _unknown_norm, _unfit_norm, _read_norm, first_argument)
_TIMM_MLP = mlp_adapter(MlpNames("fc1", "act", "fc2", ("drop1", "drop2"), ("norm",)))
_TIMM_BRANCHES, _TIMM_DROPS = ("norm1", "attn", "norm2", "mlp"), ("drop_path1", "drop_path2")
_TIMM_BLOCK = block_adapter(BlockNames(_TIMM_BRANCHES, _TIMM_DROPS, ("ls1", "ls2")))
_EVA_BLOCK = block_adapter(BlockNames(_TIMM_BRANCHES, _TIMM_DROPS, ("gamma_1", "gamma_2")), rotary=True)
_TORCHVISION_MLP = mlp_adapter(MlpNames("0", "1", "3", ("2", "4")))
_TORCHVISION_BLOCK = block_adapter(BlockNames(("ln_1", "self_attention", "ln_2", "mlp"), ("dropout",)))
_HUGGING_FACE_MLP = mlp_adapter(MlpNames("fc1", "activation_fn", "fc2"), hugging_face_input)
_HUGGING_FACE_BLOCK = block_adapter(
    BlockNames(("layernorm_before", "attention", "layernorm_after", "mlp"), ("dropout",)), hugging_face_block_input
)
_CLIP_BLOCK = block_adapter(BlockNames(("layer_norm1", "self_attn", "layer_norm2", "mlp")), hugging_face_block_input)
_DINO_BLOCK = block_adapter(
    BlockNames(("norm1", "attention", "norm2", "mlp"), ("drop_path",), ("layer_scale1", "layer_scale2")), hugging_face_block_input
)

ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.normalization.LayerNorm": _LAYER_NORM,
    "torch.nn.modules.activation.MultiheadAttention": TORCH_ATTENTION,
    "timm.layers.norm.LayerNorm": _LAYER_NORM,
    "timm.layers.attention.Attention": TIMM_ATTENTION,
    "timm.models.vision_transformer.Attention": TIMM_ATTENTION,  # where older versions have it
    "timm.layers.attention.AttentionRope": ROTARY_ATTENTION,
    "timm.models.eva.EvaAttention": ROTARY_ATTENTION,
    "timm.layers.mlp.Mlp": _TIMM_MLP,
    "timm.models.vision_transformer.Block": _TIMM_BLOCK,
    "timm.models.eva.EvaBlock": _EVA_BLOCK,
    **_hugging_face("vit", "ViT", _HUGGING_FACE_BLOCK),
    **_hugging_face("vivit", "Vivit", _HUGGING_FACE_BLOCK),
    **_hugging_face("audio_spectrogram_transformer", "AST", _HUGGING_FACE_BLOCK),
    **_hugging_face("deit", "DeiT", _HUGGING_FACE_BLOCK),
    **_hugging_face("vit_mae", "ViTMAE", _HUGGING_FACE_BLOCK),
    **_hugging_face("vit_msn", "ViTMSN", _HUGGING_FACE_BLOCK),
    **_hugging_face("ijepa", "IJepa", _HUGGING_FACE_BLOCK),
    **_hugging_face("dinov2", "Dinov2", _DINO_BLOCK),
    **_hugging_face("dinov2_with_registers", "Dinov2WithRegisters", _DINO_BLOCK),
    **_clip("clip", "CLIP"),
    **_clip("siglip", "Siglip"),
    **_clip("siglip2", "Siglip2"),
    f"{videomae.MODELING}.VideoMAESelfAttention": VIDEOMAE_ATTENTION,
    f"{videomae.MODELING}.VideoMAEAttention": videomae.VIDEOMAE_PROJECTED_ATTENTION,
    f"{videomae.MODELING}.VideoMAELayer": videomae.VIDEOMAE_BLOCK,
    "torchvision.models.vision_transformer.MLPBlock": _TORCHVISION_MLP,
    "torchvision.models.vision_transformer.EncoderBlock": _TORCHVISION_BLOCK,
}
