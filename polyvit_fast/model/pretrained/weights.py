"""What a file of weights holds, in our names and layouts: tokenizers, trunk and heads, and the settings that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polyvit_fast.config import Modality, Model
from polyvit_fast.model.polyvit import PolyViT

Tensors = dict[str, Tensor]
TOKENS = ("tubelets", "token_stride", "num_class_tokens", "pool", "positions")
"""What a modality and a tokenizer's weights both say."""
HEAD = "classes"
"""The task of a model with a single head, in messages and in a model built of its weights."""


@dataclass(frozen=True, kw_only=True)
class TokenGrid(Modality):
    """The modality of a model whose files are not read here: a grid of given size, and how it becomes tokens."""

    kind: str
    sizes: tuple[int, int, int, int]
    """(frames, rows, columns, channels) of the grid."""
    tubelet_sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    """(frames, rows, columns) from one token to the next."""
    mean: tuple[float, ...]
    """One number per channel, in the grid's units: levels of 0 to 255 for pixels."""
    std: tuple[float, ...]

    name: ClassVar[str] = "grid"

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(frames, rows, columns, channels)."""
        return self.sizes

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of one token."""
        return self.tubelet_sizes

    @property
    def token_stride(self) -> tuple[int, int, int]:
        """From one token to the next."""
        return self.strides

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std)."""
        return self.mean, self.std

    @property
    def eval_views(self) -> int:
        """One."""
        return 1


@dataclass(frozen=True, kw_only=True)
class TokenizerWeights:
    """A tokenizer: `weight` [dim, frames, rows, columns, channels], `bias`, `cls_token` [1, tokens, dim], `pos_embed`, its own `blocks.*`.

    Each may be missing.
    """

    tensors: Tensors
    tubelets: tuple[int, int, int] | None = None
    """How many tubelets there are along (frames, rows, columns); None where the file does not tell."""
    token_stride: tuple[int, int, int] | None = None
    """None: the tubelet's size."""
    num_class_tokens: int = 1
    pool: Literal["cls", "class_tokens", "mean"] = "cls"
    positions: Literal["learned", "sinusoidal"] = "learned"
    mean: tuple[float, ...] | None = None
    """In the grid's units; where the file does not tell, the format's usual one, or None where it has none."""
    std: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, tensors: Tensors, described: Mapping[str, Any]) -> TokenizerWeights:
        """The weights with what `describe_tokens` gave, after JSON. Raises TypeError for an unknown setting."""
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
        return cls(tensors=tensors, **settings)


def describe_tokens(modality: Modality) -> dict[str, Any]:
    """What a modality says of its tokenizer, as the fields of `TokenizerWeights`."""
    mean, std = modality.normalisation
    return {name: getattr(modality, name) for name in TOKENS} | {"mean": mean, "std": std}


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """A head: `weight`, `bias`, and `norm.weight`, `norm.bias` of one that normalises what it reads."""

    modality: str
    tensors: Tensors
    class_names: tuple[str, ...] | None = None
    """In the order of the rows; None where the file has numbers only."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The weights of one file, or of one run."""

    source: str
    """Where they are from, for messages."""
    kind: str
    """Whose format they were in, for messages: "timm ViT"."""
    model: Model
    """Their size and form. What the tensors cannot tell, and no file next to them, is as the format has it by default."""
    tokenizers: dict[str, TokenizerWeights]
    """By the name of the modality."""
    trunk: Tensors
    """`blocks.*` and `norm.*`; the blocks of tokenizers are numbered from 0, those of the trunk go on from there."""
    heads: dict[str, HeadWeights] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that are of no use here, and why."""

    def build(self) -> PolyViT:
        """The model itself, in evaluation mode. Raises ValueError when the file does not tell the size of its grid, or lacks weights."""
        grids: dict[str, Modality] = {name: self.read_grid(name) for name in self.tokenizers}
        heads = {name: (head.modality, len(head.tensors["weight"])) for name, head in self.heads.items()}
        normed = [name for name, head in self.heads.items() if "norm.weight" in head.tensors]
        dtype = next(iter(self.trunk.values())).dtype
        model = PolyViT(self.model, grids, heads, norm_heads=normed).to(dtype).eval()
        found, needed = self.state_dict(), model.state_dict()
        missing = [name for name in needed if name not in found]
        if missing:
            names = ", ".join(missing[:3])
            raise ValueError(f"{self.source} ({self.kind}) lacks {names}; a run can start from it all the same, with these new: --init")
        model.load_state_dict(found)
        return model

    def state_dict(self) -> Tensors:
        """All tensors by the names that a `PolyViT` gives them."""
        num_adaptors = self.model.num_adaptor_layers
        named: Tensors = {}
        for name, tokenizer in self.tokenizers.items():
            fixed = {"pos_embed"} if tokenizer.positions == "sinusoidal" else set()
            named |= {f"tokenizers.{name}.{key}": value for key, value in tokenizer.tensors.items() if key not in fixed}
        for key, value in self.trunk.items():
            named[shift_block(key, -num_adaptors)] = value
        for name, head in self.heads.items():
            named |= {f"heads.{name}.{key}": value for key, value in head.tensors.items()}
        return named

    def read_grid(self, name: str) -> TokenGrid:
        """The grid of a tokenizer. Raises ValueError when the file does not tell its size."""
        tokenizer = self.tokenizers[name]
        tubelets, weight = tokenizer.tubelets, tokenizer.tensors["weight"]
        if tubelets is None:
            raise ValueError(
                f"{self.source}: the file does not tell how its positions lie in rows and columns, so no model can be built of it"
            )
        frames, rows, columns, channels = weight.shape[1:]
        tubelet = (frames, rows, columns)
        strides = tokenizer.token_stride or tubelet
        depth, height, width = ((count - 1) * stride + size for count, stride, size in zip(tubelets, strides, tubelet, strict=True))
        mean, std = tokenizer.mean or (0.0,) * channels, tokenizer.std or (1.0,) * channels
        tokens: dict[str, Any] = {key: getattr(tokenizer, key) for key in ("num_class_tokens", "pool", "positions")}
        return TokenGrid(
            kind=name, sizes=(depth, height, width, channels), tubelet_sizes=tubelet, strides=strides, mean=mean, std=std, **tokens
        )


def shift_block(name: str, by: int) -> str:
    """`blocks.3.…` with another number; other names as they are."""
    start, number, *rest = name.split(".")
    return ".".join((start, str(int(number) + by), *rest)) if start == "blocks" else name


def select(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def select_trunk(tensors: Tensors, num_adaptors: int) -> Tensors:
    """A PolyViT's `blocks.*` and `norm.*`, the blocks numbered on from its tokenizers' own."""
    return {shift_block(name, num_adaptors): tensor for name, tensor in tensors.items() if name.startswith(("blocks.", "norm."))}


def count_blocks(tensors: Tensors) -> int:
    """How many different `blocks.N` there are."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def has_equal_heads(tensors: Tensors, *names: str) -> bool:
    """Whether these heads of class tokens are there and equal. The mean of their logits is then that of one head on the tokens' mean."""
    first, *others = ([tensors.get(f"{name}.{key}") for key in ("weight", "bias")] for name in names)
    pairs = [pair for other in others for pair in zip(first, other, strict=True)]
    return all(one is not None and two is not None and torch.equal(one, two) for one, two in pairs)


def measure_model(blocks: Tensors, num_heads: int, **settings: Any) -> Model:
    """The record of a model with these `blocks.*`."""
    qkv, fc1 = blocks["blocks.0.attn.qkv.weight"], blocks["blocks.0.mlp.fc1.weight"]
    return Model(dim=qkv.shape[1], depth=count_blocks(blocks), num_heads=num_heads, mlp_dim=fc1.shape[0], **settings)
