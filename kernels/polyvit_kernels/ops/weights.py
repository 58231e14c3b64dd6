"""Mixed precision: operations under autocast read a low-precision copy of an fp32 parameter that its optimizer keeps, where there is one.

Without such a copy autocast rounds the parameter at each use.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyvit_kernels.ops.dtypes import is_autocast_on, matmul_dtype

_ATTRIBUTE = "_polyvit_rounded"


class RoundedBuffer:
    """A flat buffer of parameters and its copy in `dtype`, which whoever writes to the buffer updates as well, or `refresh`es."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self.values, self.rounded = values, torch.empty_like(values, dtype=dtype)
        self.version = -1
        """The version of `values` of which `rounded` is the copy."""

    def is_fresh(self) -> bool:
        """Whether nothing has been written to `values` since the copy was made."""
        return self.version == self.values._version  # torch 2.13 has no public name for this counter

    def mark_fresh(self) -> None:
        """Declare that `rounded` holds what was last written to `values`."""
        self.version = self.values._version

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the whole buffer again."""
        self.rounded.copy_(self.values)
        self.mark_fresh()


class _Copy(NamedTuple):
    """A parameter's view of a buffer's copy, and the parameter's version when both were the same."""

    buffer: RoundedBuffer
    view: Tensor
    version: int

    def is_of(self, parameter: Tensor) -> bool:
        return self.version == parameter._version and self.buffer.is_fresh()


def attach(parameter: Tensor, buffer: RoundedBuffer, view: Tensor) -> None:
    """Let operations under autocast read `view`, a part of the buffer's copy, instead of the parameter.

    They do so until something is written to the parameter or to its buffer; a write through `.data`, past autograd, is not noticed. The
    parameter's gradient has the copy's dtype; with `grad_dtype` = None torch adds it to an fp32 one without a cast.
    """
    setattr(parameter, _ATTRIBUTE, _Copy(buffer, view, parameter._version))


def is_attached(parameter: Tensor) -> bool:
    """Whether operations read a copy instead of the parameter: there is one, and it is up to date."""
    found = getattr(parameter, _ATTRIBUTE, None)
    return found is not None and found.is_of(parameter)


def cast(*operands: Tensor) -> list[Tensor]:
    """The operands of a product in the dtype that autocast gives them."""
    return [cast_weight(tensor, matmul_dtype(tensor)) for tensor in operands] if is_autocast_on(operands[0]) else list(operands)


def cast_weight(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`: its attached copy where that is up to date."""
    found = None if torch.compiler.is_compiling() else getattr(tensor, _ATTRIBUTE, None)
    if found is None or found.view.dtype is not dtype or not found.is_of(tensor):
        return tensor.to(dtype)
    return _ReadCopy.apply(tensor, found.view)


class _ReadCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, view: Tensor) -> Tensor:
        return view.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
