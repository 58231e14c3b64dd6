"""What a backward pass knows about the gradient that it returns, for the backward pass that reads it next.

A fused norm writes, in the pass that makes the gradient of its residual stream, also a copy in the dtype of the products (bf16, say) and
the sums of its columns, which are the gradient of the preceding layer's bias. Both are attached to the gradient's tensor. Autograd hands
on the same tensor where nothing is added to it; where it adds two gradients, or a hook replaces or changes one, the tensor or its version
is another, and what was attached is ignored. Nothing is attached, or looked for, in a graph that is traced.

With drop path the layer before wants both multiplied by the factors of its examples. The forward pass attaches these to the residual
stream, where the next norm finds them, so that the norm's backward multiplies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_polyvit_known"
_FACTORS = "_polyvit_factors"


@dataclass
class _Known:
    """`Tensor._version` counts what has been written to a tensor; as of torch 2.13 it has no public name."""

    grad_version: int
    copy: Tensor | None
    copy_version: int
    sums: Tensor | None
    sums_version: int
    factors: Tensor | None


def can_attach(grad: Tensor) -> bool:
    """Whether something may be attached to `grad`: a plain tensor, outside of a graph that is traced."""
    return not torch.compiler.is_compiling() and type(grad) is Tensor


def attach(grad: Tensor, *, copy: Tensor | None = None, sums: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """`grad`, with a copy in a lower precision and the sums of its columns attached; an empty tensor counts as none.

    With `factors`, one for each example, both are those of `grad` multiplied by these.
    """
    copy, sums = (tensor if tensor is not None and tensor.numel() else None for tensor in (copy, sums))
    if can_attach(grad) and (copy is not None or sums is not None):
        setattr(grad, _ATTRIBUTE, _Known(grad._version, copy, _version(copy), sums, _version(sums), factors))
    return grad


def cast_gradient(grad: Tensor, dtype: torch.dtype, factors: Tensor | None = None) -> Tensor:
    """`grad`, multiplied by the `factors` of its examples if there are any, in `dtype`; only to be read."""
    known = _find(grad, factors)
    if known is None or known.copy is None or known.copy.dtype is not dtype or known.copy_version != _version(known.copy):
        return multiply(grad, factors).to(dtype)
    return known.copy


def sum_columns(grad: Tensor, columns: int, dtype: torch.dtype, factors: Tensor | None = None) -> Tensor:
    """`[columns]` in `dtype`: the sum of all rows of `grad`, a row being the last axes that hold so many numbers.

    With `factors` each row is multiplied by its example's first.
    """
    known = _find(grad, factors)
    if known is None or known.sums is None or known.sums_version != _version(known.sums) or _is_wider(dtype, known.sums.dtype):
        return multiply(grad, factors).reshape(-1, columns).sum(0).to(dtype)
    # Given away once: they become a parameter's gradient, to which autograd may add others.
    sums, known.sums = known.sums, None
    return sums.view(columns).to(dtype)


def cast_and_sum(
    grad: Tensor, columns: int, dtype: torch.dtype, factors: Tensor | None, *, wants_sums: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`cast_gradient` and, where wanted, `sum_columns`; `grad` is multiplied by the factors once where neither is known."""
    if factors is not None and _find(grad, factors) is None:
        grad, factors = multiply(grad, factors), None
    return cast_gradient(grad, dtype, factors), sum_columns(grad, columns, dtype, factors) if wants_sums else None


def multiply(x: Tensor, factors: Tensor | None) -> Tensor:
    """Each example of x times its factor, in the wider of their dtypes."""
    return x if factors is None else x * expand_factors(factors, x)


def expand_factors(factors: Tensor, x: Tensor) -> Tensor:
    """`[batch, 1, ...]`: in the shape that multiplies the examples of x."""
    return factors.view(len(x), *[1] * (x.ndim - 1))


def keep_factors(x: Tensor, factors: Tensor | None) -> Tensor:
    """`x`, a residual stream, with the factors of the branch that was added last attached."""
    if factors is not None and can_attach(x):
        setattr(x, _FACTORS, factors)
    return x


def find_factors(x: Tensor) -> Tensor | None:
    """The factors of the branch that was added to `x` last."""
    return getattr(x, _FACTORS, None) if can_attach(x) else None


def _find(grad: Tensor, factors: Tensor | None) -> _Known | None:
    known = getattr(grad, _ATTRIBUTE, None) if can_attach(grad) else None
    return known if known and known.grad_version == grad._version and known.factors is factors else None


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    return torch.promote_types(dtype, other) is not other
