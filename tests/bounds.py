"""Bounds checks in Triton's interpreter: a kernel fails that reads or writes outside of the tensor that the address was computed from.

A GPU seldom notices, as the memory next to a tensor mostly belongs to another. Here every argument has a range of addresses of its own, far
from those of the others, even where two arguments are neighbours in one buffer.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

SPACING_BITS = 44
SPACING = 1 << SPACING_BITS
"""Bytes from one range to the next: no 32-bit offset leads there."""

NO_ARGUMENT = np.zeros((3, 1), np.int64)
"""The first address, the bytes and the true address of what lies below the first range: nothing."""


class OutOfBoundsError(Exception):
    """An address at which its argument has no element."""


class Bounds:
    """The arguments of the current launch, which the interpreter's loads and stores are checked against."""

    def __init__(self) -> None:
        self.num_checked: Counter[str] = Counter()
        """Elements read and written, by kernel."""
        self._kernel = ""
        self._arguments: list[Tensor] = []
        self._ranges = NO_ARGUMENT

    def begin(self, kernel: str) -> None:
        """A launch begins, with no arguments yet."""
        self._kernel, self._arguments, self._ranges = kernel, [], NO_ARGUMENT

    def address(self, tensor: Tensor) -> int:
        """The address that the kernel gets for an argument, aligned as its true one."""
        self._arguments.append(tensor)
        begin = len(self._arguments) * SPACING + tensor.data_ptr() % 4096
        self._ranges = np.column_stack([self._ranges, [begin, _extent(tensor), tensor.data_ptr()]])
        return begin

    def translate(self, addresses: np.ndarray, mask: np.ndarray, num_bytes: int) -> np.ndarray:
        """The true addresses of elements of `num_bytes` each. Raises OutOfBoundsError for an address under the mask that has no element."""
        addresses = addresses.astype(np.int64)
        begin, extent, data_ptr = self._ranges[:, np.clip(addresses >> SPACING_BITS, 0, len(self._arguments))]
        offsets = addresses - begin
        outside = mask & ((offsets < 0) | (offsets + num_bytes > extent))
        if outside.any():
            raise OutOfBoundsError(f"{self._kernel}: {outside.sum()} elements, the first of them {self._describe(addresses[outside][0])}")
        self.num_checked[self._kernel] += int(mask.sum())
        return np.where(mask, offsets + data_ptr, 0).astype(np.uint64)

    def _describe(self, address: int) -> str:
        number = min(max(1, (address + SPACING // 2) // SPACING), len(self._arguments)) - 1
        tensor = self._arguments[number]
        kind = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
        return f"at byte {address - self._ranges[0, number + 1]} of the {_extent(tensor)} of tensor {number}, {kind}"


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.itemsize * (last + 1) if tensor.numel() else 0


@pytest.fixture
def bounds(monkeypatch) -> Bounds:
    """Kernels in the interpreter fail when they access memory outside of their tensors."""
    found, builder = Bounds(), interpreter.InterpreterBuilder
    run, convert, load, store = (
        interpreter.GridExecutor.__call__,
        interpreter._implicit_cvt,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        found.begin(self.fn.__name__)
        run(self, *args, **kwargs)

    def convert_argument(argument: Any) -> Any:
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data[:] = found.address(getattr(argument, "base", argument))
        return converted

    def translated(pointers: Any, mask: Any) -> Any:
        num_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return interpreter.TensorHandle(found.translate(pointers.data, mask.data, num_bytes), pointers.dtype)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_argument)
    monkeypatch.setattr(builder, "create_masked_load", lambda self, p, mask, *rest: load(self, translated(p, mask), mask, *rest))
    monkeypatch.setattr(builder, "create_masked_store", lambda self, p, b, mask, *rest: store(self, translated(p, mask), b, mask, *rest))
    return found
