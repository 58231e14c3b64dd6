"""A compiled kernel, what its launch needs, and the budget that it is held to."""

from collections.abc import Mapping
from dataclasses import dataclass

from polyvit_kernels.aot.cubin import Usage

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


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A run-time argument: its type as Triton names it, and what its value is a multiple of."""

    name: str
    type: str
    multiple: int


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
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
