# Gluon's functions are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
"""What the attention kernels of Hopper share: where the elements of a tile lie, and how a head's rows come and go.

A head's columns are one or two *panels* whose widths are powers of two, 64 + 16 for 80: nothing is padded. Whatever holds a head's rows is
a tuple with an entry a panel. Rows come in blocks of 64, what one warpgroup multiplies.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LN_2 = gl.constexpr(0.6931471805599453)  # takes the log2(e) out of the scale again
ALIGNMENT = 16
"""Bytes: what TMA asks of an address and of strides."""

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Triton 3.7 gave it the shorter name."""


def panels(head_dim: int) -> tuple[int, int]:
    """The widths of a head's panels, the second one 0 where one will do. Raises ValueError for a width that needs three."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    if head_dim % 16 or head_dim > 128 or rest & (rest - 1):
        raise ValueError(f"head_dim is {head_dim}, but must be 128 at most and the sum of one or two powers of two from 16")
    return first, rest


def packed(x: Tensor) -> Tensor:
    """`x` as TMA can address it: contiguous, at a multiple of 16 bytes."""
    return x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptors(x: Tensor, head_dim: int, rows: int) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """For so many rows of a head's panels in a packed `[batch, tokens, ...]`; rows beyond the last token come as zeros."""
    flat = x.view(len(x), x.shape[1], -1)

    def describe(width: int) -> TensorDescriptor | None:
        if not rows * width:
            return None
        return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, rows, width], shared_layout(width))

    first, rest = panels(head_dim)
    return describe(first), describe(rest)


def descriptor_type(dtype: str, rows: int, width: int) -> str:
    """The type of such a descriptor in a kernel's signature."""
    return f"tensordesc<{dtype}[1, {rows}, {width}],{shared_layout(width)!r}>"


def shared_layout(width: int) -> gl.NVMMASharedLayout:
    """Of a panel's rows: as wide a swizzle as they are."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=3)


@gluon.constexpr_function
def mma(n):
    """Of a product of one warpgroup, 64 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def left():
    """Of a left factor in registers, for any width of the product."""
    return gl.DotOperandLayout(operand_index=0, parent=mma(64), k_width=2)


@gluon.constexpr_function
def rows_of(n=64):
    """Of a number a row of `mma(n)`."""
    return gl.SliceLayout(1, mma(n))


@gluon.constexpr_function
def columns_of(n=64):
    """Of a number a column of `mma(n)`."""
    return gl.SliceLayout(0, mma(n))


@gluon.constexpr_function
def wide(width):
    """Of rows read and written in pieces of 16 bytes."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def line():
    """Of numbers in a row."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def line_shared():
    """Of numbers in a row, in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0])


@gluon.constexpr_function
def store_layout(width):
    """`mma` with bits 1 and 3 of the column exchanged between lanes and registers: one shuffle makes whole sectors of 32 bytes."""
    high = [[0, 1 << bit] for bit in range(4, width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], *high, [8, 0]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, width],
    )


@gluon.jit
def panels_of(d_first, d_rest):
    """The descriptors of a head's panels, of which those that are not needed are None."""
    if d_first is None:
        d_panels = ()
    elif d_rest is None:
        d_panels = (d_first,)
    else:
        d_panels = (d_first, d_rest)
    return d_panels


@gluon.jit
def allocate(d_panels, COUNT: gl.constexpr):
    """Room for COUNT boxes of every panel."""
    s_panels = ()
    for w in gl.static_range(len(d_panels)):
        s_panels = s_panels + (gl.allocate_shared_memory(d_panels[w].dtype, [COUNT] + d_panels[w].block_type.shape, d_panels[w].layout),)
    return s_panels


@gluon.jit
def copy(d_panels, i_batch, i_row, column, bar, s_panels, i_box):
    """Begin to copy the rows from `i_row` of a head that begins at `column` to the box `i_box`."""
    for w in gl.static_range(len(d_panels)):
        c = column + w * d_panels[0].block_type.shape[2]
        tma.async_copy_global_to_shared(d_panels[w], [i_batch, i_row, c], bar, s_panels[w].index(i_box))


@gluon.jit
def box(s_panels, i_box):
    """The rows of one box, [rows, width] a panel."""
    b_panels = ()
    for w in gl.static_range(len(s_panels)):
        b_panels = b_panels + (s_panels[w].index(i_box).reshape([s_panels[w].shape[2], s_panels[w].shape[3]]),)
    return b_panels


@gluon.jit
def read(s_panels, L: gl.constexpr):
    """All panels in registers."""
    b_panels = ()
    for w in gl.static_range(len(s_panels)):
        b_panels = b_panels + (s_panels[w].load(L),)
    return b_panels


@gluon.jit
def _zeros(ROWS: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    return gl.zeros([ROWS, WIDTH], gl.float32, L)


@gluon.jit
def accumulators(like, ROWS: gl.constexpr):
    """Of products [ROWS, width], one a panel."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        b_panels = b_panels + (warpgroup_mma_init(_zeros(ROWS, like[w].shape[1], mma(like[w].shape[1]))),)
    return b_panels


@gluon.jit
def begin_scores(b_left, s_rows, N: gl.constexpr):
    """Begin the product [64, N] of a left factor with N rows, as many wgmmas as panels."""
    b_s = gl.zeros([64, N], gl.float32, mma(N))
    for w in gl.static_range(len(s_rows)):
        b_s = warpgroup_mma(b_left[w], s_rows[w].permute((1, 0)), b_s, use_acc=w > 0, is_async=True)
    return b_s


@gluon.jit
def begin_sums(b_p, s_rows, b_acc, use_acc=True):
    """Begin to add the product of [64, N] with N rows, as many wgmmas as panels."""
    b_left = gl.convert_layout(b_p.to(s_rows[0].dtype), left())
    b_new = ()
    for w in gl.static_range(len(s_rows)):
        b_new = b_new + (warpgroup_mma(b_left, s_rows[w], b_acc[w], use_acc=use_acc, is_async=True),)
    return b_new


@gluon.jit
def finish_sums(b_acc, LATER: gl.constexpr = 0):
    """The values, when all but the LATER wgmmas begun after them are done."""
    b_new = ()
    for w in gl.static_range(len(b_acc)):
        b_new = b_new + (warpgroup_mma_wait(LATER, deps=(b_acc[w],)),)
    return b_new


@gluon.jit
def times(b_panels, factor):
    """All panels times a number."""
    b_new = ()
    for w in gl.static_range(len(b_panels)):
        b_new = b_new + (b_panels[w] * factor,)
    return b_new


@gluon.jit
def _offsets(i_row, stride, first, ROWS: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    """Of the elements of a panel that begins at the column `first`, and whose rows they are."""
    r = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    c = first + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    return r[:, None] * stride + c[None, :], r[:, None]


@gluon.jit
def _load_panel(p, i_row, stride, tokens, first, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    o, r = _offsets(i_row, stride, first, ROWS, WIDTH, wide(WIDTH))
    return gl.load(p + o, mask=r < tokens, other=0.0)


@gluon.jit
def load_rows(p, like, i_row, stride, tokens):
    """The rows from `i_row`, as many and as wide as those of `like` in shared memory; those beyond the end are zeros."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        b_panels = b_panels + (_load_panel(p, i_row, stride, tokens, w * like[0].shape[1], like[w].shape[0], like[w].shape[1]),)
    return b_panels


@gluon.jit
def _store_panel(p, b, i_row, stride, tokens, first, L: gl.constexpr):
    o, r = _offsets(i_row, stride, first, b.shape[0], b.shape[1], L)
    gl.store(p + o, gl.convert_layout(b.to(p.dtype.element_ty), L), mask=r < tokens)


@gluon.jit
def store_rows(p, b_panels, i_row, stride, tokens):
    """Store all panels of a product's rows, the first one being `i_row`, but not those beyond the end."""
    for w in gl.static_range(len(b_panels)):
        _store_panel(p, b_panels[w], i_row, stride, tokens, w * b_panels[0].shape[1], store_layout(b_panels[w].shape[1]))


@gluon.jit
def read_wide(s_panels):
    """All panels as `load_rows` has them."""
    b_panels = ()
    for w in gl.static_range(len(s_panels)):
        b_panels = b_panels + (s_panels[w].load(wide(s_panels[w].shape[1])),)
    return b_panels


@gluon.jit
def wide_zeros(like):
    """Zeros where `read_wide` puts the elements."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        b_panels = b_panels + (_zeros(like[w].shape[0], like[w].shape[1], wide(like[w].shape[1])),)
    return b_panels


@gluon.jit
def plain_zeros(like):
    """Zeros where a product's elements are, not to be added to by wgmma."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        b_panels = b_panels + (_zeros(like[w].shape[0], like[w].shape[1], mma(like[w].shape[1])),)
    return b_panels


@gluon.jit
def plus(a, b):
    """The sums of the panels of both, in fp32."""
    b_new = ()
    for w in gl.static_range(len(a)):
        b_new = b_new + (a[w] + b[w].to(gl.float32),)
    return b_new


@gluon.jit
def row_products(a, b):
    """rowsum(a · b) over all panels."""
    for w in gl.static_range(len(a)):
        b_part = gl.convert_layout(gl.sum(a[w].to(gl.float32) * b[w].to(gl.float32), 1), line())
        b_sum = b_part if w == 0 else b_sum + b_part
    return b_sum


@gluon.jit
def column_sums(b_panels):
    """Of the rows of every panel, in fp32."""
    b_sums = ()
    for w in gl.static_range(len(b_panels)):
        b_sums = b_sums + (gl.convert_layout(gl.sum(b_panels[w].to(gl.float32), 0), line()),)
    return b_sums


@gluon.jit
def store_sums(p, b_sums):
    """Store a number a column, from all panels."""
    for w in gl.static_range(len(b_sums)):
        gl.store(p + w * b_sums[0].shape[0] + gl.arange(0, b_sums[w].shape[0], layout=line()), b_sums[w])
