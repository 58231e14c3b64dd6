"""Parameters in the precision that products take under autocast: rounded at each use, or kept rounded by who updates them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyvit_kernels.ops.dtypes import is_autocast_on, matmul_dtype

_ATTRIBUTE = "_polyvit_rounded"


class RoundedBuffer:
    """A flat buffer of parameters, and the same rounded to `dtype`: kept so by whoever writes to the buffer, or `refresh`ed."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self.values, self.rounded = values, torch.empty_like(values, dtype=dtype)
        self.version = -1
        """Of `values`, when `rounded` was last the same."""

    def is_fresh(self) -> bool:
        """Whether nobody else has written to the buffer since."""
        return self.version == self.values._version

    def mark_fresh(self) -> None:
        """Say that what was written to `values` has been written to `rounded` as well."""
        self.version = self.values._version

    @torch.no_grad()
    def refresh(self) -> None:
        """Round all of the buffer anew."""
        self.rounded.copy_(self.values)
        self.mark_fresh()


class _Rounded(NamedTuple):
    """A parameter's place in a buffer, and the parameter's version when both were the same."""

    buffer: RoundedBuffer
    view: Tensor
    version: int

    def is_of(self, parameter: Tensor) -> bool:
        return self.version == parameter._version and self.buffer.is_fresh()


def attach(parameter: Tensor, buffer: RoundedBuffer, view: Tensor) -> None:
    """Let operations under autocast take `view`, a part of the buffer's rounded form, in the parameter's place.

    They do so until somebody writes to the parameter, or to the buffer in which it lies; writing past autograd, through `.data`, goes
    unseen. The parameter's gradient is as of the rounded form; with `grad_dtype` = None torch adds it to an fp32 one without a cast.
    """
    setattr(parameter, _ATTRIBUTE, _Rounded(buffer, view, parameter._version))


def is_attached(parameter: Tensor) -> bool:
    """Whether operations take a rounded form in the parameter's place, as nobody has written to it."""
    found = getattr(parameter, _ATTRIBUTE, None)
    return found is not None and found.is_of(parameter)


def cast(*operands: Tensor) -> list[Tensor]:
    """What autocast makes of the operands of a product."""
    return [rounded(tensor, matmul_dtype(tensor)) for tensor in operands] if is_autocast_on(operands[0]) else list(operands)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`."""
    found = None if torch.compiler.is_compiling() else getattr(tensor, _ATTRIBUTE, None)
    if found is None or found.view.dtype is not dtype or not found.is_of(tensor):
        return tensor.to(dtype)
    return _InPlaceOf.apply(tensor, found.view)


class _InPlaceOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, view: Tensor) -> Tensor:
        return view.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
