"""Kernels compiled for GPUs that need not be there: one, or a list of jobs on all cores."""

import io
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from typing import Any

import triton
from triton import compiler, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from polyvit_kernels.aot import cubin
from polyvit_kernels.aot.compiled_kernel import CompiledKernel, Parameter
from polyvit_kernels.aot.jobs import CompileJob
from polyvit_kernels.tiles import Variant

_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_PRODUCT = re.compile(r"(tt\.dot|ttng\.warp_group_dot) .*tensor<\w+x(bf16|f16)[,>]")
_MESSAGE = re.compile(r"^ptxas.*?\b(?:warning *: |info *: (?=\(C\d+\)|Potential ))(.+)$", re.M)
_PROGRESS_EVERY = 20


def compile_all(jobs: Sequence[CompileJob], show: Callable[[str], None]) -> tuple[list[CompiledKernel], list[str]]:
    """The kernels, and why there is none for some jobs; on all cores of this process, each a fresh interpreter."""
    cores = min(len(os.sched_getaffinity(0)), len(jobs)) or 1
    failures = []
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[CompiledKernel]] = [pool.submit(_compile_job, job) for job in jobs]
        for number, _ in enumerate(as_completed(futures), 1):
            if number % _PROGRESS_EVERY == 0 or number == len(jobs):
                show(f"compiled {number} of {len(jobs)} kernels")
    for job, future in zip(jobs, futures, strict=True):
        if error := future.exception():
            failures.append(f"{job}: {type(error).__name__}: {error}")
    return [future.result() for future in futures] if not failures else [], failures


def _compile_job(job: CompileJob) -> CompiledKernel:
    return compile_kernel(job.variant(), job.arch)


def compile_kernel(variant: Variant, arch: int) -> CompiledKernel:
    """`variant` for the compute capability `arch` (10 × major + minor), without a GPU.

    The code carries no line numbers: they triple its size and name folders of this machine. Raises ValueError for a portable kernel whose
    launch would need more than a grid and its arguments (kernels in Gluon are no part of the C library), and whatever the compiler raises.
    """
    knobs.compilation.disable_line_info = True
    function: Any = variant.kernel
    names = list(function.arg_names)
    signature = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    is_gluon = isinstance(function, GluonJITFunction)
    language = GluonASTSource if is_gluon else ASTSource
    source = language(fn=function, signature=signature, constexprs=dict(variant.constants), attrs=attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.max_registers}
    kernel, log = _run_compiler(source, GPUTarget("cuda", arch, 32), options)
    metadata = kernel.metadata
    parameters = tuple(
        Parameter(name=name, type=kind, multiple=16 if name in variant.divisible else 1)
        for name, kind in signature.items()
        if kind != "constexpr"
    )
    if not is_gluon:
        _check_launch(kernel, parameters)
    return CompiledKernel(
        name=metadata.name,
        arch=arch,
        num_warps=metadata.num_warps,
        num_stages=variant.num_stages,
        programs_per_sm=variant.programs_per_sm,
        allowed_spills=variant.allowed_spills,
        shared=metadata.shared,
        columns=metadata.tmem_size or 0,
        parameters=parameters,
        constants={name: _text(value) for name, value in variant.constants.items()},
        usage=cubin.read(kernel.asm["cubin"]),
        multiplies=bool(_PRODUCT.search(kernel.asm["ttgir" if is_gluon else "ttir"])),
        messages=messages(log),
        cubin=kernel.asm["cubin"],
    )


def _run_compiler(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[compiler.CompiledKernel, str]:
    """The kernel, and what ptxas printed."""
    log = io.StringIO()
    with knobs.nvidia.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target, options=options)
        if "ptxas" not in log.getvalue():  # Triton's cache keeps the image and not the words: ptxas must say them again
            backend: Any = make_backend(target)
            backend.make_cubin(kernel.asm["ptx"], {}, backend.parse_options(options), target.arch)
    return kernel, log.getvalue()


def messages(log: str) -> tuple[str, ...]:
    """Warnings and advice in what ptxas printed, without the lines of every compilation (sizes, times)."""
    return tuple(_MESSAGE.findall(log))


def _text(value: object) -> str:
    if value is None:
        return "none"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _check_launch(kernel: compiler.CompiledKernel, parameters: tuple[Parameter, ...]) -> None:
    """The C library passes the parameters and two null pointers for scratch memory, and sets no attribute of a launch."""
    metadata = kernel.metadata
    extras = {
        "clusters": metadata.num_ctas != 1,
        "a cooperative grid": metadata.launch_cooperative_grid,
        "programmatic dependent launch": metadata.launch_pdl,
        "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
        "tensor descriptors": getattr(metadata, "tensordesc_meta", None),
    }
    for name, needed in extras.items():
        if needed:
            raise ValueError(f"{metadata.name} needs {name}, which the C library does not give")
    entry = re.search(r"\.entry \w+\((.*?)\)", kernel.asm["ptx"], re.S)
    found = re.findall(r"\.param \.(\w+)", entry.group(1)) if entry else []
    expected = ["u64" if p.type.startswith("*") else _PTX_TYPES[p.type] for p in parameters] + ["u64", "u64"]
    if found != expected:
        raise ValueError(f"{metadata.name} takes {found}, but its signature says {expected}, the last two being scratch memory")
