"""What a process of its own does with the card while tuning: it says what a row compiles, judges rows, and lets them race.

A kernel that breaks the card's context breaks it for the whole process; the tuner then starts another one without that row.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import card
import torch
import triton
from candidates import Case, label
from race import Lane, new_watch, race, told
from trials import TRIALS, Inputs, nan_in_new_memory
from triton import knobs

from polyvit_kernels import tiles
from polyvit_kernels.tiles import PACKAGES, Tile
from polyvit_kernels.tiles import table as tile_table

_WRITTEN = tile_table.TABLE


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case at the sizes of this run: rows race at `size`, and are judged at `sample`. `rows` are in front of the table meanwhile."""

    case: Case
    size: tuple[int, ...]
    sample: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[Tile, ...] = ()

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.case.op} {'×'.join(map(str, self.size))}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A kernel as a launch asks Triton's compiler for it; the compiled one lands in Triton's cache, where the launch finds it."""

    module: str
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class LostCardError(Exception):
    """A row after which the card does not answer this process any more."""


@lru_cache(maxsize=2)
def inputs_of(op: str, size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """The tensors of a size, kept while a case is being decided."""
    return TRIALS[op].inputs(size, dtype)


def requests(job: Job, rows: Sequence[Tile]) -> dict[str, list[Request] | str]:
    """What each row would compile, by label, or the error that it raises before: nothing is compiled, and nothing launched."""
    found: dict[str, list[Request] | str] = {}
    if knobs.runtime.interpret:
        return {label(row): [] for row in rows}
    trial = TRIALS[job.case.op]
    sizes = [inputs_of(job.case.op, size, job.dtype) for size in (job.size, job.sample)]
    for row in rows:
        asked: list[Request] = []
        knobs.runtime.jit_cache_hook = _recorder(asked, row)
        try:
            for inputs in sizes if row.backend in PACKAGES and row.op != "attention" else []:
                trial.run(inputs, row)
            found[label(row)] = asked
        except Exception as error:
            found[label(row)] = told(error)
        finally:
            knobs.runtime.jit_cache_hook = None
    return found


def _recorder(asked: list[Request], row: Tile):
    def record(*, fn, compile, **_: Any) -> bool:
        asked.append(
            Request(
                module=fn.module,
                name=fn.name,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                num_warps=compile["num_warps"],
                num_stages=compile["num_stages"],
                max_registers=row.max_registers,
            )
        )
        # The launch is called off.
        return True

    return record


def compile_one(request: Request, arch: int) -> str:
    """Compile, on any machine; why the kernel will not do, or nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    from polyvit_kernels.aot import cubin
    from polyvit_kernels.aot.compiled_kernel import SHARED_BYTES

    function = getattr(import_module(request.module), request.name)
    language = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    source = language(
        fn=function,
        signature=dict(request.signature),
        constexprs=dict(request.constants),
        attrs=dict(request.attributes),
    )
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages, "maxnreg": request.max_registers}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return told(error)
    usage = cubin.read(kernel.asm["cubin"])
    if usage.spill_stores or usage.spill_loads or usage.stack:
        return f"spills: {usage.spill_stores} stores, {usage.spill_loads} loads, {usage.stack} bytes of stack"
    if kernel.metadata.shared > SHARED_BYTES[arch]:
        return f"{kernel.metadata.shared} bytes of shared memory, there are {SHARED_BYTES[arch]}"
    return ""


def compile_apart(request: Request, arch: int) -> str:
    """`compile_one` in a child: a compiler that crashes takes its process along."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(writer, compile_one(request, arch).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        reason = answer.read()
    _, status = os.waitpid(child, 0)
    return f"the compiler crashed, status {status}" if status else reason


def judge(job: Job, rows: Sequence[Tile]) -> dict[str, str]:
    """Why each row is wrong, by label: nothing when it is right."""
    _put_in_front(job.rows)
    trial = TRIALS[job.case.op]
    inputs = inputs_of(job.case.op, job.sample, job.dtype)
    expected = trial.expected(inputs)
    with nan_in_new_memory():
        return {label(row): _judged(lambda row=row: trial.judge(inputs, row, expected, job.dtype), job, row) for row in rows}


def _judged(do, job: Job, row: Tile) -> str:
    try:
        do()
        return ""
    except Exception as error:
        _assert_alive(job, row, told(error))
        return told(error)


def times(job: Job, rows: Sequence[Tile], rounds: int, calls: int) -> dict[str, list[float] | str]:
    """The seconds of each call of rows that take turns, by label, or the error that ended it."""
    _put_in_front(job.rows)
    trial = TRIALS[job.case.op]
    inputs = inputs_of(job.case.op, job.size, job.dtype)
    lanes = [Lane(name=label(row), run=lambda row=row: trial.run(inputs, row)) for row in rows]
    race(lanes, new_watch(), rounds, calls)
    for lane, row in zip(lanes, rows, strict=True):
        if lane.error:
            _assert_alive(job, row, lane.error)
    return {lane.name: lane.error or lane.seconds for lane in lanes}


def _assert_alive(job: Job, row: Tile, error: str) -> None:
    if card.HAS_GPU:
        try:
            torch.cuda.synchronize()
        except Exception:
            raise LostCardError(job.case.op, label(row), error) from None


def _put_in_front(rows: Sequence[Tile]) -> None:
    """Let the table have these rows as if they had been measured, in this process."""
    tile_table.TABLE = tuple(sorted((*rows, *_WRITTEN), key=lambda row: row.features))
    for cached in (tiles._pick, tiles._rows):
        cached.cache_clear()
