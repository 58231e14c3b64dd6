"""What a backward pass knows about the gradient that it returns, kept beside it for the next one: its rounded form, its columns' sums.

Autograd hands the very tensor on. Where it has to add two gradients, or a hook replaces one, it hands on another tensor or changes this
one's version, and what was kept counts for nothing. Graphs that are traced neither keep nor find anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_polyvit_companions"


class _Companions(NamedTuple):
    low: Tensor | None
    sums: Tensor | None
    versions: list[int]


def can_attach(grad: Tensor) -> bool:
    """Whether something may be kept beside `grad`: a plain tensor whose next reader is not being traced."""
    return not torch.compiler.is_compiling() and type(grad) is Tensor


def attach(grad: Tensor, *, low: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """`grad`, with what is known about it: the same in a lower precision, and the sums of its columns; empty tensors tell nothing."""
    low, sums = (tensor if tensor is not None and tensor.numel() else None for tensor in (low, sums))
    if can_attach(grad) and (low is not None or sums is not None):
        setattr(grad, _ATTRIBUTE, _Companions(low, sums, _versions(grad, low, sums)))
    return grad


def low_form(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` in `dtype`."""
    found = _find(grad)
    return found.low if found and found.low is not None and found.low.dtype is dtype else grad.to(dtype)


def column_sums(grad: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`[columns]` in `dtype`: the sums of `grad` over all its rows, which are the last axes that hold so many numbers."""
    found = _find(grad)
    if found and found.sums is not None and torch.promote_types(found.sums.dtype, dtype) is found.sums.dtype:
        return found.sums.view(columns).to(dtype)
    return grad.reshape(-1, columns).sum(0).to(dtype)


def _find(grad: Tensor) -> _Companions | None:
    found = getattr(grad, _ATTRIBUTE, None) if can_attach(grad) else None
    return found if found and found.versions == _versions(grad, found.low, found.sums) else None


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]
