"""From a grid to tokens: the part of the model that belongs to one modality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from polyvit_fast.config import Modality, Model
from polyvit_fast.model.modules import Block, drop_path_ramp
from polyvit_kernels import ops
from polyvit_kernels.ops.dtypes import matmul_dtype

SpreadGrid = (
    UInt8[Tensor, "batch new_frames new_rows new_columns channels"] | Float[Tensor, "batch new_frames new_rows new_columns channels"]
)
Grid = UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"]


class Normalisation(nn.Module):
    """(x - mean) / std of a grid's channels: the numbers, which the patch embedding applies. Checkpoints do not hold them."""

    mean: Tensor
    std: Tensor

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        channels = modality.grid[3]
        for name, values in zip(("mean", "std"), modality.normalisation, strict=True):
            if len(values) != channels:
                raise ValueError(f"{modality.name}: the {name} has {len(values)} numbers for {channels} channels")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)


class Tokenizer(nn.Module):
    """Normalise, cut into tubelets, project, add class tokens and positions; then the modality's own blocks (adaptors), if any.

    `weight` is a convolution's kernel, its stride being its size, with the channels last as in the grid. All parameters but those of
    the adaptors start at zero: `polyvit.initialise` sets them. Grids of the tasks in `own_normalisation` that have this modality are
    normalised as the records there say, all others by `modality`'s `mean` and `std`. `residual`: see `PolyViT`.
    """

    cls_token: nn.Parameter | None
    pos_embed: Tensor

    def __init__(
        self,
        modality: Modality,
        model: Model,
        residual: Literal["fp32", "bf16"] = "fp32",
        own_normalisation: Mapping[str, Modality] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.dropout, self.residual = model.dropout, residual
        self.weight = nn.Parameter(torch.zeros(model.dim, *modality.tubelet, modality.grid[3]))
        self.bias = nn.Parameter(torch.zeros(model.dim))
        self.num_class_tokens, self.tubelet, self.token_stride = modality.num_class_tokens, modality.tubelet, modality.token_stride
        self.cls_token = nn.Parameter(torch.zeros(1, self.num_class_tokens, model.dim)) if self.num_class_tokens else None
        if modality.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, modality.num_tokens, model.dim))
        else:
            positions = sinusoids(math.prod(modality.tubelets), model.dim)
            self.register_buffer("pos_embed", functional.pad(positions, (0, 0, self.num_class_tokens, 0))[None], persistent=False)
        self.blocks = nn.ModuleList(Block.from_config(model) for _ in range(model.num_adaptor_layers))
        self.normalisation = Normalisation(modality)
        own = {task: record for task, record in own_normalisation.items() if record.name == modality.name}
        self.own_normalisation = nn.ModuleDict({task: Normalisation(record) for task, record in own.items()})

    def forward(
        self, grid: Grid, drop_path_rate: float = 0.0, recompute: bool = False, task: str = "", num_blocks: int | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens, the class tokens first, then tubelets in the order (frames, rows, columns). Raises ValueError for another grid size.

        The adaptors have a ramp of drop-path rates of their own, from 0 to the full rate, as in the paper's code.
        `recompute`: see `Block`. `task`: whose grids they are. `num_blocks`: how many of the adaptors are computed; None: all.
        """
        numbers = self.normalisation
        if task in self.own_normalisation:
            numbers = cast(Normalisation, self.own_normalisation[task])
        if self.token_stride != self.tubelet:
            grid = spread_overlaps(grid, self.tubelet, self.token_stride)
        x = self._embed(grid, numbers)
        x = functional.dropout(x, self.dropout, self.training)
        rates = drop_path_ramp(len(self.blocks), drop_path_rate)
        for block, rate in zip(self.blocks[:num_blocks], rates, strict=False):
            x = block(x, rate, recompute)
        return x

    def _embed(self, grid: Grid, numbers: Normalisation) -> Float[Tensor, "batch tokens dim"]:
        """The embedded tubelets after the class tokens, each with its position."""
        out_dtype = matmul_dtype(self.weight) if self.residual == "bf16" else None
        settings, tokens, positions = (numbers.mean, numbers.std, out_dtype), self.cls_token, self.pos_embed
        if tokens is not None and self.num_class_tokens == 1:
            return ops.patch_embed(grid, self.weight, self.bias, tokens, positions, *settings)
        # The operation puts one token in front; it is the last class token, or is cut off where there is none.
        if tokens is None:
            one = positions.new_zeros(1, 1, positions.shape[2])
            return ops.patch_embed(grid, self.weight, self.bias, one, functional.pad(positions, (0, 0, 1, 0)), *settings)[
                :, 1:
            ].contiguous()
        x = ops.patch_embed(grid, self.weight, self.bias, tokens[:, -1:], positions[:, self.num_class_tokens - 1 :], *settings)
        first = (tokens + positions[:, : self.num_class_tokens])[:, :-1].to(x.dtype)
        return torch.cat([first.expand(len(x), -1, -1), x], 1)


def spread_overlaps(grid: Grid, tubelet: tuple[int, int, int], stride: tuple[int, int, int]) -> SpreadGrid:
    """The grid with what overlapping tubelets have in common repeated, so that they lie side by side; what none reaches is left out."""
    for axis, (step, next_one) in enumerate(zip(tubelet, stride, strict=True), 1):
        grid = grid.unfold(axis, step, next_one).movedim(-1, axis + 1).flatten(axis, axis + 1)
    return grid


def sinusoids(count: int, dim: int) -> Float[Tensor, "count dim"]:
    """Sines (even features) and cosines (odd ones) of each number, at wavelengths from 2 pi to 20000 pi (arXiv 1706.03762, 3.5)."""
    frequencies = 10_000 ** (-(torch.arange(dim, dtype=torch.float64) // 2 * 2) / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos()).float()
