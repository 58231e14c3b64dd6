"""What a backward pass knows about the gradient that it returns, kept beside it for the next one: its rounded form, its columns' sums.

Autograd hands the very tensor on. Where it has to add two gradients, or a hook replaces one, it hands on another tensor or changes this
one's version, and what was kept counts for nothing. Graphs that are traced neither keep nor find anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_polyvit_companions"


@dataclass
class _Companions:
    grad_version: int
    low: Tensor | None
    low_version: int
    sums: Tensor | None
    sums_version: int


def can_attach(grad: Tensor) -> bool:
    """Whether something may be kept beside `grad`: a plain tensor whose next reader is not being traced."""
    return not torch.compiler.is_compiling() and type(grad) is Tensor


def attach(grad: Tensor, *, low: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """`grad`, with what is known about it: the same in a lower precision, and the sums of its columns; empty tensors tell nothing."""
    low, sums = (tensor if tensor is not None and tensor.numel() else None for tensor in (low, sums))
    if can_attach(grad) and (low is not None or sums is not None):
        setattr(grad, _ATTRIBUTE, _Companions(grad._version, low, _version(low), sums, _version(sums)))
    return grad


def low_form(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` in `dtype`, to be read."""
    found = _find(grad)
    if found is None or found.low is None or found.low.dtype is not dtype or found.low_version != _version(found.low):
        return grad.to(dtype)
    return found.low


def column_sums(grad: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`[columns]` in `dtype`: the sums of `grad` over all its rows, which are the last axes that hold so many numbers."""
    found = _find(grad)
    if found is None or found.sums is None or found.sums_version != _version(found.sums) or _is_wider(dtype, found.sums.dtype):
        return grad.reshape(-1, columns).sum(0).to(dtype)
    # Given away once: they become a parameter's gradient, to which others are added in place.
    sums, found.sums = found.sums, None
    return sums.view(columns).to(dtype)


def _find(grad: Tensor) -> _Companions | None:
    found = getattr(grad, _ATTRIBUTE, None) if can_attach(grad) else None
    return found if found and found.grad_version == grad._version else None


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    return torch.promote_types(dtype, other) is not other
