"""Parameters, gradients and moments spread over all processes (FSDP2), for trunks that are too large for one GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from polyvit_fast.model.modules import Block
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.optim import Parameters, Piece, component_of, is_matrix

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard(model: PolyViT, world: World, device: Literal["cpu", "cuda"], precision: Literal["fp32", "bf16"]) -> None:
    """Spread the model's parameters over all processes, on `device`; each block is whole only while it computes.

    The model may still lie on the CPU: block by block it moves, so that no GPU ever holds all of it. Gradients travel in `precision`.

    Raises ValueError when there is one process only.
    """
    # Here, because they take a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world.size == 1:
        raise ValueError("sharded = True spreads the model over processes, but there is one; start several with torchrun, or leave it off")
    # What a block returns is a view, and nothing changes it in place, of which this warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device, (world.size,))
    # Not the matrix products' dtype: autocast sees to that, as without shards.
    policy = MixedPrecisionPolicy(reduce_dtype=DTYPES[precision])
    for module in (*(block for block in model.modules() if isinstance(block, Block)), model):
        # The model itself too: its own parameters must not stay whole, and out of date, from one evaluation to the next.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


class ShardedParameters(Parameters):
    """This process's shards of a model's parameters and of their gradients: a piece each. `by_component` as of `FlatParameters`."""

    is_averaged = True

    @torch.no_grad()
    def __init__(
        self,
        model: PolyViT,
        world: World,
        device: Literal["cpu", "cuda"],
        precision: Literal["fp32", "bf16"],
        *,
        by_component: bool = False,
    ) -> None:
        shard(model, world, device, precision)
        self.world = world
        self.shards = {name: cast("DTensor", parameter) for name, parameter in model.named_parameters()}
        self.shapes = {name: shard.shape for name, shard in self.shards.items()}
        self.pieces = []
        for name, parameter in self.shards.items():
            gradient = cast("DTensor", torch.zeros_like(parameter))
            parameter.grad = gradient  # FSDP adds to what is there
            component = component_of(name) if by_component else ""
            values, grads = parameter.to_local().view(-1), gradient.to_local().view(-1)
            self.pieces.append(Piece(values, grads, is_matrix(name, parameter), component))
        number = torch.zeros(2, 1, device=self.pieces[0].values.device)
        self.pieces.append(Piece(number[0], number[1], decays=False))
        self.taint = number[1, 0]

    def norm(self) -> Tensor:
        """Of the whole gradient, `taint` included; all processes call it."""
        square = torch.nn.utils.get_total_norm([piece.grads for piece in self.pieces]).square()
        self.world.sum_(square)
        return square.sqrt()

    @torch.no_grad()
    def whole(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parts as a tensor per parameter, on the CPU of the first process, nothing elsewhere; all processes call it."""
        from torch.distributed.tensor import DTensor

        tensors = {}
        for name, part in self._named(parts).items():
            shard = self.shards[name]
            local = part.view(shard.to_local().shape)
            placed = DTensor.from_local(local, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride())
            tensor = placed.full_tensor()
            if self.world.rank == 0:
                tensors[name] = tensor.cpu()
        return tensors

    @torch.no_grad()
    def fill(self, parts: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set this process's parts from a whole tensor per parameter. Raises ValueError when names or shapes differ."""
        self.check(tensors)
        for name, part in self._named(parts).items():
            rows = -(-len(tensors[name]) // self.world.size)  # FSDP's shards are rows, as many on each process until they end
            part.copy_(tensors[name][rows * self.world.rank :][:rows].flatten())

    def refresh(self) -> None:
        """Nothing follows them: autocast rounds the parameters that FSDP has gathered."""

    def _named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.shards, parts, strict=False))  # the last part is the taint's
