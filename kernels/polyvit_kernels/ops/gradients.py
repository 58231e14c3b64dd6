"""What a backward pass knows about the gradient that it returns, kept beside it for the next one: its rounded form, its columns' sums.

Autograd hands the very tensor on. Where it has to add two gradients, or a hook replaces one, it hands on another tensor or changes this
one's version, and what was kept counts for nothing. Graphs that are traced neither keep nor find anything.

With drop path a branch that was added to the residual stream wants both multiplied by its factors. The forward keeps these beside the
sum, where the norm that follows finds them, so that its backward multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_polyvit_companions"
_FACTORS = "_polyvit_factors"


@dataclass
class _Companions:
    grad_version: int
    low: Tensor | None
    low_version: int
    sums: Tensor | None
    sums_version: int
    factors: Tensor | None


def can_attach(grad: Tensor) -> bool:
    """Whether something may be kept beside `grad`: a plain tensor whose next reader is not being traced."""
    return not torch.compiler.is_compiling() and type(grad) is Tensor


def attach(grad: Tensor, *, low: Tensor | None = None, sums: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """`grad`, with what is known about it: the same in a lower precision, and the sums of its columns; empty tensors tell nothing.

    With `factors` they are known of `grad` multiplied by these, one for each example.
    """
    low, sums = (tensor if tensor is not None and tensor.numel() else None for tensor in (low, sums))
    if can_attach(grad) and (low is not None or sums is not None):
        setattr(grad, _ATTRIBUTE, _Companions(grad._version, low, _version(low), sums, _version(sums), factors))
    return grad


def low_form(grad: Tensor, dtype: torch.dtype, factors: Tensor | None = None) -> Tensor:
    """`grad`, multiplied by the `factors` of its examples if there are any, in `dtype`, to be read."""
    found = _find(grad, factors)
    if found is None or found.low is None or found.low.dtype is not dtype or found.low_version != _version(found.low):
        return multiply(grad, factors).to(dtype)
    return found.low


def column_sums(grad: Tensor, columns: int, dtype: torch.dtype, factors: Tensor | None = None) -> Tensor:
    """`[columns]` in `dtype`: the sums of `grad` over all its rows, which are the last axes that hold so many numbers.

    With `factors` the rows are multiplied by their example's first.
    """
    found = _find(grad, factors)
    if found is None or found.sums is None or found.sums_version != _version(found.sums) or _is_wider(dtype, found.sums.dtype):
        return multiply(grad, factors).reshape(-1, columns).sum(0).to(dtype)
    # Given away once: they become a parameter's gradient, to which others are added in place.
    sums, found.sums = found.sums, None
    return sums.view(columns).to(dtype)


def low_form_and_sums(grad: Tensor, columns: int, dtype: torch.dtype, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, in which `grad` is multiplied once where they are not known."""
    if factors is not None and _find(grad, factors) is None:
        grad, factors = multiply(grad, factors), None
    return low_form(grad, dtype, factors), column_sums(grad, columns, dtype, factors)


def multiply(x: Tensor, factors: Tensor | None) -> Tensor:
    """Each example of x times its factor, in the wider of their dtypes."""
    return x if factors is None else x * as_broad(factors, x)


def as_broad(factors: Tensor, x: Tensor) -> Tensor:
    """`[batch, 1, ...]`: in the shape that multiplies the examples of x."""
    return factors.view(len(x), *[1] * (x.ndim - 1))


def keep_factors(x: Tensor, factors: Tensor | None) -> Tensor:
    """`x`, with the factors of the branch that it ends with."""
    if factors is not None and can_attach(x):
        setattr(x, _FACTORS, factors)
    return x


def find_factors(x: Tensor) -> Tensor | None:
    """Those of the branch that `x` ends with."""
    return getattr(x, _FACTORS, None) if can_attach(x) else None


def _find(grad: Tensor, factors: Tensor | None) -> _Companions | None:
    found = getattr(grad, _ATTRIBUTE, None) if can_attach(grad) else None
    return found if found and found.grad_version == grad._version and found.factors is factors else None


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    return torch.promote_types(dtype, other) is not other
