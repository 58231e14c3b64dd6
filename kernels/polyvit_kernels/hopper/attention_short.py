# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Attention of at most 256 tokens on Hopper: a head's rows are read once, by TMA, and stay in shared memory.

One program, a warpgroup, does one head of one example; several run on an SM, so that one multiplies while another takes exponentials.
Probabilities go from one wgmma to the next in registers. No atomics: every element has one writer, and runs repeat bit for bit.

- HEAD_DIM: a head's width, in one or two panels (`layouts`); `d_…_rest` describe the second one
- BLOCKS: blocks of 64 rows; RAGGED: the last one reaches beyond the tokens
- TAIL: 16 where 1 to 16 rows remain after the blocks, else 0 (`tail`)
- width: of all heads together; column: where this head begins
- scale: log2(e) / √head_dim, as all exponentials are powers of two
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.hopper import panels
from polyvit_kernels.hopper.layouts import (
    LN_2,
    descriptor_types,
    descriptors,
    mma,
    mma_columns,
    mma_rows,
    operand_a,
    tma_aligned,
    vector,
    vector_shared,
)
from polyvit_kernels.hopper.tail import attend_tail, differentiate_tail
from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.attention_short import scale_of

_LENGTHS = {64: (50, 145, 191, 197, 224, 256)}
"""For which `variants` compiles, by head_dim: with and without a ragged block, with and without a tail."""
_OTHER_LENGTHS = (197, 256)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Triton 3.7 gave it the shorter name."""


@gluon.jit
def _load_head(d_block, d_tail, i_batch, column, bar, s_rows, s_tail, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """Issue the TMA loads of all rows of a head that begins at `column`."""
    for i in gl.static_range(BLOCKS):
        panels.load_tma(d_block, i_batch, i * 64, column, bar, s_rows, i)
    if TAIL > 0:
        panels.load_tma(d_tail, i_batch, BLOCKS * 64, column, bar, s_tail, 0)


@gluon.jit
def _mask_keys(b_s, i_key, tokens, N: gl.constexpr, L: gl.constexpr):
    """Minus infinity for keys beyond the end: their score, 0, could be far above all others."""
    # [N]
    i_keys = i_key + gl.arange(0, N, layout=gl.SliceLayout(0, L))
    return gl.where(i_keys[None, :] < tokens, b_s, float("-inf"))


@gluon.jit
def _mma_all_scores(b_q, s_k, s_k_tail, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """Issue the products of 64 queries with all keys, the last block first: the registers of its mask are soon free again."""
    # [64, 64] a block, and [64, TAIL]
    b_issued = ()
    for c in gl.static_range(BLOCKS):
        b_issued = b_issued + (panels.mma_scores(b_q, panels.stage(s_k, BLOCKS - 1 - c), 64),)
    if TAIL > 0:
        b_issued = b_issued + (panels.mma_scores(b_q, panels.stage(s_k_tail, 0), TAIL),)
    return b_issued


@gluon.jit
def _exponentiate(b_s, b_max, scale, N: gl.constexpr):
    """(P, its row sums)"""
    # [64, N]
    b_p = gl.exp2(b_s * scale - gl.convert_layout(b_max, mma_rows(N))[:, None])
    return b_p, gl.convert_layout(gl.sum(b_p, 1), mma_rows(64))


@gluon.jit
def _attend(b_issued, s_v, s_v_tail, bar_v, tokens, scale, BLOCKS: gl.constexpr, RAGGED: gl.constexpr, TAIL: gl.constexpr):
    """(output before normalisation, reciprocal sums, log-sum-exp) of 64 queries; maxima are taken as the scores arrive."""
    PANELS: gl.constexpr = len(s_v)
    TILES: gl.constexpr = len(b_issued)
    b_s = ()
    for c in gl.static_range(TILES):
        # [64, 64] a block, [64, TAIL] at the end
        b_tile = warpgroup_mma_wait((TILES - 1 - c) * PANELS, deps=(b_issued[c],))
        if c == BLOCKS:
            b_tile = _mask_keys(b_tile, c * 64, tokens, TAIL, mma(TAIL))
        elif c == 0 and RAGGED:
            b_tile = _mask_keys(b_tile, (BLOCKS - 1) * 64, tokens, 64, mma(64))
        # [64]
        b_tile_max = gl.convert_layout(gl.max(b_tile, 1), mma_rows(64))
        b_max = b_tile_max if c == 0 else gl.maximum(b_max, b_tile_max)
        # [64, 64] a block, and [64, TAIL]
        b_s = b_s + (b_tile,)
    # The scale is positive: it goes into the exponent, one fused multiply-add per score.
    b_max = b_max * scale
    # [64, width] a panel
    b_out = panels.accumulators(panels.stage(s_v, 0), 64)
    for c in gl.static_range(TILES):
        # [64, 64] or [64, TAIL], [64]
        b_p, b_tile_sum = _exponentiate(b_s[c], b_max, scale, b_s[c].shape[1])
        b_sum = b_tile_sum if c == 0 else b_sum + b_tile_sum
        if c == 0:
            mbarrier.wait(bar_v, 0)
        # [64, width] or [TAIL, width] a panel
        s_rows = panels.stage(s_v if c < BLOCKS else s_v_tail, BLOCKS - 1 - c if c < BLOCKS else 0)
        # [64, width] a panel
        b_out = panels.mma_accumulate(b_p, s_rows, b_out, c > 0)
    return panels.mma_wait(b_out), 1.0 / b_sum, b_max + gl.log2(b_sum)


@gluon.jit
def attention_short_fwd_kernel(
    d_qkv, d_qkv_rest, d_tail, d_tail_rest, p_out, p_lse, tokens, heads, scale,
    HEAD_DIM: gl.constexpr, BLOCKS: gl.constexpr, RAGGED: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One head: keys and values stay, the queries come through a ring of two stages."""
    i_head = gl.program_id(0)
    i_batch = gl.program_id(1)
    width = heads * HEAD_DIM
    column = i_head * HEAD_DIM
    d_block = panels.combine(d_qkv, d_qkv_rest)
    d_last = panels.combine(d_tail, d_tail_rest)
    RING: gl.constexpr = 2 if BLOCKS > 1 else 1
    # [stages, 1, 64, width] a panel
    s_q = panels.allocate(d_block, RING)
    s_k = panels.allocate(d_block, BLOCKS)
    s_v = panels.allocate(d_block, BLOCKS)
    if TAIL > 0:
        # [1, 1, TAIL, width] a panel
        s_q_tail = panels.allocate(d_last, 1)
        s_k_tail = panels.allocate(d_last, 1)
        s_v_tail = panels.allocate(d_last, 1)
    else:
        s_q_tail = ()
        s_k_tail = ()
        s_v_tail = ()
    # mbarriers 0 and 1: the two stages of queries; 2: all keys, and the tail's queries; 3: all values.
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    BLOCK_BYTES: gl.constexpr = 64 * HEAD_DIM * 2
    TAIL_BYTES: gl.constexpr = TAIL * HEAD_DIM * 2
    mbarrier.expect(bars.index(0), BLOCK_BYTES)
    panels.load_tma(d_block, i_batch, 0, column, bars.index(0), s_q, 0)
    mbarrier.expect(bars.index(2), BLOCKS * BLOCK_BYTES + 2 * TAIL_BYTES)
    if TAIL > 0:
        panels.load_tma(d_last, i_batch, BLOCKS * 64, column, bars.index(2), s_q_tail, 0)
    _load_head(d_block, d_last, i_batch, column + width, bars.index(2), s_k, s_k_tail, BLOCKS, TAIL)
    mbarrier.expect(bars.index(3), BLOCKS * BLOCK_BYTES + TAIL_BYTES)
    _load_head(d_block, d_last, i_batch, column + 2 * width, bars.index(3), s_v, s_v_tail, BLOCKS, TAIL)
    if BLOCKS > 1:
        mbarrier.expect(bars.index(1), BLOCK_BYTES)
        panels.load_tma(d_block, i_batch, 64, column, bars.index(1), s_q, 1)
    p_o = p_out + (i_batch.to(gl.int64) * tokens * heads + i_head) * HEAD_DIM
    p_l = p_lse + (i_batch.to(gl.int64) * heads + i_head) * tokens
    mbarrier.wait(bars.index(2), 0)
    if TAIL > 0:
        # While the values arrive.
        attend_tail(s_q_tail, s_k, s_v, s_k_tail, s_v_tail, bars.index(3), p_o, p_l, width, tokens, scale, BLOCKS)
    for i in range(BLOCKS):
        mbarrier.wait(bars.index(i % RING), (i // RING) % 2)
        # [64, width] a panel
        b_q = panels.load_shared(panels.stage(s_q, i % RING), operand_a())
        b_issued = _mma_all_scores(b_q, s_k, s_k_tail, BLOCKS, TAIL)
        if i + 2 < BLOCKS:
            # All warps have their queries in registers: the stage may be filled again.
            barrier()
            mbarrier.expect(bars.index(i % RING), BLOCK_BYTES)
            panels.load_tma(d_block, i_batch, (i + 2) * 64, column, bars.index(i % RING), s_q, i % RING)
        # [64, width] a panel, [64], [64]
        b_out, b_factor, b_lse = _attend(b_issued, s_v, s_v_tail, bars.index(3), tokens, scale, BLOCKS, RAGGED, TAIL)
        panels.store_rows(p_o, panels.scale_rows(b_out, b_factor), i * 64, width, tokens)
        # [64]
        i_rows = i * 64 + gl.arange(0, 64, layout=mma_rows(64))
        gl.store(p_l + i_rows, b_lse, mask=i_rows < tokens)


@gluon.jit
def _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_q, s_do, s_lse, s_delta, scale, N: gl.constexpr):
    """dK and dV of 64 keys with N more queries. Scores are transposed, so that P and dS are left operands as they come."""
    PANELS: gl.constexpr = len(s_q)
    # [64, N]; both products are in flight, P is computed while the second one runs
    b_s = panels.mma_scores(b_k, s_q, N)
    b_dp = panels.mma_scores(b_v, s_do, N)
    # [N]
    b_lse = s_lse.load(mma_columns(N))
    b_delta = s_delta.load(mma_columns(N))
    # [64, N]
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - b_lse[None, :])
    # [64, width] a panel
    b_dv = panels.mma_accumulate(b_p, s_do, b_dv)
    b_dp = warpgroup_mma_wait(PANELS, deps=(b_dp,))
    b_dk = panels.mma_accumulate(b_p * (b_dp - b_delta[None, :]), s_q, b_dk)
    return b_dk, b_dv


@gluon.jit
def _accumulate_dq(b_q, b_do, b_dq, s_k, s_v, b_lse, b_delta, i_key, tokens, scale, N: gl.constexpr, MASKED: gl.constexpr):
    """dQ of 64 queries with N more keys."""
    # [64, N]
    b_s = panels.mma_scores(b_q, s_k, N)
    b_dp = panels.mma_scores(b_do, s_v, N)
    b_s = warpgroup_mma_wait(len(s_k), deps=(b_s,))
    b_exponent = b_s * scale - gl.convert_layout(b_lse, mma_rows(N))[:, None]
    if MASKED:
        b_exponent = _mask_keys(b_exponent, i_key, tokens, N, mma(N))
    b_p = gl.exp2(b_exponent)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    # [64, width] a panel
    return panels.mma_accumulate(b_p * (b_dp - gl.convert_layout(b_delta, mma_rows(N))[:, None]), s_k, b_dq)


@gluon.jit
def attention_short_bwd_kernel(
    d_qkv, d_qkv_rest, d_tail, d_tail_rest, d_grad, d_grad_rest, d_grad_tail, d_grad_tail_rest, p_out, p_lse, p_dqkv, p_sums,
    tokens, heads, scale, HEAD_DIM: gl.constexpr, BLOCKS: gl.constexpr, RAGGED: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One head: all its rows stay. First dK and dV, one block of keys after the other, then dQ, for which the scores are computed again.

    That is seven products instead of five, but P and dS never leave registers, and the loops need no barrier.
    `p_sums` takes the sums over the tokens of dQ, dK (zero, as those of dS's rows are) and dV (dO's, as P's rows sum to one).
    """
    i_head = gl.program_id(0)
    i_batch = gl.program_id(1)
    width = heads * HEAD_DIM
    column = i_head * HEAD_DIM
    d_block = panels.combine(d_qkv, d_qkv_rest)
    d_last = panels.combine(d_tail, d_tail_rest)
    d_do_block = panels.combine(d_grad, d_grad_rest)
    d_do_last = panels.combine(d_grad_tail, d_grad_tail_rest)
    # [BLOCKS, 1, 64, width] a panel
    s_q = panels.allocate(d_block, BLOCKS)
    s_k = panels.allocate(d_block, BLOCKS)
    s_v = panels.allocate(d_block, BLOCKS)
    s_do = panels.allocate(d_do_block, BLOCKS)
    # [1, 1, TAIL, width] a panel; empty tuples without a tail
    s_q_tail = panels.allocate(d_last, 1)
    s_k_tail = panels.allocate(d_last, 1)
    s_v_tail = panels.allocate(d_last, 1)
    s_do_tail = panels.allocate(d_do_last, 1)
    TILES: gl.constexpr = BLOCKS + (1 if TAIL > 0 else 0)
    # [TILES, 64]
    s_lse = gl.allocate_shared_memory(gl.float32, [TILES, 64], vector_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [TILES, 64], vector_shared())
    # An mbarrier for each block's four loads, and for the tail's.
    bars = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(TILES):
        mbarrier.init(bars.index(c), count=1)
    fence_async_shared()
    for c in gl.static_range(BLOCKS):
        mbarrier.expect(bars.index(c), 4 * 64 * HEAD_DIM * 2)
        panels.load_tma(d_do_block, i_batch, c * 64, column, bars.index(c), s_do, c)
        panels.load_tma(d_block, i_batch, c * 64, column, bars.index(c), s_q, c)
        panels.load_tma(d_block, i_batch, c * 64, column + width, bars.index(c), s_k, c)
        panels.load_tma(d_block, i_batch, c * 64, column + 2 * width, bars.index(c), s_v, c)
    if TAIL > 0:
        mbarrier.expect(bars.index(BLOCKS), 4 * TAIL * HEAD_DIM * 2)
        panels.load_tma(d_do_last, i_batch, BLOCKS * 64, column, bars.index(BLOCKS), s_do_tail, 0)
        panels.load_tma(d_last, i_batch, BLOCKS * 64, column, bars.index(BLOCKS), s_q_tail, 0)
        panels.load_tma(d_last, i_batch, BLOCKS * 64, column + width, bars.index(BLOCKS), s_k_tail, 0)
        panels.load_tma(d_last, i_batch, BLOCKS * 64, column + 2 * width, bars.index(BLOCKS), s_v_tail, 0)
    p_o = p_out + (i_batch.to(gl.int64) * tokens * heads + i_head) * HEAD_DIM
    p_l = p_lse + (i_batch.to(gl.int64) * heads + i_head) * tokens
    p_dq = p_dqkv + (i_batch.to(gl.int64) * tokens * 3 * heads + i_head) * HEAD_DIM
    p_sum = p_sums + (i_batch.to(gl.int64) * 3 * heads + i_head) * HEAD_DIM
    b_out = ()
    for c in gl.static_range(TILES):
        # [64, width] a panel and block, [TAIL, width] at the end
        b_out = b_out + (panels.load_rows(p_o, panels.stage(s_do if c < BLOCKS else s_do_tail, 0), c * 64, width, tokens),)
        # [64]; an infinite log-sum-exp makes the probabilities of rows beyond the end zero
        i_rows = c * 64 + gl.arange(0, 64, layout=vector())
        s_lse.index(c).store(gl.load(p_l + i_rows, mask=i_rows < tokens, other=float("inf")))
    # rowsum(dO · O), which equals rowsum(dP · P), and the sums of dO over the tokens.
    # [64, width] a panel
    b_total = panels.zeros_coalesced(panels.stage(s_do, 0))
    for c in gl.static_range(BLOCKS):
        mbarrier.wait(bars.index(c), 0)
        # [64, width] a panel
        b_do_block = panels.load_coalesced(panels.stage(s_do, c))
        s_delta.index(c).store(panels.row_dots(b_do_block, b_out[c]))
        b_total = panels.add(b_total, b_do_block)
    # [width] a panel
    b_dv_sums = panels.column_sums(b_total)
    if TAIL > 0:
        mbarrier.wait(bars.index(BLOCKS), 0)
        # [TAIL, width] a panel
        b_do_tail = panels.load_coalesced(panels.stage(s_do_tail, 0))
        s_delta.index(BLOCKS).slice(0, TAIL).store(panels.row_dots(b_do_tail, b_out[BLOCKS]))
        # [width] a panel
        b_dv_sums = panels.add(b_dv_sums, panels.column_sums(b_do_tail))
    panels.store_vector(p_sum + 2 * width, b_dv_sums)
    panels.store_vector(p_sum + width, panels.scale(b_dv_sums, 0.0))
    # All warps see the log-sum-exp and the deltas.
    barrier()
    if TAIL > 0:
        # [width] a panel
        b_tail_sums = differentiate_tail(
            s_q, s_k, s_v, s_do, s_q_tail, s_k_tail, s_v_tail, s_do_tail, s_lse, s_delta, p_dq, width, tokens, scale, BLOCKS
        )  # fmt: skip
    for j in range(BLOCKS):
        # [64, width] a panel, in registers where there are enough of them
        if HEAD_DIM <= 64:
            b_k = panels.load_shared(panels.stage(s_k, j), operand_a())
            b_v = panels.load_shared(panels.stage(s_v, j), operand_a())
        else:
            b_k = panels.stage(s_k, j)
            b_v = panels.stage(s_v, j)
        b_dk = panels.accumulators(panels.stage(s_k, 0), 64)
        b_dv = panels.accumulators(panels.stage(s_v, 0), 64)
        for i in range(BLOCKS):
            s_q_block, s_do_block = panels.stage(s_q, i), panels.stage(s_do, i)
            b_dk, b_dv = _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_q_block, s_do_block, s_lse.index(i), s_delta.index(i), scale, 64)
        if TAIL > 0:
            # [TAIL]
            s_lse_tail = s_lse.index(BLOCKS).slice(0, TAIL)
            s_delta_tail = s_delta.index(BLOCKS).slice(0, TAIL)
            # [TAIL, width] a panel
            s_q_rows, s_do_rows = panels.stage(s_q_tail, 0), panels.stage(s_do_tail, 0)
            # [64, width] a panel
            b_dk, b_dv = _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_q_rows, s_do_rows, s_lse_tail, s_delta_tail, scale, TAIL)
        panels.store_rows(p_dq + 2 * width, panels.mma_wait(b_dv, len(s_k)), j * 64, 3 * width, tokens)
        panels.store_rows(p_dq + width, panels.scale(panels.mma_wait(b_dk), scale * LN_2), j * 64, 3 * width, tokens)
    # [64, width] a panel
    b_dq_total = panels.zeros_mma(panels.stage(s_q, 0))
    for i in range(BLOCKS):
        # [64, width] a panel
        if HEAD_DIM <= 64:
            b_q = panels.load_shared(panels.stage(s_q, i), operand_a())
            b_do = panels.load_shared(panels.stage(s_do, i), operand_a())
        else:
            b_q = panels.stage(s_q, i)
            b_do = panels.stage(s_do, i)
        # [64]
        b_lse = s_lse.index(i).load(mma_rows(64))
        b_delta = s_delta.index(i).load(mma_rows(64))
        # [64, width] a panel
        b_dq = panels.accumulators(panels.stage(s_q, 0), 64)
        for j in range(BLOCKS - RAGGED):
            s_k_block, s_v_block = panels.stage(s_k, j), panels.stage(s_v, j)
            b_dq = _accumulate_dq(b_q, b_do, b_dq, s_k_block, s_v_block, b_lse, b_delta, 0, tokens, scale, 64, False)
        if RAGGED:
            LAST: gl.constexpr = BLOCKS - 1
            s_k_block, s_v_block = panels.stage(s_k, LAST), panels.stage(s_v, LAST)
            b_dq = _accumulate_dq(b_q, b_do, b_dq, s_k_block, s_v_block, b_lse, b_delta, LAST * 64, tokens, scale, 64, True)
        if TAIL > 0:
            s_k_rows, s_v_rows = panels.stage(s_k_tail, 0), panels.stage(s_v_tail, 0)
            b_dq = _accumulate_dq(b_q, b_do, b_dq, s_k_rows, s_v_rows, b_lse, b_delta, BLOCKS * 64, tokens, scale, TAIL, True)
        b_dq_scaled = panels.scale(panels.mma_wait(b_dq), scale * LN_2)
        panels.store_rows(p_dq, b_dq_scaled, i * 64, 3 * width, tokens)
        b_dq_total = panels.add(b_dq_total, b_dq_scaled)
    # [width] a panel
    b_dq_sums = panels.column_sums(b_dq_total)
    if TAIL > 0:
        b_dq_sums = panels.add(b_dq_sums, b_tail_sums)
    panels.store_vector(p_sum, b_dq_sums)


def forward(qkv: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """As `forward` of the portable kernels."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel():
        blocks = _blocks(tokens)
        inputs = _descriptors(tma_aligned(qkv), blocks["TAIL"])
        sizes = (tokens, heads, scale_of(head_dim))
        attention_short_fwd_kernel[(heads, batch)](*inputs, out, lse, *sizes, HEAD_DIM=head_dim, **blocks, **tile.launch())
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(the gradient of packed QKV, contiguous; its sums over batch and tokens, fp32 `[3, heads, head_dim]`, those of dK being zero)."""
    batch, tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    sums = qkv.new_empty(batch, 3, heads, head_dim, dtype=torch.float32)
    if out.numel():
        blocks = _blocks(tokens)
        inputs = (*_descriptors(tma_aligned(qkv), blocks["TAIL"]), *_descriptors(tma_aligned(grad), blocks["TAIL"]), out, lse)
        sizes = (tokens, heads, scale_of(head_dim))
        attention_short_bwd_kernel[(heads, batch)](*inputs, dqkv, sums, *sizes, HEAD_DIM=head_dim, **blocks, **tile.launch())
    return dqkv, sums.sum(0)


def _blocks(tokens: int) -> dict[str, int]:
    """The constants for a number of tokens."""
    full, rest = divmod(tokens, 64)
    if full and 0 < rest <= 16:
        return {"BLOCKS": full, "RAGGED": 0, "TAIL": 16}
    return {"BLOCKS": full + (rest > 0), "RAGGED": int(rest > 0), "TAIL": 0}


def _descriptors(x: Tensor, tail: int) -> list[TensorDescriptor | None]:
    """Of a block of 64 rows and of the tail."""
    return [descriptor for rows in (64, tail) for descriptor in descriptors(x, x.shape[-1], rows)]


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernel of a tile, for some of its lengths."""
    direction = tile.op.removeprefix("attention_short_")
    kernel = attention_short_fwd_kernel if direction == "forward" else attention_short_bwd_kernel
    pointers = {"p_out": f"*{dtype}", "p_lse": "*fp32"}
    if direction == "backward":
        pointers |= {"p_dqkv": f"*{dtype}", "p_sums": "*fp32"}
    lengths = [tokens for tokens in _LENGTHS.get(tile.features, _OTHER_LENGTHS) if tile.fits(tokens, tile.features)]
    for tokens in lengths or tile.tokens[1:]:
        blocks = _blocks(tokens)
        rows = {"d_qkv": 64, "d_tail": blocks["TAIL"]}
        if direction == "backward":
            rows |= {"d_grad": 64, "d_grad_tail": blocks["TAIL"]}
        types = descriptor_types(dtype, tile.features, rows)
        yield Variant(
            kernel=kernel,
            signature={name: kind for name, kind in types.items() if kind} | pointers | {"tokens": "i32", "heads": "i32", "scale": "fp32"},
            constants=dict.fromkeys(name for name, kind in types.items() if not kind) | {"HEAD_DIM": tile.features} | blocks,
            divisible=tuple(pointers),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_registers=tile.max_registers,
        )
