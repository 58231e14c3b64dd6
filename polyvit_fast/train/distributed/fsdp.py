"""Parameters, gradients and optimizer state sharded over all processes (FSDP2), for trunks that are too large for one GPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from polyvit_fast.model.modules import Block
from polyvit_fast.model.parameters import find_component, is_matrix
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.optim import Parameters, ParamGroup, check_shapes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard(model: PolyViT, world: World, device: str, precision: Literal["fp32", "bf16"]) -> None:
    """Shard the model's parameters over all processes, on `device`; a block's are gathered only while it computes.

    The model may still lie on the CPU: block by block it moves, so that no GPU ever holds all of it. Gradients are reduced in `precision`.

    Raises ValueError when there is one process only.
    """
    # Here, because they take a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world.size == 1:
        raise ValueError("sharded = True spreads the model over processes, but there is one; start several with torchrun, or leave it off")
    # It warns of modules that return a view and of changes to that; nothing changes what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device, (world.size,))
    # No param_dtype: autocast chooses the dtype of matrix products, as without sharding.
    policy = MixedPrecisionPolicy(reduce_dtype=DTYPES[precision])
    for module in (*(block for block in model.modules() if isinstance(block, Block)), model):
        # The model too: FSDP would leave its own parameters gathered, and out of date, from one evaluation to the next.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


class ShardedParameters(Parameters):
    """This process's shards of a model's parameters and of the gradients of the trained ones: a group each.

    `by_component` and `lr_factors` as of `FlatParameters`.
    """

    averages_grads = True

    @torch.no_grad()
    def __init__(
        self,
        model: PolyViT,
        world: World,
        device: str,
        precision: Literal["fp32", "bf16"],
        *,
        by_component: bool = False,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        shard(model, world, device, precision)
        self.world = world
        self.shards = {name: cast("DTensor", parameter) for name, parameter in model.named_parameters()}
        trained = {name: parameter for name, parameter in self.shards.items() if parameter.requires_grad}
        self.shapes = {name: shard.shape for name, shard in trained.items()}
        self.frozen = {name: shard.to_local().view(-1) for name, shard in self.shards.items() if name not in trained}
        self.groups = []
        for name, parameter in trained.items():
            gradient = cast("DTensor", torch.zeros_like(parameter))
            parameter.grad = gradient  # FSDP adds to what is there
            component = find_component(name) if by_component else ""
            values, grads = parameter.to_local().view(-1), gradient.to_local().view(-1)
            self.groups.append(ParamGroup(values, grads, is_matrix(name, parameter), component, lr_factors.get(name, 1.0)))
        number = torch.zeros(2, 1, device=self.groups[0].values.device)
        self.groups.append(ParamGroup(number[0], number[1], decays=False))
        self.found_inf = number[1, 0]

    def compute_grad_norm(self) -> Tensor:
        """Of the whole gradient, `found_inf` included; all processes call it."""
        square = torch.nn.utils.get_total_norm([group.grads for group in self.groups]).square()
        self.world.all_reduce_sum_(square)
        return square.sqrt()

    @torch.no_grad()
    def unflatten(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """A tensor per trained parameter, gathered to the CPU of rank 0, nothing on the others; all processes call it."""
        return self._gather(self._name(flats))

    def _gather(self, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        tensors = {}
        for name, flat in flats.items():
            shard = self.shards[name]
            local = flat.view(shard.to_local().shape)
            sharded = DTensor.from_local(local, shard.device_mesh, shard.placements, shape=shard.shape, stride=shard.stride())
            tensor = sharded.full_tensor()
            if self.world.rank == 0:
                tensors[name] = tensor.cpu()
        return tensors

    @torch.no_grad()
    def fill(self, flats: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set this process's shards from a whole tensor per trained parameter. Raises ValueError when names or shapes differ."""
        check_shapes(self.shapes, tensors)
        self._scatter(self._name(flats), tensors)

    @torch.no_grad()
    def list_frozen(self) -> dict[str, Tensor]:
        """The frozen parameters, gathered to the CPU of rank 0, nothing on the others; all processes call it."""
        return self._gather(self.frozen)

    @torch.no_grad()
    def fill_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Set this process's shards of the frozen parameters. Raises ValueError when names or shapes differ."""
        check_shapes({name: self.shards[name].shape for name in self.frozen}, tensors)
        self._scatter(self.frozen, tensors)

    def _scatter(self, flats: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        for name, flat in flats.items():
            rows = -(-len(tensors[name]) // self.world.size)  # FSDP shards by rows, as many on each process until they end
            flat.copy_(tensors[name][rows * self.world.rank :][:rows].flatten())

    def refresh(self) -> None:
        """Nothing to do: autocast rounds the parameters that FSDP has gathered."""

    def _name(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.shapes, flats, strict=False))  # the last one is that of found_inf
