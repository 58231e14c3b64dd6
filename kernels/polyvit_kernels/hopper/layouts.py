# Gluon's functions are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Where the elements of Hopper's attention kernels lie: TMA descriptors, and layouts of shared memory and of registers.

A head's columns are one or two *panels* whose widths are powers of two, 64 + 16 for 80, so that nothing is padded: a panel is what one TMA
load brings and one wgmma multiplies. Rows come in blocks of 64, what the four warps of a warpgroup multiply. Operations on panels are in
`panels`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LN_2 = gl.constexpr(0.6931471805599453)  # takes the log2(e) out of the scale again
ALIGNMENT = 16
"""Bytes: what TMA asks of an address and of strides."""


def panel_widths(head_dim: int) -> tuple[int, int]:
    """The widths of a head's panels, the second one 0 where one will do. Raises ValueError for a width that needs three."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    if head_dim % 16 or head_dim > 128 or rest & (rest - 1):
        raise ValueError(f"head_dim is {head_dim}, but must be 128 at most and the sum of one or two powers of two from 16")
    return first, rest


def tma_aligned(x: Tensor) -> Tensor:
    """`x` as TMA can address it, contiguous and at a multiple of 16 bytes: itself, or else a copy."""
    return x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptors(x: Tensor, head_dim: int, rows: int) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """For loads of `rows` rows of each panel of a head, from contiguous `[batch, tokens, ...]`; rows beyond the last token are zeros."""
    flat = x.view(len(x), x.shape[1], -1)

    def describe(width: int) -> TensorDescriptor | None:
        if not rows * width:
            return None
        return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, rows, width], shared_layout(width))

    first, rest = panel_widths(head_dim)
    return describe(first), describe(rest)


def descriptor_types(dtype: str, head_dim: int, rows: Mapping[str, int]) -> dict[str, str | None]:
    """The types of a kernel's descriptors by the rows they load, `name` and `name_rest` for a head's panels; None for unused ones."""
    return {
        name + suffix: f"tensordesc<{dtype}[1, {count}, {width}],{shared_layout(width)!r}>" if count * width else None
        for name, count in rows.items()
        for suffix, width in zip(("", "_rest"), panel_widths(head_dim), strict=True)
    }


def shared_layout(width: int) -> gl.NVMMASharedLayout:
    """Rows of a panel in shared memory, with a swizzle as wide as they are."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=3)


@gluon.constexpr_function
def mma(n):
    """Accumulators `[64, n]` of one warpgroup's wgmma."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def operand_a():
    """A left operand in registers; its layout is the same for products of every width."""
    return gl.DotOperandLayout(operand_index=0, parent=mma(64), k_width=2)


@gluon.constexpr_function
def mma_rows(n=64):
    """A vector with an element for each row of `mma(n)`."""
    return gl.SliceLayout(1, mma(n))


@gluon.constexpr_function
def mma_columns(n=64):
    """A vector with an element for each column of `mma(n)`."""
    return gl.SliceLayout(0, mma(n))


@gluon.constexpr_function
def coalesced(width):
    """Rows in global memory, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def vector():
    """A vector in registers, an element a thread."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def vector_shared():
    """A vector in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0])


@gluon.constexpr_function
def store_layout(width):
    """`mma` with bits 1 and 3 of the column exchanged between threads and registers: one shuffle makes whole sectors of 32 bytes."""
    high = [[0, 1 << bit] for bit in range(4, width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], *high, [8, 0]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, width],
    )
