"""Which kernel runs, with which blocks: `pick`, a pure function that reads the tile table.

Nothing is tuned at run time: the choice can be captured in a CUDA graph, compiled ahead of time and compared between versions, and it is
the same on every rank. `benchmarks/tune.py` measures candidates on a GPU.
"""

from functools import cache

import torch

from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.tiles.tile import DTYPES, Tile


def pick(op: str | tuple[str, ...], arch: int, dtype: torch.dtype, *, tokens: int = 1, features: int = 1, portable: bool = False) -> Tile:
    """The first row that fits; the torch backend when none does. Of several ops, the first with a row of another backend than torch.

    `arch` is 10 × major + minor of the compute capability; one without rows takes those of the nearest older one. With `portable`, rows
    of other backends than triton are passed over: Triton's interpreter cannot run their kernels, and the C library cannot launch them.
    """
    ops = (op,) if isinstance(op, str) else op
    return _pick(ops, arch, DTYPES.get(dtype, str(dtype)), tokens, features, portable)


@cache
def _pick(ops: tuple[str, ...], arch: int, dtype: str, tokens: int, features: int, portable: bool) -> Tile:
    row = Tile(op=ops[0], archs=(arch,), dtypes=(dtype,), backend="torch")
    for op in ops:
        fitting = (row for row in _rows(op, arch, dtype) if row.fits(tokens, features) and (row.backend == "triton" or not portable))
        row = next(fitting, row)
        if row.backend != "torch":
            break
    return row


def rows(op: str, arch: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """All rows among which `pick` chooses, in their order."""
    return _rows(op, arch, DTYPES.get(dtype, str(dtype)))


@cache
def _rows(op: str, arch: int, dtype: str) -> tuple[Tile, ...]:
    older = max((known for row in TABLE for known in row.archs if known <= arch), default=0)
    return tuple(row for row in TABLE if row.op == op and older in row.archs and dtype in row.dtypes)


@cache
def architecture(device: torch.device) -> int:
    """10 × major + minor of the compute capability of a CUDA device: 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def num_sms(device: torch.device) -> int:
    """How many streaming multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def pick_for(
    op: str | tuple[str, ...],
    like: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    tokens: int = 1,
    features: int = 1,
    portable: bool = False,
) -> Tile:
    """`pick` for the GPU of a tensor, and its dtype unless another is given."""
    return pick(op, architecture(like.device), dtype or like.dtype, tokens=tokens, features=features, portable=portable)


def rows_for(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """`rows` for a GPU of this machine."""
    return rows(op, architecture(device), dtype)
