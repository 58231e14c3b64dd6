"""Small Gluon kernels for the tests of what compiles and of what executes such kernels."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.tiles import Variant

ROWS = 64
COLUMNS = 64
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


@gluon.jit
def copy_kernel(d_in, p_out, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of each matrix of a batch, through shared memory: TMA brings it, threads write it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i_row = gl.program_id(0) * ROWS
    i_batch = gl.program_id(1)
    tile = gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, COLUMNS], d_in.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, ROWS * COLUMNS * 2)
    tma.async_copy_global_to_shared(d_in, [i_batch, i_row, 0], ready, tile)
    mbarrier.wait(ready, 0)
    # [ROWS, COLUMNS]
    b_tile = tile.reshape([ROWS, COLUMNS]).load(layout)
    o_row = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    p_tile = p_out + (i_batch.to(gl.int64) * rows + o_row[:, None]) * columns + o_column[None, :]
    gl.store(p_tile, b_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] < columns))


def copy(x: torch.Tensor) -> torch.Tensor:
    """`copy_kernel` as a launcher calls it, of matrices of at most `COLUMNS` columns."""
    batch, rows, columns = x.shape
    out = torch.empty_like(x)
    descriptor = TensorDescriptor.from_tensor(x, [1, ROWS, COLUMNS], LAYOUT)
    copy_kernel[(-(-rows // ROWS), batch)](descriptor, out, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return out


def copy_variant(**changes) -> Variant:
    """What the tile table's rows would make of it."""
    descriptor = f"tensordesc<bf16[1, {ROWS}, {COLUMNS}],{LAYOUT!r}>"
    signature = {"d_in": descriptor, "p_out": "*bf16", "rows": "i32", "columns": "i32"}
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    options = {"num_warps": 4, "num_stages": 1, "divisible": ("p_out", "columns")}
    return Variant(kernel=copy_kernel, signature=signature, constants=constants, **(options | changes))
