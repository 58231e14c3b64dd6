"""The parameters of a model as flat stretches of memory, and one optimizer over all tasks on top of them.

Parameters that an update has no gradient for, those of absent tasks and modalities, either have a zero gradient, so that their moments fade
and still move them, as in the paper's code, or rest (`Optim.absent`).
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
class Piece:
    """Parameters in one flat stretch that are updated alike, and their gradients."""

    values: Tensor
    grads: Tensor
    decays: bool
    """Whether they are subject to weight decay."""
    component: str = ""
    """What they belong to, where components of the model are updated each by itself (see `component_of`)."""
    rounded: Tensor | None = None
    """The values once more in the precision of matrix products, written by each update."""


class Parameters(ABC):
    """What an optimizer and checkpoints need of a model's parameters, whole on this process or spread over several.

    Values that belong to the parameters, such as moments, come as `parts`: a flat tensor per piece.
    """

    pieces: list[Piece]
    taint: Tensor
    """A number beside the gradients, 0 but for NaN: added here on any process, it forbids the update on all of them alike."""
    shapes: dict[str, torch.Size]
    """Of the whole parameters, by name."""
    is_averaged: bool
    """Whether processes' gradients are averaged, not summed, when they come together."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Of the whole gradient, `taint` included; on the device, the same on all processes, which call it together."""

    @abstractmethod
    def whole(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parts as a tensor per parameter. Where they are spread over processes, all call it, and only the first gets any."""

    @abstractmethod
    def fill(self, parts: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the parts from a whole tensor per parameter. Raises ValueError when names or shapes differ."""

    def tensors(self) -> dict[str, Tensor]:
        """The parameters' values, as in `whole`."""
        return self.whole([piece.values for piece in self.pieces])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set the parameters' values, as in `fill`."""
        self.fill([piece.values for piece in self.pieces], tensors)

    @abstractmethod
    def refresh(self) -> None:
        """Bring up to date what follows the values, after somebody else than the optimizer has changed them."""

    @contextmanager
    def updated(self) -> Iterator[None]:
        """Inside, whoever changes the values of the pieces changes what follows them alike."""
        yield

    def zero_grads(self) -> None:
        """Forget the gradient."""
        for piece in self.pieces:
            piece.grads.zero_()

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError when names or shapes are not those of the parameters."""
        ours, theirs = self.shapes, {name: tensor.shape for name, tensor in tensors.items()}
        if ours != theirs:
            different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(f"the checkpoint's tensors are not this model's: {', '.join(different[:5])} differ")


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffers."""

    name: str
    shape: torch.Size
    start: int

    def view(self, buffer: Tensor, begin: int = 0) -> Tensor:
        """This parameter's part of a flat buffer, or of the stretch of one that begins at `begin`."""
        start = self.start - begin
        return buffer[start : start + self.shape.numel()].view(self.shape)


class FlatParameters(Parameters):
    """All parameters of a model in one flat buffer, their gradients in another; the model's own tensors become views of them.

    Weight matrices come first, so that `decayed` of the buffer's elements are subject to weight decay and the others are not; `taint` last.
    With a `rounded` dtype a third buffer holds the parameters in that, for the operations that would round them at every step. With
    `by_component` no piece belongs to more than one component of the model (see `component_of`).
    """

    is_averaged = False

    def __init__(self, model: nn.Module, rounded: torch.dtype | None = None, *, by_component: bool = False) -> None:
        self.leaves = dict(sorted(model.named_parameters(), key=lambda item: not is_matrix(*item)))
        self.shapes = {name: parameter.shape for name, parameter in self.leaves.items()}
        self.slots: list[Slot] = []
        self.decayed = size = 0
        for name, parameter in self.leaves.items():
            self.slots.append(Slot(name, parameter.shape, size))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.decayed = size if is_matrix(name, parameter) else self.decayed
        device = next(iter(self.leaves.values())).device
        self.values, self.grads = (torch.zeros(size + ALIGNMENT, device=device) for _ in range(2))
        self.taint = self.grads[size]
        for slot, parameter in zip(self.slots, self.leaves.values(), strict=True):
            slot.view(self.values).copy_(parameter.detach())
            parameter.data = slot.view(self.values)
            parameter.grad = slot.view(self.grads)
        self.rounded = RoundedBuffer(self.values, rounded) if rounded else None
        if self.rounded:
            for parameter in self.leaves.values():
                parameter.grad_dtype = None  # of a rounded form: torch adds it to the fp32 one as it is
        alike = groupby(self.slots, lambda slot: (slot.start < self.decayed, component_of(slot.name) if by_component else ""))
        kinds = [(next(slots).start, *kind) for kind, slots in alike]
        self.begins = [begin for begin, _, _ in kinds]
        self.pieces = [
            Piece(self.values[begin:end], self.grads[begin:end], decays, component, self.rounded and self.rounded.rounded[begin:end])
            for (begin, decays, component), end in zip(kinds, [*self.begins[1:], size + ALIGNMENT], strict=True)
        ]
        self.refresh()

    def refresh(self) -> None:
        """Round the parameters anew, unless nobody but the optimizer has written to them."""
        if self.rounded and not all(weights.is_attached(parameter) for parameter in self.leaves.values()):
            self.rounded.refresh()
            for slot, parameter in zip(self.slots, self.leaves.values(), strict=True):
                weights.attach(parameter, self.rounded, slot.view(self.rounded.rounded))

    @contextmanager
    def updated(self) -> Iterator[None]:
        """Inside, whoever changes the values of the pieces rounds them alike."""
        was_fresh = self.rounded and self.rounded.is_fresh()
        yield
        if self.rounded and was_fresh:
            self.rounded.mark_fresh()

    def norm(self) -> Tensor:
        """Of the whole gradient, which processes have summed before, `taint` included."""
        return torch.linalg.vector_norm(self.grads)

    def whole(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parts as a tensor per parameter, without a copy."""
        indices = [bisect_right(self.begins, slot.start) - 1 for slot in self.slots]
        return {slot.name: slot.view(parts[index], self.begins[index]) for slot, index in zip(self.slots, indices, strict=True)}

    def fill(self, parts: Sequence[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set the parts from a tensor per parameter. Raises ValueError when names or shapes differ."""
        self.check(tensors)
        for name, view in self.whole(parts).items():
            view.copy_(tensors[name])


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is subject to weight decay."""
    return parameter.ndim >= 2 and name.endswith("weight")


def component_of(name: str) -> str:
    """What a parameter of this name belongs to: the tokenizer of a modality, the head of a task, or the trunk, which is ""."""
    kind, *others = name.split(".")
    return f"{kind}.{others[0]}" if kind in ("tokenizers", "heads") else ""


class Optimizer:
    """Clip by the global norm, then SGD with momentum or AdamW, then the moving average; all without a word to the host.

    Nothing changes on an update whose loss or gradient is not finite. `components` of the model can rest, each on its own; `count` has the
    number of updates of each.
    """

    def __init__(self, parameters: Parameters, config: Optim) -> None:
        self.parameters, self.config = parameters, config
        values = [piece.values for piece in parameters.pieces]
        names = ("momentum",) if config.name == "sgd" else ("exp_avg", "exp_avg_sq")
        self.moments = {name: [torch.zeros_like(part) for part in values] for name in names}
        self.components = list(dict.fromkeys(piece.component for piece in parameters.pieces))
        self.count = torch.zeros(len(self.components), device=values[0].device)
        self.ema = [part.clone() for part in values] if config.ema_decay else None

    def update(self, lr: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One update from the gradients gathered so far, which are zeroed. Gives (gradient norm, whether it was done).

        `active` tells on the device for each of `components` whether it takes part; without it all do.
        """
        norm, clip_norm = self.parameters.norm(), self.config.clip_norm
        done = norm.isfinite()
        scale = (clip_norm / norm).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
        moves = done.expand(len(self.components)) if active is None else active & done
        self.count += moves
        with self.parameters.updated():
            for index in range(len(self.parameters.pieces)):
                self._update_piece(index, lr, scale, moves)
        return norm, done

    def _update_piece(self, index: int, lr: Tensor, scale: Tensor, moves: Tensor) -> None:
        piece, config = self.parameters.pieces[index], self.config
        place = self.components.index(piece.component)
        moments = {name: parts[index] for name, parts in self.moments.items()}
        ema = None if self.ema is None else self.ema[index]
        common = {"lr": lr, "scale": scale, "ok": moves[place], "ema": ema, "ema_decay": config.ema_decay, "copy": piece.rounded}
        common["weight_decay"] = config.weight_decay if piece.decays else 0.0
        if config.name == "sgd":
            ops.sgd_(piece.values, piece.grads, moments["momentum"], **common, momentum=config.momentum)
        else:
            first, second = moments["exp_avg"], moments["exp_avg_sq"]
            ops.adamw_(piece.values, piece.grads, first, second, self.count[place], **common, betas=config.betas, eps=config.eps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the moving average as its weights, when there is one."""
        if self.ema is None:
            yield
            return
        values = [piece.values for piece in self.parameters.pieces]
        kept = [part.clone() for part in values]
        _copy(values, self.ema)
        try:
            yield
        finally:
            _copy(values, kept)

    def tensors(self) -> dict[str, Tensor]:
        """All that must be saved beside the weights, by name; as in `Parameters.whole`."""
        moments = {f"{moment}.{name}": t for moment, parts in self.moments.items() for name, t in self.parameters.whole(parts).items()}
        return moments | self._counts()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises ValueError when it belongs to another model or optimizer."""
        for moment, parts in self.moments.items():
            prefix = f"{moment}."
            self.parameters.fill(parts, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        counts = self._counts()
        other = sorted(counts.keys() ^ {name for name in tensors if name.partition(".")[0] == "count"})
        if other:
            raise ValueError(f"the checkpoint counts the updates of other components, by another optim.absent: {', '.join(other[:5])}")
        for name, count in counts.items():
            count.copy_(tensors[name])

    def _counts(self) -> dict[str, Tensor]:
        """Views of `count` by name; that of the trunk, or of all at once, is "count"."""
        names = ["count" + (name and f".{name}") for name in self.components]
        return dict(zip(names, self.count, strict=True))

    def average_tensors(self) -> dict[str, Tensor] | None:
        """The moving average as in `Parameters.whole`, when there is one."""
        return None if self.ema is None else self.parameters.whole(self.ema)

    def load_average(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `average_tensors` gave. Raises ValueError when there is no moving average here, or it is another model's."""
        if self.ema is None:
            raise ValueError("optim.ema_decay = 0: there is no moving average to restore")
        self.parameters.fill(self.ema, tensors)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
