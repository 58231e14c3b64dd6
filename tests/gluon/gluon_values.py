"""Gluon's tensors and run-time numbers on a CPU: numpy arrays of a type of the language, which operators give as Triton would."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gluon_machine import FaultError
from triton.experimental.gluon import language as gl
from triton.language.semantic import TritonSemantic

_SEMANTIC = TritonSemantic.__new__(TritonSemantic)
_BF16_HALF, _BF16_MASK = np.uint32(0x7FFF), np.uint32(0xFFFF0000)


class Rounding:
    """Whether values of 16 bits are rounded to them; without, they are fp32."""

    is_on = True


def rounded(values: Any, dtype: Any) -> np.ndarray:
    """The values as the type holds them: of floating types in fp32, of integers in 64 bits that must fit the type's."""
    if dtype == gl.int1:
        return np.asarray(values, bool)
    if not dtype.is_floating():
        values = np.asarray(values, np.int64)
        limit = 1 << (dtype.primitive_bitwidth - 1)
        if values.size and (values.max() >= limit or values.min() < -limit):
            raise FaultError(f"{dtype} overflows: {values.min()} to {values.max()}")
        return values
    if dtype == gl.bfloat16 and Rounding.is_on:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return np.where(np.isnan(values), np.float32(np.nan), ((bits + (_BF16_HALF + ((bits >> 16) & 1))) & _BF16_MASK).view(np.float32))
    if dtype == gl.float16 and Rounding.is_on:
        return np.asarray(values).astype(np.float16).astype(np.float32)
    return np.asarray(values, np.float32)


class Value:
    """A tensor, or a number that is known at run time only."""

    __array_ufunc__ = None  # numpy leaves operators to it
    __hash__ = None

    def __init__(self, values: Any, dtype: Any) -> None:
        self.values, self.dtype = rounded(values, dtype), dtype

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.values[index], self.dtype)

    def __index__(self) -> int:
        return int(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __neg__(self) -> "Value":
        return Value(-self.values, self.dtype)

    def __invert__(self) -> "Value":
        return Value(~self.values, self.dtype)

    def to(self, dtype: Any) -> "Value":
        """Of another type; integers truncate towards zero."""
        return Value(self.values if dtype.is_floating() else np.trunc(self.values), dtype)

    def reshape(self, *shape: Any) -> "Value":
        return Value(self.values.reshape(*shape), self.dtype)

    def permute(self, *order: Any) -> "Value":
        return Value(self.values.transpose(*order), self.dtype)

    def broadcast_to(self, shape: Any) -> "Value":
        return Value(np.broadcast_to(self.values, [int(size) for size in shape]), self.dtype)


class Product:
    """A sum of products of wgmma that may be under way: the `number`-th of its partition. Only other products may take it as it is."""

    __array_ufunc__ = None

    def __init__(self, values: Any, dtype: Any, number: int) -> None:
        self.values, self.dtype, self.number = values, dtype, number

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    def finish(self, number: int) -> "Value | Product":
        """Its value, where it is among the products up to `number`, which are over."""
        return self if self.number > number else Value(self.values, self.dtype)

    def __getitem__(self, index: Any) -> None:
        raise FaultError("a product is read that was not waited for")

    to = reshape = permute = __getitem__


def values_of(x: Any) -> Any:
    """The numbers of a value, or the plain number."""
    if isinstance(x, Product):
        raise FaultError("a product is read that was not waited for")
    return x.values if isinstance(x, Value) else x


def promoted(one: Any, other: Any, *, is_division: bool = False) -> Any:
    """The type of a result, by Triton's own rules."""
    sides = [part for x in (one, other) for part in (dtype_of(x), not isinstance(x, Value))]
    return TritonSemantic.computation_type_impl(_SEMANTIC, *sides, is_division)


def dtype_of(x: Any) -> Any:
    """The type of a value, or the one that a plain number has by itself."""
    if isinstance(x, Value):
        return x.dtype
    if isinstance(x, bool):
        return gl.int1
    return gl.float32 if isinstance(x, float) else gl.int32 if -(1 << 31) <= x < 1 << 31 else gl.int64


def _operator(function: Callable, *, compares: bool = False) -> tuple[Callable, Callable]:
    """An operator and the one with its sides exchanged."""
    is_division = function in (np.true_divide, _floor_divide, _remainder)

    def operate(one: Any, other: Any) -> Any:
        if not all(isinstance(x, Value | Product | bool | int | float) for x in (one, other)):
            return NotImplemented
        sides = values_of(one), values_of(other)
        dtype = promoted(one, other, is_division=is_division)
        if function is np.true_divide and not dtype.is_floating():
            dtype = gl.float32
        return Value(function(*(rounded(side, dtype) for side in sides)), gl.int1 if compares else dtype)

    return operate, lambda one, other: operate(other, one)


def _check_positive(one: Any, other: Any) -> None:
    if np.any(np.less(one, 0)) or np.any(np.less(other, 0)):
        raise FaultError("a division of negative numbers: Python and the GPU round it differently")


def _floor_divide(one: Any, other: Any) -> Any:
    _check_positive(one, other)
    return np.floor_divide(one, other)


def _remainder(one: Any, other: Any) -> Any:
    _check_positive(one, other)
    return np.remainder(one, other)


for _name, _function in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": _floor_divide,
    "mod": _remainder,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}.items():
    for _prefix, _operate in zip(("", "r"), _operator(_function), strict=True):
        for _class in (Value, Product):
            setattr(_class, f"__{_prefix}{_name}__", _operate)
for _name, _function in {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}.items():
    setattr(Value, f"__{_name}__", _operator(_function, compares=True)[0])
