"""A row of the tile table, and what a kernel is compiled with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Backend = Literal["triton", "hopper", "torch", "cudnn", "flash", "xformers"]
"""triton: our portable kernel; hopper: ours in Gluon for sm_90 alone; torch: the library's own operators; cudnn, flash: that backend of
torch's scaled_dot_product_attention; xformers: that library's attention."""

PACKAGES = {"triton": "polyvit_kernels.triton_kernels", "hopper": "polyvit_kernels.hopper"}
"""The backends with kernels of our own, and where these are."""

ANY = 1 << 30
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A row: on the GPUs `archs`, up to so many tokens and features, `backend` runs `op` with these blocks.

    `blocks` are the kernel's compile-time constants by name. `max_registers` limits the registers that ptxas gives a thread;
    `programs_per_sm` is how many programs an SM is to hold at once; `allowed_spills` how many loads and stores of registers may go to
    memory, all of them outside inner loops. `source` says where the choice comes from: "compiled" (it fits the GPU's registers and memory,
    and has not been timed), "published" (others' figures), or the file with the measurement, under `benchmarks/results`.
    """

    op: str
    archs: tuple[int, ...]
    tokens: tuple[int, int] = (1, ANY)
    features: int = ANY
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    backend: Backend = "triton"
    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    programs_per_sm: int = 1
    allowed_spills: int = 0
    source: str = "compiled"

    def fits(self, tokens: int, features: int) -> bool:
        """Whether the row is for such sizes."""
        low, high = self.tokens
        return low <= tokens <= high and features <= self.features

    def launch(self) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return {**self.blocks, **options}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What it takes to compile a kernel without calling it.

    `signature` gives every run-time argument's type as Triton names it, such as `i32`, `*bf16` or, in Gluon,
    `tensordesc<bf16[1, 64, 64],NVMMASharedLayout(...)>`; the `divisible` ones are known to be multiples of 16 (pointers: of 16 bytes).
    `programs_per_sm` and `allowed_spills` are the row's (`aot.jobs.variants` sets them).
    """

    kernel: Callable[..., Any]
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    programs_per_sm: int = 1
    allowed_spills: int = 0
