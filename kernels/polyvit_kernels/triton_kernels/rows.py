"""Loads and stores of blocks of rows, between global memory and registers, for the attention kernels.

Offsets within one sequence are 32-bit; the caller adds the sequence's own, in 64 bits, to the pointer.

- HEAD_DIM: elements of a row; BLOCK_D: the power of two that holds them
- MASKED: rows beyond `tokens` may be among those that are loaded, and come as zeros
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(p_rows, i_row, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """The rows `i_row`, zero beyond `tokens` (when `MASKED`) and beyond `HEAD_DIM`."""
    # [BLOCK_D]
    i_column = tl.arange(0, BLOCK_D)
    # [rows, BLOCK_D]
    p_block = p_rows + i_row[:, None] * stride + i_column[None, :]
    if MASKED:
        if HEAD_DIM < BLOCK_D:
            b_rows = tl.load(p_block, mask=(i_row[:, None] < tokens) & (i_column[None, :] < HEAD_DIM), other=0.0)
        else:
            b_rows = tl.load(p_block, mask=i_row[:, None] < tokens, other=0.0)
    else:
        if HEAD_DIM < BLOCK_D:
            b_rows = tl.load(p_block, mask=i_column[None, :] < HEAD_DIM, other=0.0)
        else:
            b_rows = tl.load(p_block)
    return b_rows


@triton.jit
def store_rows(p_rows, b_rows, i_row, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `b_rows` `[rows, BLOCK_D]` to the rows `i_row` that are smaller than `tokens`."""
    # [BLOCK_D]
    i_column = tl.arange(0, BLOCK_D)
    # [rows, BLOCK_D]
    p_block = p_rows + i_row[:, None] * stride + i_column[None, :]
    # [rows, BLOCK_D] or [rows, 1]
    if HEAD_DIM < BLOCK_D:
        m_block = (i_row[:, None] < tokens) & (i_column[None, :] < HEAD_DIM)
    else:
        m_block = i_row[:, None] < tokens
    tl.store(p_block, b_rows.to(p_rows.dtype.element_ty), mask=m_block)


@triton.jit
def store_columns(p_rows, b_columns, i_row, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the transposed block `b_columns` `[BLOCK_D, rows]` to the rows `i_row` that are smaller than `tokens`."""
    # [BLOCK_D]
    i_column = tl.arange(0, BLOCK_D)
    # [BLOCK_D, rows]
    p_block = p_rows + i_row[None, :] * stride + i_column[:, None]
    # [BLOCK_D, rows] or [1, rows]
    if HEAD_DIM < BLOCK_D:
        m_block = (i_row[None, :] < tokens) & (i_column[:, None] < HEAD_DIM)
    else:
        m_block = i_row[None, :] < tokens
    tl.store(p_block, b_columns.to(p_rows.dtype.element_ty), mask=m_block)
