"""A kernel compiled for a GPU that need not be there, what its launch needs, and the budget that it is held to."""

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from polyvit_kernels.aot import cubin
from polyvit_kernels.aot.cubin import Usage
from polyvit_kernels.tiles import Variant

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""What a block may have, by compute capability (CUDA C++ programming guide, technical specifications)."""

_RESERVED_BYTES = 1 << 10
"""What the system takes of an SM's shared memory for each block: one block may have all the rest."""

_SM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_QUARTER_REGISTERS = 1 << 14  # an SM has four register files, which hand registers to warps in portions of 256
_REGISTER_PORTION = 256

TENSOR_COLUMNS = 512
"""Blackwell's tensor memory."""

_TENSOR_INSTRUCTIONS = {8: "HMMA", 9: "HGMMA", 10: "UTC", 12: "HMMA"}
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_PRODUCT = re.compile(r"(tt\.dot|ttng\.warp_group_dot) .*tensor<\w+x(bf16|f16)[,>]")
_MESSAGE = re.compile(r"^ptxas.*?\b(?:warning *: |info *: (?=\(C\d+\)|Potential ))(.+)$", re.M)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A run-time argument: its type as Triton names it, and what its value is a multiple of."""

    name: str
    type: str
    multiple: int


@dataclass(frozen=True, kw_only=True)
class Image:
    """A compiled kernel: `shared` bytes of dynamic shared memory, `columns` of tensor memory; it `multiplies` matrices of 16 bits.

    `messages` are ptxas's warnings and advice, such as that it made wgmma wait: neither registers nor spills show that. `programs_per_sm`
    and `allowed_spills` are what its row says of it.
    """

    name: str
    arch: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    allowed_spills: int = 0
    shared: int
    columns: int
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, str]
    usage: Usage
    multiplies: bool
    messages: tuple[str, ...]
    cubin: bytes

    def programs(self) -> int:
        """How many an SM holds at once, by its registers, shared memory and warps."""
        portions = -(-32 * self.usage.registers // _REGISTER_PORTION)
        warps = min(4 * (_QUARTER_REGISTERS // (portions * _REGISTER_PORTION)), _SM_WARPS[self.arch])
        return min(warps // self.num_warps, (SHARED_BYTES[self.arch] + _RESERVED_BYTES) // (self.shared + _RESERVED_BYTES))

    def excesses(self) -> list[str]:
        """What is beyond the budget.

        Nothing spills but what the row names, outside of inner loops; an SM has room for as many programs as the row says; its tensor
        cores multiply; ptxas warns of nothing.
        """
        found = list(self.messages)
        usage = self.usage
        if usage.inner_spills or usage.spill_stores + usage.spill_loads > self.allowed_spills or (usage.stack and not self.allowed_spills):
            spills = f"{usage.spill_stores} spill stores, {usage.spill_loads} loads, {usage.stack} bytes of stack"
            found.append(f"{spills}; {usage.inner_spills} in inner loops, {self.allowed_spills} allowed elsewhere")
        if self.shared > SHARED_BYTES[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_BYTES[self.arch]}")
        elif self.programs() < self.programs_per_sm:
            needs = f"{usage.registers} registers, {self.num_warps} warps and {self.shared} bytes"
            found.append(f"an SM has room for {self.programs()} programs, not for {self.programs_per_sm}: each needs {needs}")
        if self.columns > TENSOR_COLUMNS:
            found.append(f"{self.columns} columns of tensor memory, there are {TENSOR_COLUMNS}")
        wanted = _TENSOR_INSTRUCTIONS[self.arch // 10]
        if self.multiplies and not any(name.startswith(wanted) for name in self.usage.tensor):
            found.append(f"no {wanted} instruction, but {dict(self.usage.tensor) or 'none'}")
        return found


def build(variant: Variant, arch: int) -> Image:
    """Compile for the compute capability `arch` (10 × major + minor), without a GPU.

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
    kernel, log = _compile(source, GPUTarget("cuda", arch, 32), options)
    metadata = kernel.metadata
    parameters = tuple(
        Parameter(name=name, type=kind, multiple=16 if name in variant.divisible else 1)
        for name, kind in signature.items()
        if kind != "constexpr"
    )
    if not is_gluon:
        _check_launch(kernel, parameters)
    return Image(
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


def _compile(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[CompiledKernel, str]:
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


def _check_launch(kernel: CompiledKernel, parameters: tuple[Parameter, ...]) -> None:
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
