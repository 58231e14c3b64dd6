"""Blocks of rows against slicing."""

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE
from samples import normal

from polyvit_kernels.triton_kernels.rows import load_rows, store_columns, store_rows


@triton.jit
def _copy_kernel(p_in, p_out, p_turned, stride, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    i_row = tl.arange(0, ROWS)
    b_rows = load_rows(p_in, i_row, stride, tokens, HEAD_DIM, BLOCK_D, True)
    store_rows(p_out, b_rows, i_row, BLOCK_D, ROWS, BLOCK_D, BLOCK_D)
    store_columns(p_turned, tl.trans(b_rows), i_row, HEAD_DIM, tokens, HEAD_DIM, BLOCK_D)


@triton.jit
def _copy_whole_kernel(p_in, p_out, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    i_row = tl.arange(0, ROWS)
    store_rows(p_out, load_rows(p_in, i_row, stride, ROWS, HEAD_DIM, BLOCK_D, False), i_row, HEAD_DIM, ROWS, HEAD_DIM, BLOCK_D)


@pytest.mark.parametrize(("tokens", "head_dim", "block_d"), [(16, 32, 32), (5, 32, 32), (5, 24, 32)])
def test_rows_beyond_the_end_are_zeros_and_are_not_stored(tokens, head_dim, block_d):
    source = normal(16, 40)
    out, turned = torch.full((16, block_d), 7.0, device=DEVICE), torch.full((16, head_dim), 7.0, device=DEVICE)
    _copy_kernel[(1,)](source, out, turned, 40, tokens, HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=16)
    assert torch.equal(out[:tokens, :head_dim], source[:tokens, :head_dim])
    assert not out[tokens:].any()
    assert not out[:, head_dim:].any()
    assert torch.equal(turned[:tokens], source[:tokens, :head_dim])
    assert (turned[tokens:] == 7).all()


@pytest.mark.parametrize(("head_dim", "block_d"), [(32, 32), (24, 32)])
def test_whole_blocks_need_no_mask(head_dim, block_d):
    source, out = normal(16, 40), torch.empty(16, head_dim, device=DEVICE)
    _copy_whole_kernel[(1,)](source, out, 40, HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=16)
    assert torch.equal(out, source[:, :head_dim])
