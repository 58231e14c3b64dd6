"""How VideoMAE's attention and block are read, whose layers lie deeper than those of Hugging Face's other models.

A block has two halves of an MLP, of which the second adds the residual; attention is a module that mixes and one that projects.
"""

from __future__ import annotations

from typing import Any

from polyvit_fast.drop_in.fused import read_member, unfit_member
from polyvit_fast.drop_in.members import (
    full_name,
    hugging_face_block_input,
    hugging_face_input,
    not_plain,
    read_drops,
    read_gelu,
    unfit_drops,
    unfit_gelu,
    unknown_members,
)
from polyvit_fast.drop_in.parts import Adapter, AttentionPart, BlockPart, MlpPart, NormPart
from polyvit_kernels.layers import is_untouched

MODELING = "transformers.models.videomae.modeling_videomae"


def _unfit_holder(module: Any, name: str, kind: str, members: str) -> str:
    """Why the member `name` is more than one that holds `members` and computes as the class `kind` of this library does."""
    if full_name(module) != f"{MODELING}.{kind}" or not is_untouched(module):
        return f"{name} ({type(module).__name__}) is no plain {kind}"
    return unknown_members(module, members)


def _unknown_attention(m: Any) -> str:
    return unknown_members(m, "attention output")


def _unfit_attention(m: Any) -> str:
    return (
        unfit_member(m.attention, "attention", AttentionPart)
        or _unfit_holder(m.output, "output", "VideoMAESelfOutput", "dense dropout")
        or unfit_drops(m.output, "dropout")
    )


def _read_attention(m: Any) -> AttentionPart:
    part: AttentionPart = read_member(m.attention)
    return part._replace(proj=m.output.dense, gives_pair=False, drops=part.drops + read_drops(m.output, "dropout"))


def _unknown_block(m: Any) -> str:
    return unknown_members(m, "layernorm_before attention layernorm_after intermediate output")


def _unfit_block(m: Any) -> str:
    return (
        unfit_member(m.layernorm_before, "layernorm_before", NormPart)
        or unfit_member(m.attention, "attention", AttentionPart)
        or unfit_member(m.layernorm_after, "layernorm_after", NormPart)
        or _unfit_holder(m.intermediate, "intermediate", "VideoMAEIntermediate", "dense intermediate_act_fn")
        or _unfit_holder(m.output, "output", "VideoMAEOutput", "dense dropout")
        or unfit_gelu(m.intermediate.intermediate_act_fn)
        or not_plain(m.intermediate.dense, "intermediate.dense")
        or not_plain(m.output.dense, "output.dense")
        or unfit_drops(m.output, "dropout")
    )


def _read_block(m: Any) -> BlockPart:
    norm1, attention, norm2 = (read_member(member) for member in (m.layernorm_before, m.attention, m.layernorm_after))
    drops = read_drops(m.output, "dropout")
    mlp = MlpPart(m.intermediate.dense, m.output.dense, read_gelu(m.intermediate.intermediate_act_fn), drops)
    return BlockPart(norm1, attention, norm2, mlp, (*attention.drops, *drops))


VIDEOMAE_PROJECTED_ATTENTION = Adapter(AttentionPart, _unknown_attention, _unfit_attention, _read_attention, hugging_face_input)
VIDEOMAE_BLOCK = Adapter(BlockPart, _unknown_block, _unfit_block, _read_block, hugging_face_block_input)
