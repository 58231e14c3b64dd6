"""From a grid to tokens: the part of the model that belongs to one modality."""

from __future__ import annotations

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
    """Normalise, cut into tubelets, project, add class token and positions; then the modality's own blocks (adaptors), if any.

    `weight` is a convolution's kernel, its stride being its size, with the channels last as in the grid. All parameters but those of
    the adaptors start at zero: `polyvit.initialise` sets them. Grids of the tasks in `own_normalisation` that have this modality are
    normalised as the records there say, all others by `modality`'s `mean` and `std`. `residual`: see `PolyViT`.
    """

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
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, modality.num_tokens, model.dim))
        self.blocks = nn.ModuleList(Block.from_config(model) for _ in range(model.num_adaptor_layers))
        self.normalisation = Normalisation(modality)
        own = {task: record for task, record in own_normalisation.items() if record.name == modality.name}
        self.own_normalisation = nn.ModuleDict({task: Normalisation(record) for task, record in own.items()})

    def forward(
        self, grid: Grid, drop_path_rate: float = 0.0, recompute: bool = False, task: str = ""
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens, the class token first, then tubelets in the order (frames, rows, columns). Raises ValueError for another grid size.

        The adaptors have a ramp of drop-path rates of their own, from 0 to the full rate, as in the paper's code.
        `recompute`: see `Block`. `task`: whose grids they are.
        """
        numbers = self.normalisation
        if task in self.own_normalisation:
            numbers = cast(Normalisation, self.own_normalisation[task])
        out_dtype = matmul_dtype(self.weight) if self.residual == "bf16" else None
        x = ops.patch_embed(grid, self.weight, self.bias, self.cls_token, self.pos_embed, numbers.mean, numbers.std, out_dtype)
        x = functional.dropout(x, self.dropout, self.training)
        for block, rate in zip(self.blocks, drop_path_ramp(len(self.blocks), drop_path_rate), strict=True):
            x = block(x, rate, recompute)
        return x
