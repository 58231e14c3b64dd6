"""One task of trained weights, and the plain Vision Transformer that it is: a tokenizer, blocks numbered through, a norm, a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyvit_fast.config import Modality, Model, Preprocessing
from polyvit_fast.model.pretrained.weights import HeadWeights, Pretrained, Tensors, TokenGrid, TokenizerWeights, describe_tokens
from polyvit_fast.model.tokenizer import sinusoids


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """A model of one task, as other libraries know it."""

    model: Model
    """Without adaptors: all blocks follow one another."""
    grid: TokenGrid
    """What it takes, and how that becomes tokens."""
    tensors: Tensors
    """`blocks.*`, `norm.*`, and the tokenizer's `weight`, `bias`, `cls_token` and `pos_embed`, fixed positions too."""
    head: HeadWeights | None
    preprocessing: Preprocessing
    loss: str = "softmax"
    """Of the task: softmax or sigmoid."""

    @property
    def last_norm_eps(self) -> float:
        """That of the last norm."""
        return self.model.last_norm_eps or self.model.norm_eps

    @property
    def has_head_norm(self) -> bool:
        """Whether the head normalises what it reads."""
        return self.head is not None and "norm.weight" in self.head.tensors

    @property
    def reads_mean_of_class_tokens(self) -> bool:
        """Whether the head reads several class tokens."""
        return self.grid.pool == "class_tokens" and self.grid.num_class_tokens > 1

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In the order of the logits; None where nobody knows them."""
        return self.head.class_names if self.head else None

    @property
    def num_classes(self) -> int:
        """0 without a head."""
        return len(self.head.tensors["weight"]) if self.head else 0

    @property
    def class_tokens(self) -> tuple[Tensor, ...]:
        """Each by itself, `[1, 1, dim]`."""
        return self.tensors["cls_token"].split(1, 1) if "cls_token" in self.tensors else ()

    @property
    def has_copies(self) -> bool:
        """Whether the grid's channels are several copies of one."""
        return self.preprocessing.is_mono and self.grid.sizes[3] > 1

    def merge_channels(self) -> Tensor:
        """The tokenizer's `weight` for the one channel of a grid that `has_copies`, added up in fp64 and rounded; else as it is."""
        weight = self.tensors["weight"]
        return weight.double().sum(4, keepdim=True).to(weight.dtype) if self.has_copies else weight

    def describe_merging(self) -> list[str]:
        """What `merge_channels` has done, in a sentence, if anything."""
        text = f"The {self.grid.sizes[3]} channels of the grid are copies of one, which the model takes; their weights are added up."
        return [text] if self.has_copies else []


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model in the form of another library."""

    tensors: Tensors
    """model.safetensors."""
    configs: dict[str, dict[str, Any]]
    """Further files by their names, as JSON."""
    remarks: list[str] = field(default_factory=list)
    """What is not as it was, in sentences."""


def select_task(source: Pretrained, task: str, modality: Modality | None = None) -> Pretrained:
    """The weights of one task alone. `modality`: its record, which describes the tokenizer; mean and std may be the task's own."""
    head = source.heads[task]
    tokenizer = source.tokenizers[head.modality]
    if modality:
        tokenizer = replace(tokenizer, **describe_tokens(modality))
    return replace(source, tokenizers={head.modality: tokenizer}, heads={task: head}, left_out={})


def flatten(source: Pretrained, modality: Modality | None = None, loss: str = "softmax") -> PlainViT:
    """The plain Vision Transformer of weights with one tokenizer and at most one head. `modality`: what its files are, where that is known.

    Raises ValueError where the file that the weights are from does not tell the size of its grid.
    """
    [(name, tokenizer)] = source.tokenizers.items()
    grid = source.read_grid(name)
    if modality:
        grid = replace(grid, sizes=modality.grid)  # what no overlapping tubelet reaches counts too
    return PlainViT(
        model=replace(source.model, num_adaptor_layers=0),
        grid=grid,
        tensors={**tokenizer.tensors, **source.trunk, "pos_embed": _read_positions(tokenizer, grid, source.model.dim)},
        head=next(iter(source.heads.values()), None),
        preprocessing=modality.preprocessing if modality else Preprocessing(),
        loss=loss,
    )


def _read_positions(tokenizer: TokenizerWeights, grid: TokenGrid, dim: int) -> Tensor:
    if tokenizer.positions == "learned":
        return tokenizer.tensors["pos_embed"]
    fixed = sinusoids(math.prod(grid.tubelets), dim).to(tokenizer.tensors["weight"].dtype)
    return functional.pad(fixed, (0, 0, grid.num_class_tokens, 0))[None]


def find_unit_levels(levels: Sequence[float]) -> list[float]:
    """Levels of 0 to 255 as parts of 255: the shortest numbers that times 255 give the levels again."""
    return [_find_unit_level(level) for level in levels]


def _find_unit_level(level: float) -> float:
    near = level / 255.0
    candidates = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    return min((one for one in candidates if 255.0 * one == level), key=lambda one: len(repr(one)), default=near)


def make_contiguous(tensors: Tensors) -> Tensors:
    """The tensors as a file stores them, each with memory of its own."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
