"""PolyViT: a tokenizer per modality, one trunk for all tasks, a linear head per task (arXiv 2111.12993, section 3)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyvit_fast.config import Modality, Model, Train
from polyvit_fast.model.class_token import ClassTokenBlock
from polyvit_fast.model.modules import Attention, Block, ClassToken, LayerNorm, Tokens, drop_path_ramp
from polyvit_fast.model.tokenizer import Grid, Tokenizer
from polyvit_fast.randomness import generator
from polyvit_kernels import ops
from polyvit_kernels.layers import project
from polyvit_kernels.ops import AttentionBackend
from polyvit_kernels.ops.dtypes import matmul_dtype


class PolyViT(nn.Module):
    """One Vision Transformer for the tasks of several modalities; a call serves one task.

    `heads` gives the name of its modality and its number of classes for each task. The grids of a task in `own_normalisation` are
    normalised by the record there, not by that of their modality. The weights follow from `seed` alone. With `residual` = "bf16" the
    tokens between blocks have autocast's dtype where autocast is on; else they have the weights'. `attention`: see
    `polyvit_kernels.attention`. Where heads read the class token alone, the last of `blocks`, a `ClassTokenBlock`, computes nothing else;
    a last block that belongs to a modality (with as many adaptor layers as blocks) computes all tokens. The heads of `norm_heads` normalise
    what they read.
    """

    def __init__(
        self,
        model: Model,
        modalities: dict[str, Modality],
        heads: dict[str, tuple[str, int]],
        *,
        own_normalisation: Mapping[str, Modality] = MappingProxyType({}),
        seed: int = 0,
        residual: Literal["fp32", "bf16"] = "fp32",
        attention: AttentionBackend = "auto",
        zero_heads: Collection[str] = (),
        norm_heads: Collection[str] = (),
    ) -> None:
        super().__init__()
        _check_names([*modalities, *heads])
        unknown = {modality for modality, _ in heads.values()} - modalities.keys()
        if unknown:
            raise ValueError(f"heads of the modalities {sorted(unknown)}, but there are only {sorted(modalities)}")
        self.depth = model.depth
        self.modality_of = {task: modality for task, (modality, _) in heads.items()}
        self.pool_of = {name: (modality.pool, modality.num_class_tokens) for name, modality in modalities.items()}
        self.tokenizers = nn.ModuleDict(
            {name: Tokenizer(modality, model, residual, own_normalisation) for name, modality in modalities.items()}
        )
        num_shared = model.depth - model.num_adaptor_layers
        kinds = [*[Block] * (num_shared - 1), ClassTokenBlock] if num_shared else []
        self.blocks = nn.ModuleList(kind.from_config(model) for kind in kinds)
        self.norm = LayerNorm(model.dim, model.last_norm_eps or model.norm_eps)
        self.heads = nn.ModuleDict()
        for task, (_, num_classes) in heads.items():
            normed = task in norm_heads
            self.heads[task] = NormedLinear(model.dim, num_classes, model.norm_eps) if normed else nn.Linear(model.dim, num_classes)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = attention
        initialise(self, seed, zero_heads)

    @classmethod
    def from_config(cls, train: Train) -> PolyViT:
        """The model of a run, with its first weights."""
        heads = {name: (task.modality.name, task.num_classes) for name, task in train.tasks.items()}
        own = {name: task.modality for name, task in train.tasks.items()}
        zero_heads = [name for name, task in train.tasks.items() if task.zero_head]
        norm_heads = [name for name, task in train.tasks.items() if task.head_norm]
        settings = {"seed": train.seed, "residual": train.compute.residual, "attention": train.compute.attention}
        return cls(train.model, train.modalities, heads, own_normalisation=own, **settings, zero_heads=zero_heads, norm_heads=norm_heads)

    def forward(self, grid: Grid, task: str, drop_path_rate: float = 0.0, recompute: bool = False) -> Float[Tensor, "batch num_classes"]:
        """Logits of `task` for grids of its modality, as its decoder returns them: the tokenizer normalises, by the task's numbers.

        In training a residual branch of the last block is left out with the probability `drop_path_rate`, which falls linearly to 0 in
        the first block. `recompute`: the backward pass computes every block again from its input (see `Block`). Raises ValueError for
        an unknown task or a grid of another size.
        """
        if task not in self.modality_of:
            raise ValueError(f"the model has no task {task!r}; it has {', '.join(self.modality_of)}")
        return project(self.heads[task], self._embed(grid, self.modality_of[task], task, drop_path_rate, recompute))

    def embed(self, grid: Grid, modality: str, *, task: str = "") -> Float[Tensor, "batch dim"]:
        """What heads read of a grid: the normalised class token, or what else the modality's `pool` says; see `features`."""
        self._check_modality(modality)
        return self._embed(grid, modality, task)

    def _embed(
        self, grid: Grid, modality: str, task: str, drop_path_rate: float = 0.0, recompute: bool = False
    ) -> Float[Tensor, "batch dim"]:
        pool, num_class_tokens = self.pool_of[modality]
        x = self.tokenizers[modality](grid, drop_path_rate, recompute, task)
        x = self._run_blocks(x, len(self.blocks), drop_path_rate, recompute, all_tokens=pool != "cls")
        if pool == "cls":
            return self.norm(x[:, 0])  # the norm takes each token by itself
        if pool == "class_tokens":
            return self.norm(x[:, :num_class_tokens]).mean(1)
        return self.norm(x[:, num_class_tokens:].mean(1))

    def features(self, grid: Grid, modality: str, *, task: str = "", layer: int | None = None) -> Float[Tensor, "batch tokens dim"]:
        """All tokens of a grid, the modality's class tokens first, then its tubelets in the order (frames, rows, columns).

        `layer`: after so many blocks, adaptors included; 0 is the tokenizer alone. None: after all blocks and the last norm. `task`: whose
        mean and std normalise the grid. Raises ValueError for an unknown modality, a layer that is not there, a grid of another size.
        """
        self._check_modality(modality)
        if layer is not None and not 0 <= layer <= self.depth:
            raise ValueError(f"layer = {layer}, but the model has {self.depth} blocks: 0 to {self.depth}")
        num_adaptors = self.depth - len(self.blocks)
        number = self.depth if layer is None else layer
        x = self.tokenizers[modality](grid, task=task, num_blocks=min(number, num_adaptors))
        x = self._run_blocks(x, max(0, number - num_adaptors), all_tokens=True)
        return self.norm(x) if layer is None else x

    def _run_blocks(
        self, x: Tokens, count: int, drop_path_rate: float = 0.0, recompute: bool = False, *, all_tokens: bool
    ) -> Tokens | ClassToken:
        """The tokens after the first `count` shared blocks; without `all_tokens` the last block gives the class token alone."""
        rates = drop_path_ramp(self.depth, drop_path_rate)[self.depth - len(self.blocks) :]
        for block, rate in zip(self.blocks[:count], rates, strict=False):
            options = {"all_tokens": True} if all_tokens and isinstance(block, ClassTokenBlock) else {}
            x = block(x, rate, recompute, **options)
        return x

    def _check_modality(self, modality: str) -> None:
        if modality not in self.tokenizers:
            raise ValueError(f"the model has no modality {modality!r}; it has {', '.join(self.tokenizers)}")


class NormedLinear(nn.Linear):
    """A linear head on what a norm of its own gives."""

    def __init__(self, dim: int, num_classes: int, norm_eps: float) -> None:
        super().__init__(dim, num_classes)
        self.norm = LayerNorm(dim, norm_eps)

    def forward(self, input: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch num_classes"]:
        """The logits."""
        return ops.linear(self.norm(input, matmul_dtype(input)), self.weight, self.bias)


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"a task or modality cannot be called {name!r}, which torch.nn.ModuleDict needs for itself; choose another name"
            )


@torch.no_grad()
def initialise(model: PolyViT, seed: int, zero_heads: Collection[str] = ()) -> None:
    """Set every parameter from `seed` and its own name alone: a model with more tasks has the same trunk.

    | parameter | distribution |
    |---|---|
    | tokenizers.*.weight, heads.*.weight | truncated normal of variance 1 / fan_in (LeCun), cut at twice its std |
    | tokenizers.*.pos_embed | normal of std 0.02 |
    | *.attn.qkv.weight | uniform of variance 2 / (fan_in + fan_out) (Xavier), for query, key and value each by itself |
    | *.attn.proj.weight, *.mlp.fc1.weight, *.mlp.fc2.weight | the same, as one matrix |
    | *.mlp.fc1.bias, *.mlp.fc2.bias | normal of std 1e-6 |
    | *.norm1.weight, *.norm2.weight, norm.weight | 1 |
    | all other biases, tokenizers.*.cls_token, the weight of the head of a task in `zero_heads` | 0 |

    These are the distributions of the paper's code, in which the heads of videos and audio start at zero, with one exception: the
    tubelets of videos, which it copies from an image model, are drawn like all others. Parameters on the meta device stay as they are.
    """
    zeros = {f"heads.{task}.weight" for task in zero_heads}
    for name, parameter in model.named_parameters():
        if name in zeros:
            parameter.zero_()
        elif not parameter.is_meta:
            parameter.copy_(_initial_values(name.split("."), parameter.shape, generator(seed, "weights", name)))


def _initial_values(name: list[str], shape: torch.Size, rng: np.random.Generator) -> Tensor:
    match name:
        case ["tokenizers" | "heads", _, "weight"]:
            return _truncated_normal(shape, 1 / math.sqrt(shape[1:].numel()), rng)
        case ["tokenizers", _, "pos_embed"]:
            return _normal(shape, 0.02, rng)
        case [*_, "attn", "qkv", "weight"]:
            return _uniform(shape, math.sqrt(6 / (shape[1] + shape[0] // 3)), rng)
        case [*_, "proj" | "fc1" | "fc2", "weight"]:
            return _uniform(shape, math.sqrt(6 / (shape[1] + shape[0])), rng)
        case [*_, "mlp", "fc1" | "fc2", "bias"]:
            return _normal(shape, 1e-6, rng)
        case [*_, "norm1" | "norm2" | "norm", "weight"]:
            return torch.ones(shape)
        case [*_, "bias" | "cls_token"]:
            return torch.zeros(shape)
        case _:
            raise ValueError(f"there is no initial distribution for the parameter {'.'.join(name)}; add it to _initial_values")


def _uniform(shape: torch.Size, bound: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32)).mul_(2 * bound).sub_(bound)


def _normal(shape: torch.Size, std: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).mul_(std)


def _truncated_normal(shape: torch.Size, std: float, rng: np.random.Generator) -> Tensor:
    """Values of the given std, from a normal distribution that is cut at twice its own std."""
    inside = math.erf(2 / math.sqrt(2))  # the probability of lying within the cuts
    shrinkage = math.sqrt(1 - 4 * math.exp(-2) / (inside * math.sqrt(2 * math.pi)))  # of the std, by the cuts
    uniform = torch.from_numpy(rng.random(shape, dtype=np.float32)).mul_(2 * inside).sub_(inside)
    return torch.erfinv(uniform).mul_(math.sqrt(2) * std / shrinkage)
