"""Executes Gluon kernels for Hopper on a CPU, as Python functions on numpy arrays, and finds errors that a GPU would hide.

    with executing() as report:
        out = launcher(tensor)  # its launches are executed, on tensors in host memory

The kernels' own code runs, with stand-ins for the functions of the language. FaultError is raised for

- data races on shared memory, TMA copies and wgmmas that nobody waited for, wrong mbarrier phases, arrivals and byte counts, deadlocks
  (see `gluon_machine`, where partitions take turns at random: try several seeds);
- reads of shared memory that nobody wrote; a store that wgmma or TMA reads without `fence_async_shared`;
- addresses outside of their tensor; elements that one launch writes twice, that one program reads and another one writes, or that are
  left out of a tensor that is written at all;
- integers that overflow their type, `//` and `%` of negative ones.

Values are rounded to their types, or are fp32 throughout without `rounding`. As in Triton, an integer argument of 1 is a compile-time
constant. `_LANGUAGE` is what is known of the language, with the methods of `Value`, `Pointer`, `Descriptor`, `Shared` and `Barriers`;
`assembly` gives inline assembly its meaning; all else, such as atomics, clusters and scans, raises NotImplementedError. Not modelled:
layouts and what else the compiler checks, lifetimes of allocations, the order in which partitions of one program access global memory,
time.
"""

import functools
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import CellType, FunctionType, ModuleType
from typing import Any

import gluon_memory
import numpy as np
import torch
import triton.language as tl
from gluon_machine import Barrier, FaultError, Machine
from gluon_memory import Barriers, Descriptor, Memory, Now, Pointer, Report, Shared, Span
from gluon_values import Product, Rounding, Value, promoted, values_of
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ASSEMBLY = {"ex2.approx.ftz.f32 $0, $1;": np.exp2}
_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


def _each(function: Callable) -> Callable:
    """A function of each element."""
    return lambda x: Value(function(x.values), x.dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(x)).numpy()


def _pairwise(function: Callable) -> Callable:
    return lambda x, y, **_: Value(function(values_of(x), values_of(y)), promoted(x, y))


def _reduced(function: Callable) -> Callable:
    """Along an axis; of bf16, in fp32."""

    def reduce(x: Value, axis: int | None = None, keep_dims: bool = False, **_: Any) -> Value:
        values = function(values_of(x), axis=axis, keepdims=keep_dims)
        return Value(values, gl.float32 if x.dtype == gl.bfloat16 else x.dtype)

    return reduce


def _reduce(x: Value, axis: int, combine_fn: Callable, **_: Any) -> Value:
    return functools.reduce(combine_fn, [Value(part, x.dtype) for part in np.moveaxis(values_of(x), axis, 0)])


def _where(condition: Any, x: Any, y: Any) -> Value:
    return Value(np.where(values_of(condition), values_of(x), values_of(y)), promoted(x, y))


def _full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    return Value(np.full([int(size) for size in shape], values_of(value)), dtype)


def _ceil_divide(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


def _broadcast(x: Value, y: Value) -> tuple[Value, Value]:
    one, other = np.broadcast_arrays(x.values, y.values)
    return Value(one, x.dtype), Value(other, y.dtype)


def _split(x: Value) -> tuple[Value, Value]:
    return x[..., 0], x[..., 1]


def _join(x: Value, y: Value) -> Value:
    return Value(np.stack([x.values, y.values], -1), x.dtype)


def _assert(condition: Any, message: str = "", **_: Any) -> None:
    if not np.all(values_of(condition)):
        raise FaultError(f"an assertion of the kernel fails: {message}")


def _inline_assembly(asm: str, constraints: str, args: list[Value], dtype: Any, is_pure: bool, pack: int) -> Value:
    if asm not in Now.assembly:
        raise NotImplementedError(f"inline assembly: {asm}")
    return Value(Now.assembly[asm](*map(values_of, args)), dtype)


def _warp_specialize(functions_and_args: list, worker_num_warps: list[int], worker_num_regs: Any = None) -> Any:
    if len(worker_num_warps) != len(functions_and_args) - 1:
        raise FaultError(f"{len(functions_and_args)} partitions, but warps for {len(worker_num_warps)} workers")
    warps = [Now.machine.current.num_warps, *worker_num_warps]
    partitions = [
        (function.__name__, functools.partial(function, *args), num_warps)
        for (function, args), num_warps in zip(functions_and_args, warps, strict=True)
    ]
    return Now.machine.run_partitions(partitions)


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Without a library's threads, which wait for each other on a busy machine."""
    return np.einsum("...ik,...kj->...ij", a, b)


def _product(
    a: Any, b: Shared, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None, is_async: bool = False
) -> Any:
    """warpgroup_mma: what it reads from shared memory is read until it is waited for."""
    number = Now.machine.begin_product([(x.allocation, x.values) for x in (a, b) if isinstance(x, Shared)])
    left = a.read("a wgmma") if isinstance(a, Shared) else values_of(a)
    product = _multiply(left, b.read("a wgmma"))
    if a.dtype != b.dtype or list(product.shape) != acc.shape:
        raise FaultError(f"wgmma of {a.dtype}{a.shape} and {b.dtype}{b.shape} to {acc.shape}")
    Now.report.products += 1
    result = Product(product + acc.values if use_acc else product, acc.dtype, number)
    return result if is_async else _wait_products(0, [result])


def _wait_products(num_outstanding: int = 0, deps: Any = None) -> Any:
    over = Now.machine.wait_products(int(num_outstanding))
    results = tuple(dep.finish(over) if isinstance(dep, Product) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


def _product_by_warps(a: Value, b: Value, acc: Value, input_precision: Any = None) -> Value:
    """mma_v2: registers only."""
    return Value(_multiply(values_of(a), values_of(b)) + values_of(acc), acc.dtype)


def _check_block(descriptor: Descriptor, shared: Shared) -> None:
    if shared.shape != descriptor.block_shape or shared.dtype != descriptor.dtype:
        block = f"{descriptor.dtype}{descriptor.block_shape}"
        raise FaultError(f"a descriptor's block {block} is not the {shared.dtype}{shared.shape} of {shared.allocation.name}")


def _copy_to_shared(
    descriptor: Descriptor, coord: Any, barrier: Barrier, result: Shared, pred: Any = True, multicast: bool = False
) -> None:
    if multicast:
        raise NotImplementedError("multicast")
    if not pred:
        return
    _check_block(descriptor, result)
    addresses, inside = descriptor.find(coord)
    values = np.zeros(result.shape, result.values.dtype)
    values[inside] = descriptor.span.memory.read(addresses[inside])
    Now.machine.load(result.allocation, result.values, result.known, values, barrier, descriptor.nbytes_per_cta)
    Now.report.copied_bytes += descriptor.nbytes_per_cta


def _copy_from_shared(descriptor: Descriptor, coord: Any, src: Shared) -> None:
    _check_block(descriptor, src)
    addresses, inside = descriptor.find(coord)
    Now.machine.store(src.allocation, src.values)
    values = src.read("a copy")
    descriptor.span.memory.write(addresses[inside], values[inside], again=descriptor.span.is_rewritten)


def _describe(base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero") -> Descriptor:
    if padding_option != "zero":
        raise NotImplementedError(f"padding with {padding_option}")
    sizes = ([int(x) for x in numbers] for numbers in (shape, strides, block_shape))
    return Descriptor(base.span, int(base.addresses), *sizes, layout)


def _allocate_barriers(batch: int | None = None, two_ctas: bool = False) -> Barriers | Barrier:
    return gluon_memory.allocate(gl.int64, [1] if batch is None else [batch, 1], hopper.mbarrier.MBarrierLayout())


def _expect(mbarrier: Barrier, bytes_per_cta: int, pred: Any = True) -> None:
    if pred:
        Now.machine.expect(mbarrier, int(bytes_per_cta))


def _arrive(mbarrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        Now.machine.arrive(mbarrier, int(count))


def _wait(mbarrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        Now.machine.wait_barrier(mbarrier, int(phase))


def _range(*bounds: Any, **_: Any) -> Iterator[Value]:
    """Python's `range`, whose numbers are known at run time only."""
    return (Value(number, gl.int32) for number in range(*map(int, bounds)))


def _ignore(*_: Any, **__: Any) -> None:
    """For hints to the compiler, and printing."""


def _same(x: Any, *_: Any, **__: Any) -> Any:
    """For what changes no values."""
    return x


_LANGUAGE = {
    gl: {
        **{name: _each(getattr(np, name)) for name in ("exp", "exp2", "log", "log2", "sqrt", "abs", "floor", "ceil", "sin", "cos")},
        "rsqrt": _each(lambda x: 1 / np.sqrt(x)),
        "erf": _each(_erf),
        "maximum": _pairwise(np.maximum),
        "minimum": _pairwise(np.minimum),
        "fdiv": _pairwise(np.true_divide),
        "fma": lambda x, y, z: x * y + z,
        **{name: _reduced(getattr(np, name)) for name in ("sum", "max", "min")},
        "reduce": _reduce,
        "where": _where,
        "full": _full,
        "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
        "full_like": lambda x, value, **_: _full(x.shape, value, x.dtype),
        "zeros_like": lambda x, **_: _full(x.shape, 0, x.dtype),
        "arange": lambda start, end, layout=None: Value(np.arange(int(start), int(end)), gl.int32),
        "cast": lambda x, dtype, **_: x.to(dtype),
        "to_tensor": lambda x: x if isinstance(x, Value) else Value(x, gl.float32 if isinstance(x, float) else gl.int32),
        "cdiv": _ceil_divide,
        "reshape": lambda x, shape: x.reshape(shape),
        "permute": lambda x, *order: x.permute(*order),
        "expand_dims": lambda x, axis: Value(np.expand_dims(x.values, axis), x.dtype),
        "broadcast": _broadcast,
        "split": _split,
        "join": _join,
        **dict.fromkeys(("convert_layout", "set_auto_layout", "constexpr", "multiple_of", "max_contiguous", "max_constancy"), _same),
        **dict.fromkeys(("static_assert", "device_assert", "assume"), _assert),
        **dict.fromkeys(("static_print", "device_print"), _ignore),
        **dict.fromkeys(("barrier", "thread_barrier"), lambda: Now.machine.step()),
        "static_range": range,
        "program_id": lambda axis: Value(Now.program[axis], gl.int32),
        "num_programs": lambda axis: Value(Now.grid[axis], gl.int32),
        "num_warps": lambda: Now.machine.current.num_warps,
        "num_ctas": lambda: 1,
        "load": gluon_memory.load,
        "store": gluon_memory.store,
        "allocate_shared_memory": gluon_memory.allocate,
        "inline_asm_elementwise": _inline_assembly,
        "warp_specialize": _warp_specialize,
    },
    hopper: {
        "fence_async_shared": lambda cluster=False: Now.machine.fence(),
        "warpgroup_mma": _product,
        "warpgroup_mma_init": lambda value: Product(value.values, value.dtype, 0),
        "warpgroup_mma_wait": _wait_products,
        "mma_v2": _product_by_warps,
    },
    hopper.mbarrier: {
        "allocate_mbarrier": _allocate_barriers,
        "init": lambda mbarrier, count: mbarrier.init(int(count)),
        "expect": _expect,
        "arrive": _arrive,
        "wait": _wait,
        "invalidate": _ignore,
    },
    hopper.tma: {
        "async_copy_global_to_shared": _copy_to_shared,
        "async_copy_shared_to_global": _copy_from_shared,
        "store_wait": lambda pendings: Now.machine.wait_stores(int(pendings)),
        "make_tensor_descriptor": _describe,
    },
}
_LANGUAGE[tl] = _LANGUAGE[gl]  # of portable functions that a kernel calls
_STAND_INS = {
    id(getattr(module, name)): function
    for module, functions in _LANGUAGE.items()
    for name, function in functions.items()
    if hasattr(module, name)
}


class _Module:
    """A module as a kernel sees it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        known = _LANGUAGE.get(self._module, {})  # by name first: Triton 3.7 has `barrier` for the `thread_barrier` of 3.6
        return known[name] if name in known else _translate(getattr(self._module, name))


def _translate(x: Any) -> Any:
    """The stand-in for a name in a kernel."""
    if id(x) in _STAND_INS:
        return _STAND_INS[id(x)]
    if isinstance(x, JITFunction | InterpretedFunction):
        return _executable(x.fn)
    if isinstance(x, ModuleType):
        return _Module(x)
    if isinstance(x, gl.constexpr):
        return x.value
    if isinstance(x, tuple):
        return tuple(map(_translate, x))
    if getattr(x, "__triton_builtin__", False):
        return functools.partial(_refuse, x)
    return x


def _refuse(function: Any, *_: Any, **__: Any) -> None:
    raise NotImplementedError(f"{function.__module__}.{function.__name__} has no stand-in")


@functools.cache
def _executable(function: FunctionType) -> FunctionType:
    """The same code with the stand-ins as its globals."""
    names: dict[str, Any] = {"range": _range}
    defaults = tuple(map(_translate, function.__defaults__ or ()))
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, names, function.__name__, defaults, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    for cell, real in zip(cells, function.__closure__ or (), strict=True):
        cell.cell_contents = _translate(real.cell_contents)
    known = function.__globals__
    names.update({name: _translate(known[name]) for name in function.__code__.co_names if name in known and known[name] is not function})
    return made


class _Session:
    """Executes launches one after the other."""

    def __init__(self, rng: random.Random, rewritten: Collection[str]) -> None:
        self.rng, self.rewritten = rng, rewritten
        self.memories: dict[tuple[int, torch.dtype], Memory] = {}
        self.spans: list[Span] = []

    def launch(self, kernel: GluonJITFunction, args: tuple, grid: Any, named: dict[str, Any]) -> None:
        """Execute all programs, in random order."""
        parameters = {parameter.name: parameter for parameter in kernel.params}
        if unknown := named.keys() - parameters.keys() - _OPTIONS:
            raise TypeError(f"{kernel.fn.__name__} has no parameters {sorted(unknown)}")
        bound = signature(kernel.fn).bind(*args, **{name: value for name, value in named.items() if name in parameters})
        bound.apply_defaults()
        sizes = grid(dict(bound.arguments)) if callable(grid) else grid
        Now.grid = (*sizes, 1, 1)[:3]
        Now.report.launches.append((kernel.fn.__name__, Now.grid))
        given = {
            name: _translate(value) if parameters[name].is_constexpr else self._argument(name, value, parameters[name].do_not_specialize)
            for name, value in bound.arguments.items()
        }
        for memory in self.memories.values():
            memory.begin()
        programs = list(itertools.product(*map(range, Now.grid)))
        self.rng.shuffle(programs)
        for number, program in enumerate(programs, 1):
            Now.number, Now.program, Now.allocations = number, program, []
            Now.machine = Machine(kernel.fn.__name__, named.get("num_warps", 4), self.rng)
            with np.errstate(all="ignore"):
                _executable(kernel.fn)(**given)
            Now.machine.finish(Now.allocations)
        for memory in self.memories.values():
            memory.end()

    def _argument(self, name: str, value: Any, do_not_specialize: bool) -> Any:
        if isinstance(value, torch.Tensor):
            span = self._span(name, value)
            return Pointer(span, span.first)
        if isinstance(value, TensorDescriptor):
            if value.padding != "zero":
                raise NotImplementedError(f"padding with {value.padding}")
            span = self._span(name, value.base)
            return Descriptor(span, span.first, list(value.shape), list(value.strides), list(value.block_shape), value.layout)
        if isinstance(value, tuple):
            return tuple(self._argument(name, part, do_not_specialize) for part in value)
        if isinstance(value, float):
            return Value(value, gl.float32)
        if isinstance(value, int) and (do_not_specialize or value != 1):
            return Value(value, gl.int1 if isinstance(value, bool) else gl.int32 if -(1 << 31) <= value < 1 << 31 else gl.int64)
        return value

    def _span(self, name: str, tensor: torch.Tensor) -> Span:
        key = tensor.untyped_storage().data_ptr(), tensor.dtype
        memory = self.memories.setdefault(key, Memory(tensor))
        span = Span(name, memory, tensor, name in self.rewritten)
        self.spans.append(span)
        return span


@contextmanager
def executing(
    *,
    seed: int = 0,
    rounding: bool = True,
    rewritten: Collection[str] = (),
    partly: Collection[str] = (),
    assembly: Mapping[str, Callable] = ASSEMBLY,
) -> Iterator[Report]:
    """Executes the launches of Gluon kernels inside.

    `rewritten` and `partly` name arguments whose elements a launch may write several times, or not all of.
    """
    session = _Session(random.Random(seed), rewritten)
    Now.report, Now.assembly, Rounding.is_on = Report(), assembly, rounding

    def run(kernel: GluonJITFunction, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        session.launch(kernel, args, grid, named)

    GluonJITFunction.run = run
    try:
        yield Now.report
    finally:
        del GluonJITFunction.run
        Rounding.is_on = True
    for span in session.spans:
        if span.name not in partly and (gaps := span.find_gaps()):
            raise FaultError(f"{gaps} elements of {span.name} were never written")
