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

_ALIGNMENT = 16  # bytes, of a box's first column
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
    """What was executed: (kernel, grid) of each launch, bytes that TMA brought, products of wgmma."""

    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    copied_bytes: int = 0
    products: int = 0


class Now:
    """What is being executed: programs of a launch, one after the other, with numbers from 1."""

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
        places = torch.from_numpy(np.flatnonzero(self.writer))
        self.storage[places] = torch.from_numpy(self.values).to(self.storage.dtype)[places]

    def read(self, places: np.ndarray) -> np.ndarray:
        """Of elements that no other program writes."""
        me = Now.number
        if np.any((self.writer[places] != 0) & (self.writer[places] != me)):
            raise FaultError("a program reads what another one writes")
        self.reader[places] = np.where(np.isin(self.reader[places], (0, me)), me, -1)
        return self.values[places]

    def write(self, places: np.ndarray, values: np.ndarray, *, again: bool) -> None:
        """Elements that nobody else writes or reads."""
        me = Now.number
        if not again and (np.any(self.writer[places]) or len(np.unique(places)) < places.size):
            raise FaultError("an element is written twice in one launch")
        if np.any((self.reader[places] != 0) & (self.reader[places] != me)):
            raise FaultError("a program writes what another one reads")
        self.writer[places] = me
        self.ever_written[places] = True
        self.values[places] = rounded(values, self.dtype)


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

    def check(self, places: np.ndarray) -> None:
        """Raise where a place is outside."""
        if places.size and (places.min() < self.first or places.max() >= self.end):
            raise FaultError(
                f"{self.name} is accessed at {places.min() - self.first} to {places.max() - self.first}, but has {self.end - self.first}"
            )

    def find_gaps(self) -> int:
        """How many elements were never written, in a tensor of which some were."""
        places = torch.arange(len(self.memory.storage)).as_strided(self.tensor.shape, self.tensor.stride(), self.first).numpy()
        written = self.memory.ever_written[places]
        return int((~written).sum()) if written.any() else 0


class Pointer:
    """One or many addresses in the reach of an argument."""

    __array_ufunc__ = None

    def __init__(self, span: Span, places: Any) -> None:
        self.span, self.places = span, np.asarray(places, np.int64)
        self.dtype = SimpleNamespace(element_ty=span.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.span, self.places + values_of(offset))

    __radd__ = __add__

    def __sub__(self, offset: Any) -> "Pointer":
        return Pointer(self.span, self.places - values_of(offset))

    def __getitem__(self, places: Any) -> "Pointer":
        return Pointer(self.span, self.places[places])


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Value:
    """gl.load; without `other`, what the mask leaves out is NaN."""
    places, allowed = np.broadcast_arrays(pointer.places, True if mask is None else values_of(mask))
    dtype = pointer.span.memory.dtype
    nothing = np.nan if dtype.is_floating() else 0
    values = np.full(places.shape, nothing if other is None else values_of(other), np.float32 if dtype.is_floating() else np.int64)
    pointer.span.check(places[allowed])
    values[allowed] = pointer.span.memory.read(places[allowed])
    return Value(values, dtype)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    """gl.store."""
    places, values, allowed = np.broadcast_arrays(pointer.places, values_of(value), True if mask is None else values_of(mask))
    pointer.span.check(places[allowed])
    pointer.span.memory.write(places[allowed], values[allowed], again=pointer.span.is_rewritten)


@dataclass
class Descriptor:
    """A tensor descriptor: boxes of a tensor, zeros outside of it."""

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
        """The places of a box in memory, and which of them are in the tensor."""
        starts = [int(values_of(x)) for x in coordinates]
        if len(starts) != len(self.block_shape):
            raise FaultError(f"{len(starts)} coordinates for a descriptor of {len(self.block_shape)} dimensions")
        if starts[-1] * self.dtype.primitive_bitwidth // 8 % _ALIGNMENT:
            raise FaultError(f"a box begins at column {starts[-1]}, no multiple of {_ALIGNMENT} bytes")
        places, inside = np.int64(self.first), np.bool_(True)
        for axis, (start, size) in enumerate(zip(starts, self.block_shape, strict=True)):
            index = (start + np.arange(size)).reshape([-1 if other == axis else 1 for other in range(len(starts))])
            places = places + index * self.strides[axis]
            inside = inside & (index >= 0) & (index < self.shape[axis])
        return places, inside


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

    def index(self, place: Any) -> "Shared":
        place = _place(place, len(self.values))
        return self._view(lambda array: array[place])

    def slice(self, start: Any, length: int, dim: int = 0) -> "Shared":
        first = _place(start, self.shape[dim] - length + 1)
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

    def index(self, place: Any) -> Barrier:
        return self.barriers[_place(place, len(self.barriers))]

    def slice(self, start: Any, length: int) -> "Barriers":
        first = _place(start, len(self.barriers) - length + 1)
        return Barriers(self.barriers[first : first + length])


def _place(place: Any, size: int) -> int:
    if not 0 <= int(place) < size:
        raise FaultError(f"place {int(place)} of {size} in shared memory")
    return int(place)


def allocate(dtype: Any, shape: Any, layout: Any, value: Value | None = None) -> Any:
    """gl.allocate_shared_memory: mbarriers where the layout is theirs."""
    sizes = tuple(int(size) for size in shape)
    name = f"allocation {len(Now.allocations)} of {dtype}{list(sizes)}"
    Now.machine.allocate(prod(sizes) * dtype.primitive_bitwidth // 8)
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        barriers = [Barrier(f"barrier {place} of {name}") for place in range(sizes[0])]
        return Barriers(barriers) if len(sizes) > 1 else barriers[0]
    allocation = Allocation(sizes, dtype, name)
    Now.allocations.append(allocation)
    shared = Shared(allocation, allocation.values, allocation.known, dtype, layout)
    if value is not None:
        shared.store(value)
    return shared
