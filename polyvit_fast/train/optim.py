"""The parameters of a model in flat buffers, and one optimizer for all tasks.

Parameters that an update has no gradient for, those of absent tasks and modalities, either have a zero gradient, so that their moments
decay and still move them, as in the paper's code, or rest (`Optim.absent`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from polyvit_fast.config import Optim
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
    rounded: Tensor | None = None
    """A copy of the values in the precision of matrix products, written by each update."""


class Parameters(ABC):
    """What the optimizer and checkpoints need of a model's parameters, complete on this process or sharded over several.

    Values that belong to the parameters, such as moments, are passed as `flats`: a flat tensor per group.
    """

    groups: list[ParamGroup]
    found_inf: Tensor
    """A number within the gradients, 0 unless a loss was not finite: NaN added to it on any process makes all of them skip the update."""
    shapes: dict[str, torch.Size]
    """Of the whole parameters, by name."""
    averages_grads: bool
    """Whether the gradients of several processes are averaged; else they are summed."""

    @abstractmethod
    def compute_grad_norm(self) -> Tensor:
        """Of the whole gradient, `found_inf` included; on the device, the same on all processes, which call it together."""

    @abstractmethod
    def unflatten(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """The flat tensors as a tensor per parameter. Where they are sharded, all processes call it, and only rank 0 gets any."""

    @abstractmethod
    def fill(self, flats: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the flat tensors from a whole tensor per parameter. Raises ValueError when names or shapes differ."""

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters' values, as `unflatten` gives them."""
        return self.unflatten([group.values for group in self.groups])

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Set the parameters' values, as `fill` does."""
        self.fill([group.values for group in self.groups], tensors)

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

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError when names or shapes are not those of the parameters."""
        ours, theirs = self.shapes, {name: tensor.shape for name, tensor in tensors.items()}
        if ours != theirs:
            different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(f"the checkpoint's tensors are not this model's: {', '.join(different[:5])} differ")


@dataclass(frozen=True)
class ParamView:
    """Where a parameter lies in the flat buffers."""

    name: str
    shape: torch.Size
    start: int

    def slice(self, buffer: Tensor, begin: int = 0) -> Tensor:
        """This parameter as a view of a flat buffer, or of the range of one that begins at `begin`."""
        start = self.start - begin
        return buffer[start : start + self.shape.numel()].view(self.shape)


class FlatParameters(Parameters):
    """All parameters of a model in one flat buffer, their gradients in another; the model's own tensors become views of them.

    Weight matrices come first, so that `decayed` of the buffer's elements are subject to weight decay and the others are not; `found_inf`
    comes last. With a `rounded` dtype a third buffer holds the parameters in that, for the operations that would round them at every step.
    With `by_component` no group belongs to more than one component of the model (see `find_component`).
    """

    averages_grads = False

    def __init__(self, model: nn.Module, rounded: torch.dtype | None = None, *, by_component: bool = False) -> None:
        self.leaves = dict(sorted(model.named_parameters(), key=lambda item: not is_matrix(*item)))
        self.shapes = {name: parameter.shape for name, parameter in self.leaves.items()}
        self.views: list[ParamView] = []
        self.decayed = size = 0
        for name, parameter in self.leaves.items():
            self.views.append(ParamView(name, parameter.shape, size))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.decayed = size if is_matrix(name, parameter) else self.decayed
        device = next(iter(self.leaves.values())).device
        self.values, self.grads = (torch.zeros(size + ALIGNMENT, device=device) for _ in range(2))
        self.found_inf = self.grads[size]
        for view, parameter in zip(self.views, self.leaves.values(), strict=True):
            view.slice(self.values).copy_(parameter.detach())
            parameter.data = view.slice(self.values)
            parameter.grad = view.slice(self.grads)
        self.rounded = RoundedBuffer(self.values, rounded) if rounded else None
        if self.rounded:
            for parameter in self.leaves.values():
                parameter.grad_dtype = None  # of a rounded form: torch adds it to the fp32 one as it is
        alike = groupby(self.views, lambda view: (view.start < self.decayed, find_component(view.name) if by_component else ""))
        kinds = [(next(views).start, *kind) for kind, views in alike]
        self.begins = [begin for begin, _, _ in kinds]
        self.groups = [
            ParamGroup(self.values[begin:end], self.grads[begin:end], decays, component, self.rounded and self.rounded.rounded[begin:end])
            for (begin, decays, component), end in zip(kinds, [*self.begins[1:], size + ALIGNMENT], strict=True)
        ]
        self.refresh()

    def refresh(self) -> None:
        """Round the parameters anew, unless only the optimizer has written to them."""
        if self.rounded and not all(weights.is_attached(parameter) for parameter in self.leaves.values()):
            self.rounded.refresh()
            for view, parameter in zip(self.views, self.leaves.values(), strict=True):
                weights.attach(parameter, self.rounded, view.slice(self.rounded.rounded))

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
        """The flat tensors as a tensor per parameter, without a copy."""
        indices = [bisect_right(self.begins, view.start) - 1 for view in self.views]
        return {view.name: view.slice(flats[index], self.begins[index]) for view, index in zip(self.views, indices, strict=True)}

    def fill(self, flats: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the flat tensors from a tensor per parameter. Raises ValueError when names or shapes differ."""
        self.check(tensors)
        for name, tensor in self.unflatten(flats).items():
            tensor.copy_(tensors[name])


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is subject to weight decay."""
    return parameter.ndim >= 2 and name.endswith("weight")


def find_component(name: str) -> str:
    """The component that a parameter belongs to: the tokenizer of a modality, the head of a task, or the trunk, which is ""."""
    kind, *others = name.split(".")
    return f"{kind}.{others[0]}" if kind in ("tokenizers", "heads") else ""


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
        with self.parameters.keep_fresh():
            for index in range(len(self.parameters.groups)):
                self._update_group(index, lr, scale, updates)
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
        """The moving average as `Parameters.unflatten` gives it, when there is one."""
        return None if self.ema is None else self.parameters.unflatten(self.ema)

    def load_ema(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `ema_state_dict` gave. Raises ValueError when there is no moving average here, or it is another model's."""
        if self.ema is None:
            raise ValueError("optim.ema_decay = 0: there is no moving average to restore")
        self.parameters.fill(self.ema, tensors)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
