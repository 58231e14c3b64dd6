"""Memory as kernels see it: tensors of the host behind pointers and descriptors, and views of shared memory with its mbarriers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gluon_machine import Allocation, Barrier, FaultError, Machine
from gluon_values import Value, rounded, values_of
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

_ALIGNMENT = 16  # bytes, of the first column of a TMA copy
_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int32: gl.int32,
    torch.int64: gl.int64,
    torch.bool: gl.int1,
}


@dataclass
class Report:
    """What was executed: (kernel, grid) of each launch, bytes that TMA loaded, number of wgmmas."""

    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    copied_bytes: int = 0
    products: int = 0


class Now:
    """What is being executed; the programs of a launch have numbers from 1."""

    report: Report
    assembly: Mapping[str, Callable]
    grid: tuple[int, ...]
    program: tuple[int, ...]
    number: int
    machine: Machine
    allocations: list[Allocation]


class Memory:
    """The storage of a tensor, and who read and wrote which element in the present launch: programs from 1, −1 for several readers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        num_elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        self.storage = tensor.data.as_strided((num_elements,), (1,), 0)  # autograd does not see what a kernel writes
        self.dtype = _DTYPES[tensor.dtype]
        self.ever_written = np.zeros(num_elements, bool)

    def begin(self) -> None:
        """Take the values that the storage has now."""
        values = self.storage.float() if self.dtype.is_floating() else self.storage
        self.values = np.array(values.numpy())
        self.reader, self.writer = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)

    def end(self) -> None:
        """Put what was written into the storage."""
        addresses = torch.from_numpy(np.flatnonzero(self.writer))
        self.storage[addresses] = torch.from_numpy(self.values).to(self.storage.dtype)[addresses]

    def read(self, addresses: np.ndarray) -> np.ndarray:
        """Of elements that no other program writes."""
        me = Now.number
        if np.any((self.writer[addresses] != 0) & (self.writer[addresses] != me)):
            raise FaultError("a program reads what another one writes")
        self.reader[addresses] = np.where(np.isin(self.reader[addresses], (0, me)), me, -1)
        return self.values[addresses]

    def write(self, addresses: np.ndarray, values: np.ndarray, *, again: bool) -> None:
        """Elements that nobody else writes or reads."""
        me = Now.number
        if not again and (np.any(self.writer[addresses]) or len(np.unique(addresses)) < addresses.size):
            raise FaultError("an element is written twice in one launch")
        if np.any((self.reader[addresses] != 0) & (self.reader[addresses] != me)):
            raise FaultError("a program writes what another one reads")
        self.writer[addresses] = me
        self.ever_written[addresses] = True
        self.values[addresses] = rounded(values, self.dtype)


@dataclass
class Span:
    """The part of a memory that an argument may reach: its tensor's."""

    name: str
    memory: Memory
    tensor: torch.Tensor
    is_rewritten: bool = False

    def __post_init__(self) -> None:
        self.first = self.tensor.storage_offset()
        steps = ((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        self.end = self.first + (1 + sum(steps) if self.tensor.numel() else 0)

    def check(self, addresses: np.ndarray) -> None:
        """Raise where an address is outside."""
        if addresses.size and (addresses.min() < self.first or addresses.max() >= self.end):
            first, last = addresses.min() - self.first, addresses.max() - self.first
            raise FaultError(f"{self.name} is accessed at {first} to {last}, but has {self.end - self.first}")

    def find_gaps(self) -> int:
        """How many elements were never written, in a tensor of which some were."""
        addresses = torch.arange(len(self.memory.storage)).as_strided(self.tensor.shape, self.tensor.stride(), self.first).numpy()
        written = self.memory.ever_written[addresses]
        return int((~written).sum()) if written.any() else 0


class Pointer:
    """One or many addresses in the reach of an argument."""

    __array_ufunc__ = None

    def __init__(self, span: Span, addresses: Any) -> None:
        self.span, self.addresses = span, np.asarray(addresses, np.int64)
        self.dtype = SimpleNamespace(element_ty=span.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.span, self.addresses + values_of(offset))

    __radd__ = __add__

    def __sub__(self, offset: Any) -> "Pointer":
        return Pointer(self.span, self.addresses - values_of(offset))

    def __getitem__(self, addresses: Any) -> "Pointer":
        return Pointer(self.span, self.addresses[addresses])


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Value:
    """gl.load; without `other`, what the mask leaves out is NaN."""
    addresses, allowed = np.broadcast_arrays(pointer.addresses, True if mask is None else values_of(mask))
    dtype = pointer.span.memory.dtype
    nothing = np.nan if dtype.is_floating() else 0
    values = np.full(addresses.shape, nothing if other is None else values_of(other), np.float32 if dtype.is_floating() else np.int64)
    pointer.span.check(addresses[allowed])
    values[allowed] = pointer.span.memory.read(addresses[allowed])
    return Value(values, dtype)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    """gl.store."""
    addresses, values, allowed = np.broadcast_arrays(pointer.addresses, values_of(value), True if mask is None else values_of(mask))
    pointer.span.check(addresses[allowed])
    pointer.span.memory.write(addresses[allowed], values[allowed], again=pointer.span.is_rewritten)


@dataclass
class Descriptor:
    """A tensor descriptor: blocks of a tensor, with zeros outside of it."""

    span: Span
    first: int
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any

    @property
    def dtype(self) -> Any:
        return self.span.memory.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=self.block_shape, element_ty=self.dtype, nbytes=self.nbytes_per_cta)

    @property
    def nbytes_per_cta(self) -> int:
        return prod(self.block_shape) * self.dtype.primitive_bitwidth // 8

    def find(self, coordinates: list) -> tuple[np.ndarray, np.ndarray]:
        """The addresses of a block, and which of them are in the tensor."""
        starts = [int(values_of(x)) for x in coordinates]
        if len(starts) != len(self.block_shape):
            raise FaultError(f"{len(starts)} coordinates for a descriptor of {len(self.block_shape)} dimensions")
        if starts[-1] * self.dtype.primitive_bitwidth // 8 % _ALIGNMENT:
            raise FaultError(f"a TMA copy begins at column {starts[-1]}, no multiple of {_ALIGNMENT} bytes")
        addresses, inside = np.int64(self.first), np.bool_(True)
        for axis, (start, size) in enumerate(zip(starts, self.block_shape, strict=True)):
            index = (start + np.arange(size)).reshape([-1 if other == axis else 1 for other in range(len(starts))])
            addresses = addresses + index * self.strides[axis]
            inside = inside & (index >= 0) & (index < self.shape[axis])
        return addresses, inside


class Shared:
    """A view of an allocation."""

    def __init__(self, allocation: Allocation, values: np.ndarray, known: np.ndarray, dtype: Any, layout: Any) -> None:
        self.allocation, self.values, self.known, self.dtype, self.layout = allocation, values, known, dtype, layout

    def _view(self, change: Callable[[np.ndarray], np.ndarray]) -> "Shared":
        values = change(self.values)
        if not np.may_share_memory(values, self.values):
            raise FaultError(f"a view of {self.allocation.name} that is none: its elements would have to be moved")
        return Shared(self.allocation, values, change(self.known), self.dtype, self.layout)

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    def index(self, index: Any) -> "Shared":
        index = _check_index(index, len(self.values))
        return self._view(lambda array: array[index])

    def slice(self, start: Any, length: int, dim: int = 0) -> "Shared":
        first = _check_index(start, self.shape[dim] - length + 1)
        return self._view(lambda array: array[(*(slice(None),) * dim, slice(first, first + length))])

    def reshape(self, shape: Any) -> "Shared":
        return self._view(lambda array: array.reshape(shape))

    def permute(self, order: Any) -> "Shared":
        return self._view(lambda array: array.transpose(order))

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> "Shared":
        """Of the same type and layout: the rows in other groups."""
        if dtype != self.dtype or layout != self.layout or int(shape[-1]) != self.shape[-1]:
            raise NotImplementedError("shared memory taken for another type or layout")
        return self.reshape([int(size) for size in shape])

    def read(self, what: str) -> np.ndarray:
        """What it holds, all of which must have been written."""
        if not self.known.all():
            raise FaultError(f"{what} reads what nobody wrote in {self.allocation.name}")
        return self.values.copy()

    def load(self, layout: Any = None) -> Value:
        Now.machine.read(self.allocation, self.values, "a load")
        return Value(self.read("a load"), self.dtype)

    def store(self, value: Value) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise FaultError(f"{value.dtype}{value.shape} is stored to {self.dtype}{self.shape} in {self.allocation.name}")
        Now.machine.write(self.allocation, self.values)
        self.values[...] = value.values
        self.known[...] = True

    def _keep_alive(self) -> None:
        """For the compiler."""


class Barriers:
    """mbarriers in shared memory."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, index: Any) -> Barrier:
        return self.barriers[_check_index(index, len(self.barriers))]

    def slice(self, start: Any, length: int) -> "Barriers":
        first = _check_index(start, len(self.barriers) - length + 1)
        return Barriers(self.barriers[first : first + length])


def _check_index(index: Any, size: int) -> int:
    """The index as a number, when it is one of `size`."""
    if not 0 <= int(index) < size:
        raise FaultError(f"index {int(index)} of {size} in shared memory")
    return int(index)


def allocate(dtype: Any, shape: Any, layout: Any, value: Value | None = None) -> Any:
    """gl.allocate_shared_memory: mbarriers where the layout is theirs."""
    sizes = tuple(int(size) for size in shape)
    name = f"allocation {len(Now.allocations)} of {dtype}{list(sizes)}"
    Now.machine.allocate(prod(sizes) * dtype.primitive_bitwidth // 8)
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        barriers = [Barrier(f"barrier {index} of {name}") for index in range(sizes[0])]
        return Barriers(barriers) if len(sizes) > 1 else barriers[0]
    allocation = Allocation(sizes, dtype, name)
    Now.allocations.append(allocation)
    shared = Shared(allocation, allocation.values, allocation.known, dtype, layout)
    if value is not None:
        shared.store(value)
    return shared
