"""Which kernel runs, with which blocks: a table of measured or compiled choices, and `pick`, a pure function that reads it.

Nothing is tuned at run time: the choice can be captured in a CUDA graph, compiled ahead of time, compared between versions, and is the
same on every rank. `benchmarks/tune.py` measures candidates on the card at hand and rewrites that card's rows in `tile_table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch

Backend = Literal["triton", "hopper", "torch", "cudnn", "flash", "xformers"]
"""triton: our portable kernel; hopper: ours in Gluon for sm_90 alone; torch: the library's own operators; cudnn, flash: that backend of
torch's scaled_dot_product_attention; xformers: that library's attention."""

ANY = 1 << 30
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A row: on the GPUs `archs`, for at most so many tokens and features, `op` runs by `backend` with these blocks.

    `blocks` are the kernel's compile-time constants by name. `max_registers` is what ptxas may give a thread, where that is less than it
    would; `programs_per_sm` how many programs an SM is meant to hold at once; `allowed_spills` how many loads and stores of registers may
    go to memory, all of them outside inner loops. `source` says where the choice comes from: "compiled" (fits the card's registers and
    memory, never timed), "published" (figures of others), or the file of the measurement under `benchmarks/results`.
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
    `programs_per_sm` and `allowed_spills` are what the row says (`plan.variants` sets them).
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


def pick(op: str, arch: int, dtype: torch.dtype, *, tokens: int = 1, features: int = 1, portable: bool = False) -> Tile:
    """The first row that fits; the torch backend when none does.

    `arch` is 10 × major + minor of the compute capability; one without rows takes those of the nearest older one. With `portable`, rows
    of other backends than triton are passed over: Triton's interpreter cannot run their kernels, and the C library cannot launch them.
    """
    return _pick(op, arch, DTYPES.get(dtype, str(dtype)), tokens, features, portable)


@cache
def _pick(op: str, arch: int, dtype: str, tokens: int, features: int, portable: bool) -> Tile:
    fitting = (row for row in _rows(op, arch, dtype) if row.fits(tokens, features) and (row.backend == "triton" or not portable))
    return next(fitting, Tile(op=op, archs=(arch,), dtypes=(dtype,), backend="torch"))


def rows(op: str, arch: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """All rows among which `pick` chooses, in their order."""
    return _rows(op, arch, DTYPES.get(dtype, str(dtype)))


@cache
def _rows(op: str, arch: int, dtype: str) -> tuple[Tile, ...]:
    from polyvit_kernels.tile_table import TABLE

    older = max((known for row in TABLE for known in row.archs if known <= arch), default=0)
    return tuple(row for row in TABLE if row.op == op and older in row.archs and dtype in row.dtypes)


@cache
def architecture(device: torch.device) -> int:
    """10 × major + minor of the compute capability of a CUDA device: 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def num_processors(device: torch.device) -> int:
    """How many streaming multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick_for(op: str, like: torch.Tensor, *, tokens: int = 1, features: int = 1, portable: bool = False) -> Tile:
    """`pick` for the device and dtype of a tensor."""
    return pick(op, architecture(like.device), like.dtype, tokens=tokens, features=features, portable=portable)
