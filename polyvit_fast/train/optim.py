"""Parameters and gradients as one flat buffer each, and one optimizer over all tasks on top of them.

Parameters that a step does not use have a zero gradient, not none: their momentum decays and still moves them, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyvit_fast.config import Optim
from polyvit_kernels import ops

ALIGNMENT = 64  # elements: every parameter starts at a 256-byte boundary of the buffer


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffers."""

    name: str
    shape: torch.Size
    start: int

    def view(self, buffer: Tensor) -> Tensor:
        """This parameter's part of a flat buffer."""
        return buffer[self.start : self.start + self.shape.numel()].view(self.shape)


class FlatParameters:
    """All parameters of a model in one flat buffer, their gradients in another; the model's own tensors become views of them.

    Weight matrices come first, so that `decayed` of the buffer's elements are subject to weight decay and the others are not.
    """

    def __init__(self, model: nn.Module) -> None:
        named = sorted(model.named_parameters(), key=lambda item: not _is_matrix(*item))
        self.slots: list[Slot] = []
        self.decayed = size = 0
        for name, parameter in named:
            self.slots.append(Slot(name, parameter.shape, size))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.decayed = size if _is_matrix(name, parameter) else self.decayed
        device = named[0][1].device
        self.values, self.grads = torch.zeros(size, device=device), torch.zeros(size, device=device)
        for slot, (_, parameter) in zip(self.slots, named, strict=True):
            slot.view(self.values).copy_(parameter.detach())
            parameter.data = slot.view(self.values)
            parameter.grad = slot.view(self.grads)

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """A flat buffer as a tensor per parameter."""
        return {slot.name: slot.view(buffer) for slot in self.slots}

    def load(self, buffer: Tensor, tensors: dict[str, Tensor]) -> None:
        """Fill a flat buffer from a tensor per parameter. Raises ValueError when names or shapes differ."""
        ours = {slot.name: slot.shape for slot in self.slots}
        theirs = {name: tensor.shape for name, tensor in tensors.items()}
        if ours != theirs:
            different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(f"the checkpoint's tensors are not this model's: {', '.join(different[:5])} differ")
        for slot in self.slots:
            slot.view(buffer).copy_(tensors[slot.name])


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name.endswith("weight")


class Optimizer:
    """Clip by the global norm, then SGD with momentum or AdamW, then the moving average; all without a word to the host.

    Nothing changes on an update whose loss or gradient is not finite.
    """

    def __init__(self, parameters: FlatParameters, config: Optim) -> None:
        self.parameters, self.config = parameters, config
        values = parameters.values
        names = ("momentum",) if config.name == "sgd" else ("exp_avg", "exp_avg_sq")
        self.moments = {name: torch.zeros_like(values) for name in names}
        self.count = torch.zeros((), device=values.device)
        self.ema = values.clone() if config.ema_decay else None

    def update(self, lr: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """One update from the gradients gathered so far, which are zeroed. Gives (gradient norm, whether it was done)."""
        flat, config = self.parameters, self.config
        norm = torch.linalg.vector_norm(flat.grads)
        done = finite & norm.isfinite()
        scale = (config.clip_norm / norm).clamp(max=1.0) if config.clip_norm else torch.ones_like(norm)
        self.count += done
        for part, decay in ((slice(0, flat.decayed), config.weight_decay), (slice(flat.decayed, None), 0.0)):
            self._update_part(part, lr, scale, done, decay)
        return norm, done

    def _update_part(self, part: slice, lr: Tensor, scale: Tensor, done: Tensor, weight_decay: float) -> None:
        values, grads, config = self.parameters.values[part], self.parameters.grads[part], self.config
        moments = {name: moment[part] for name, moment in self.moments.items()}
        ema = None if self.ema is None else self.ema[part]
        common = {"lr": lr, "scale": scale, "ok": done, "weight_decay": weight_decay, "ema": ema, "ema_decay": config.ema_decay}
        if config.name == "sgd":
            ops.sgd_(values, grads, moments["momentum"], **common, momentum=config.momentum)
        else:
            first, second = moments["exp_avg"], moments["exp_avg_sq"]
            ops.adamw_(values, grads, first, second, self.count, **common, betas=config.betas, eps=config.eps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the moving average as its weights, when there is one."""
        if self.ema is None:
            yield
            return
        values = self.parameters.values
        kept = values.clone()
        values.copy_(self.ema)
        try:
            yield
        finally:
            values.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """All that must be saved beside the weights, by name."""
        moments = {f"{moment}.{name}": t for moment, buffer in self.moments.items() for name, t in self.parameters.named(buffer).items()}
        return moments | {"count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave. Raises ValueError when it belongs to another model or optimizer."""
        for moment, buffer in self.moments.items():
            prefix = f"{moment}."
            self.parameters.load(buffer, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.count.copy_(tensors["count"])
