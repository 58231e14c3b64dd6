"""The parameters of a model in flat buffers, and one optimizer for all tasks.

Frozen parameters, those that require no gradient, have neither gradients nor moments, and no update changes them. Parameters that an
update has no gradient for, those of absent tasks and modalities, either have a zero gradient, so that their moments decay and still move
them, as in the paper's code, or rest (`Optim.absent`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

import torch
from torch import Tensor, nn

from polyvit_fast.config import Optim
from polyvit_fast.model.parameters import find_component, is_matrix
from polyvit_kernels import ops
from polyvit_kernels.ops import weights
from polyvit_kernels.ops.weights import RoundedBuffer

ALIGNMENT = 64  # elements: every parameter starts at a 256-byte boundary of the buffer


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are updated alike, as one flat tensor, and their gradients."""

    values: Tensor
    grads: Tensor
    decays: bool
    """Whether they are subject to weight decay."""
    component: str = ""
    """The component of the model that they belong to, where each is updated by itself (see `find_component`)."""
    lr_factor: float = 1.0
    """What their learning rate is multiplied by."""
    rounded: Tensor | None = None
    """A copy of the values in the precision of matrix products, written by each update."""


class Parameters(ABC):
    """What the optimizer and checkpoints need of a model's parameters, complete on this process or sharded over several.

    Values that belong to the parameters, such as moments, are passed as `flats`: a flat tensor per group.
    """

    groups: list[ParamGroup]
    """Of the parameters that are trained; frozen ones are in none."""
    frozen: dict[str, Tensor]
    """The values of the others, as this process holds them."""
    found_inf: Tensor
    """A number within the gradients, 0 unless a loss was not finite: NaN added to it on any process makes all of them skip the update."""
    shapes: dict[str, torch.Size]
    """Of the whole parameters that are trained, by name."""
    averages_grads: bool
    """Whether the gradients of several processes are averaged; else they are summed."""

    @abstractmethod
    def compute_grad_norm(self) -> Tensor:
        """Of the whole gradient, `found_inf` included; on the device, the same on all processes, which call it together."""

    @abstractmethod
    def unflatten(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """The flat tensors as a tensor per trained parameter. Where they are sharded, all processes call it, and only rank 0 gets any."""

    @abstractmethod
    def fill(self, flats: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the flat tensors from a whole tensor per trained parameter. Raises ValueError when names or shapes differ."""

    @abstractmethod
    def list_frozen(self) -> dict[str, Tensor]:
        """The whole frozen parameters. Where they are sharded, all processes call it, and only rank 0 gets any."""

    @abstractmethod
    def fill_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Set the frozen parameters. Raises ValueError when names or shapes differ."""

    def state_dict(self, flats: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The values of all parameters; those of the trained ones from `flats` where they are given."""
        return self.unflatten(flats or [group.values for group in self.groups]) | self.list_frozen()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Set the values of all parameters. Raises ValueError when names or shapes differ."""
        self.fill_frozen({name: tensor for name, tensor in tensors.items() if name in self.frozen})
        self.fill([group.values for group in self.groups], self.without_frozen(tensors))

    def without_frozen(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that belong to trained parameters, or to none of this model."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.frozen}

    @abstractmethod
    def refresh(self) -> None:
        """Round the parameters anew where something other than the optimizer has changed them."""

    @contextmanager
    def keep_fresh(self) -> Iterator[None]:
        """Inside, whatever changes the values of the groups changes their rounded copies alike."""
        yield

    def zero_grads(self) -> None:
        """Set the gradient to zero."""
        for group in self.groups:
            group.grads.zero_()


def check_shapes(ours: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError when names or shapes of a checkpoint's tensors are not those of the parameters."""
    theirs = {name: tensor.shape for name, tensor in tensors.items()}
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(f"the checkpoint's tensors are not this model's: {', '.join(different[:5])} differ")


@dataclass(frozen=True)
class ParamView:
    """Where a parameter lies in the flat buffers."""

    name: str
    shape: torch.Size
    start: int

    @property
    def end(self) -> int:
        """Where the next parameter may begin."""
        return self.start + -(-self.shape.numel() // ALIGNMENT) * ALIGNMENT

    def slice(self, buffer: Tensor, begin: int = 0) -> Tensor:
        """This parameter as a view of a flat buffer, or of the range of one that begins at `begin`."""
        start = self.start - begin
        return buffer[start : start + self.shape.numel()].view(self.shape)


class FlatParameters(Parameters):
    """All parameters of a model in one flat buffer, the gradients of the trained ones in another; the model's own tensors become views.

    Of the trained parameters weight matrices come first, so that `decayed` of the buffer's elements are subject to weight decay and the
    others are not; `found_inf` comes last, and after its position the frozen parameters. With a `rounded` dtype a third buffer holds the
    parameters in that, for the operations that would round them at every step. With `by_component` no group belongs to more than one
    component of the model (see `find_component`). `lr_factors` are by name, 1 where there is none.
    """

    averages_grads = False

    def __init__(
        self,
        model: nn.Module,
        rounded: torch.dtype | None = None,
        *,
        by_component: bool = False,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        def describe(name: str) -> tuple[bool, float, str]:
            return is_matrix(name, self.leaves[name]), lr_factors.get(name, 1.0), find_component(name) if by_component else ""

        # The deepest layers first, whose gradients are complete last, and of one factor all together.
        self.leaves = dict(sorted(model.named_parameters(), key=lambda item: (not is_matrix(*item), lr_factors.get(item[0], 1.0))))
        trained, frozen = ([n for n, leaf in self.leaves.items() if leaf.requires_grad == is_trained] for is_trained in (True, False))
        self.views, self.decayed = self._lay_out(trained, 0), 0
        end = self.views[-1].end
        self.frozen_views = self._lay_out(frozen, end + ALIGNMENT)
        self.shapes = {view.name: view.shape for view in self.views}
        device = next(iter(self.leaves.values())).device
        self.values = torch.zeros(self.frozen_views[-1].end if self.frozen_views else end + ALIGNMENT, device=device)
        self.grads = torch.zeros(end + ALIGNMENT, device=device)
        self.found_inf = self.grads[end]
        self.frozen = {view.name: view.slice(self.values) for view in self.frozen_views}
        self.rounded = RoundedBuffer(self.values, rounded) if rounded else None
        for view in (*self.views, *self.frozen_views):
            parameter = self.leaves[view.name]
            view.slice(self.values).copy_(parameter.detach())
            parameter.data = view.slice(self.values)
        for view in self.views:
            parameter = self.leaves[view.name]
            parameter.grad = view.slice(self.grads)
            self.decayed = view.end if is_matrix(view.name, parameter) else self.decayed
            if self.rounded:
                parameter.grad_dtype = None  # of a rounded form: torch adds it to the fp32 one as it is
        kinds = [(next(views).start, *kind) for kind, views in groupby(self.views, lambda view: describe(view.name))]
        self.begins = [begin for begin, *_ in kinds]
        self.groups = []
        for (begin, decays, factor, component), stop in zip(kinds, [*self.begins[1:], end + ALIGNMENT], strict=True):
            copy = self.rounded and self.rounded.rounded[begin:stop]
            self.groups.append(ParamGroup(self.values[begin:stop], self.grads[begin:stop], decays, component, factor, copy))
        self.refresh()

    def _lay_out(self, names: Sequence[str], begin: int) -> list[ParamView]:
        """Where these parameters lie, one after the other from `begin` on."""
        views: list[ParamView] = []
        for name in names:
            views.append(ParamView(name, self.leaves[name].shape, views[-1].end if views else begin))
        return views

    def refresh(self) -> None:
        """Round the parameters anew, unless only the optimizer has written to them."""
        if self.rounded and not all(weights.is_attached(parameter) for parameter in self.leaves.values()):
            self.rounded.refresh()
            for view in (*self.views, *self.frozen_views):
                weights.attach(self.leaves[view.name], self.rounded, view.slice(self.rounded.rounded))

    @contextmanager
    def keep_fresh(self) -> Iterator[None]:
        """Inside, whatever changes the values of the groups changes their rounded copies alike."""
        was_fresh = self.rounded and self.rounded.is_fresh()
        yield
        if self.rounded and was_fresh:
            self.rounded.mark_fresh()

    def compute_grad_norm(self) -> Tensor:
        """Of the whole gradient, which processes have summed before, `found_inf` included."""
        return torch.linalg.vector_norm(self.grads)

    def unflatten(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """The flat tensors as a tensor per trained parameter, without a copy."""
        indices = [bisect_right(self.begins, view.start) - 1 for view in self.views]
        return {view.name: view.slice(flats[index], self.begins[index]) for view, index in zip(self.views, indices, strict=True)}

    def fill(self, flats: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the flat tensors from a tensor per trained parameter. Raises ValueError when names or shapes differ."""
        check_shapes(self.shapes, tensors)
        for name, tensor in self.unflatten(flats).items():
            tensor.copy_(tensors[name])

    def list_frozen(self) -> dict[str, Tensor]:
        """The frozen parameters, without a copy."""
        return self.frozen

    def fill_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Set the frozen parameters. Raises ValueError when names or shapes differ."""
        check_shapes({name: tensor.shape for name, tensor in self.frozen.items()}, tensors)
        for name, tensor in self.frozen.items():
            tensor.copy_(tensors[name])


class Optimizer:
    """Clip by the global norm, then SGD with momentum or AdamW, then the moving average (EMA); the host never waits for any of it.

    An update whose loss or gradient is not finite is skipped: it changes nothing. `components` of the model can rest, each on its own;
    `count` has the number of updates of each.
    """

    def __init__(self, parameters: Parameters, config: Optim) -> None:
        self.parameters, self.config = parameters, config
        values = [group.values for group in parameters.groups]
        names = ("momentum",) if config.name == "sgd" else ("exp_avg", "exp_avg_sq")
        self.moments = {name: [torch.zeros_like(flat) for flat in values] for name in names}
        self.components = list(dict.fromkeys(group.component for group in parameters.groups))
        self.count = torch.zeros(len(self.components), device=values[0].device)
        self.factors = sorted({group.lr_factor for group in parameters.groups})
        self.lr_factors = torch.tensor(self.factors, device=values[0].device)
        self.ema = [flat.clone() for flat in values] if config.ema_decay else None

    def update(self, lr: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One update from the accumulated gradient, which is zeroed. Gives (gradient norm, whether the update was made).

        `active` says on the device for each of `components` whether it is updated; without it all are.
        """
        norm, clip_norm = self.parameters.compute_grad_norm(), self.config.clip_norm
        done = norm.isfinite()
        scale = (clip_norm / norm).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
        updates = done.expand(len(self.components)) if active is None else active & done
        self.count += updates
        rates = dict(zip(self.factors, lr * self.lr_factors, strict=True)) if self.factors != [1.0] else {1.0: lr}
        with self.parameters.keep_fresh():
            for index, group in enumerate(self.parameters.groups):
                self._update_group(index, rates[group.lr_factor], scale, updates)
        return norm, done

    def _update_group(self, index: int, lr: Tensor, scale: Tensor, updates: Tensor) -> None:
        group, config = self.parameters.groups[index], self.config
        component = self.components.index(group.component)
        moments = {name: flats[index] for name, flats in self.moments.items()}
        ema = None if self.ema is None else self.ema[index]
        common = {"lr": lr, "scale": scale, "ok": updates[component], "ema": ema, "ema_decay": config.ema_decay, "copy": group.rounded}
        common["weight_decay"] = config.weight_decay if group.decays else 0.0
        if config.name == "sgd":
            ops.sgd_(group.values, group.grads, moments["momentum"], **common, momentum=config.momentum)
        else:
            first, second = moments["exp_avg"], moments["exp_avg_sq"]
            ops.adamw_(group.values, group.grads, first, second, self.count[component], **common, betas=config.betas, eps=config.eps)

    @contextmanager
    def use_ema(self) -> Iterator[None]:
        """Inside, the model has the moving average as its weights, when there is one."""
        if self.ema is None:
            yield
            return
        values = [group.values for group in self.parameters.groups]
        kept = [flat.clone() for flat in values]
        _copy(values, self.ema)
        try:
            yield
        finally:
            _copy(values, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counts by name; as `Parameters.unflatten` gives them."""
        moments = {f"{moment}.{name}": t for moment, flats in self.moments.items() for name, t in self.parameters.unflatten(flats).items()}
        return moments | self._name_counts()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError when it belongs to another model or optimizer."""
        for moment, flats in self.moments.items():
            prefix = f"{moment}."
            self.parameters.fill(flats, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        counts = self._name_counts()
        other = sorted(counts.keys() ^ {name for name in tensors if name.partition(".")[0] == "count"})
        if other:
            raise ValueError(f"the checkpoint counts the updates of other components, by another optim.absent: {', '.join(other[:5])}")
        for name, count in counts.items():
            count.copy_(tensors[name])

    def _name_counts(self) -> dict[str, Tensor]:
        """Views of `count` by name; that of the trunk, or of all components together, is "count"."""
        names = ["count" + (name and f".{name}") for name in self.components]
        return dict(zip(names, self.count, strict=True))

    def ema_state_dict(self) -> dict[str, Tensor] | None:
        """The moving average of all parameters, as `Parameters.state_dict` gives them, when there is one: frozen ones are their own."""
        return None if self.ema is None else self.parameters.state_dict(self.ema)

    def load_ema(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `ema_state_dict` gave. Raises ValueError when there is no moving average here, or it is another model's."""
        if self.ema is None:
            raise ValueError("optim.ema_decay = 0: there is no moving average to restore")
        self.parameters.fill(self.ema, self.parameters.without_frozen(tensors))


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
