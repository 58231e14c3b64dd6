# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Attention of at most 256 tokens on Hopper: a head's rows are read once, by TMA, and stay in shared memory.

One program, a warpgroup, does a head of an example; several share a processor, so that one multiplies while another takes exponentials.
Probabilities go from one product to the next in registers. No atomics: every element has one writer, and runs repeat bit for bit.

- HEAD_DIM: a head's width, in one or two panels (`layouts`): `d_..._rest` describe the second one
- BLOCKS: blocks of 64 rows; RAGGED: the last one reaches beyond the tokens
- TAIL: 16 where so many rows at most remain after the blocks, else 0 (`few`)
- scale: log2(e) / √head_dim
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.hopper.few import attend_few, differentiate_few
from polyvit_kernels.hopper.layouts import (
    LN_2,
    accumulators,
    allocate,
    barrier,
    begin_scores,
    begin_sums,
    box,
    column_sums,
    columns_of,
    copy,
    descriptor_type,
    descriptors,
    finish_sums,
    left,
    line,
    line_shared,
    load_rows,
    mma,
    packed,
    panels,
    panels_of,
    plain_zeros,
    plus,
    read,
    read_wide,
    row_products,
    rows_of,
    store_rows,
    store_sums,
    times,
    wide_zeros,
)
from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.attention_short import scale_of

_LENGTHS = {64: (50, 145, 191, 197, 224, 256)}
"""For which `variants` compiles, by head_dim: with and without a ragged block, with and without rows after the blocks."""
_FEW_LENGTHS = (197, 256)


@gluon.jit
def _copy_head(d_block, d_few, i_batch, column, bar, s_rows, s_few, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """Begin to copy all rows of a head that begins at `column`."""
    for i in gl.static_range(BLOCKS):
        copy(d_block, i_batch, i * 64, column, bar, s_rows, i)
    if TAIL > 0:
        copy(d_few, i_batch, BLOCKS * 64, column, bar, s_few, 0)


@gluon.jit
def _mask_keys(b_s, i_key, tokens, N: gl.constexpr, L: gl.constexpr):
    """Keys beyond the end: their score, 0, could be far above all others."""
    i_keys = i_key + gl.arange(0, N, layout=gl.SliceLayout(0, L))
    return gl.where(i_keys[None, :] < tokens, b_s, float("-inf"))


@gluon.jit
def _begin_all_scores(b_q, s_k, s_k_few, BLOCKS: gl.constexpr, TAIL: gl.constexpr):
    """Begin the products of 64 queries with all keys, the last block first: what masks it is not needed for long."""
    b_begun = ()
    for c in gl.static_range(BLOCKS):
        b_begun = b_begun + (begin_scores(b_q, box(s_k, BLOCKS - 1 - c), 64),)
    if TAIL > 0:
        b_begun = b_begun + (begin_scores(b_q, box(s_k_few, 0), TAIL),)
    return b_begun


@gluon.jit
def _exponentials(b_s, b_max, scale, N: gl.constexpr):
    """(2 to the power of the scaled scores above the largest, their sums)"""
    b_p = gl.exp2(b_s * scale - gl.convert_layout(b_max, rows_of(N))[:, None])
    return b_p, gl.convert_layout(gl.sum(b_p, 1), rows_of(64))


@gluon.jit
def _attend(b_begun, s_v, s_v_few, bar_v, tokens, scale, BLOCKS: gl.constexpr, RAGGED: gl.constexpr, TAIL: gl.constexpr):
    """(unscaled out, its factors, log-sums) of 64 queries, whose scores are reduced as they come."""
    PANELS: gl.constexpr = len(s_v)
    TILES: gl.constexpr = len(b_begun)
    b_s = ()
    for c in gl.static_range(TILES):
        b_tile = warpgroup_mma_wait((TILES - 1 - c) * PANELS, deps=(b_begun[c],))
        if c == BLOCKS:
            b_tile = _mask_keys(b_tile, c * 64, tokens, TAIL, mma(TAIL))
        elif c == 0 and RAGGED:
            b_tile = _mask_keys(b_tile, (BLOCKS - 1) * 64, tokens, 64, mma(64))
        b_tile_max = gl.convert_layout(gl.max(b_tile, 1), rows_of(64))
        b_max = b_tile_max if c == 0 else gl.maximum(b_max, b_tile_max)
        b_s = b_s + (b_tile,)
    # The scale is positive: it goes into the exponent, one fused multiply-add per score.
    b_max = b_max * scale
    b_out = accumulators(box(s_v, 0), 64)
    for c in gl.static_range(TILES):
        b_p, b_tile_sum = _exponentials(b_s[c], b_max, scale, b_s[c].shape[1])
        b_sum = b_tile_sum if c == 0 else b_sum + b_tile_sum
        if c == 0:
            mbarrier.wait(bar_v, 0)
        b_out = begin_sums(b_p, box(s_v if c < BLOCKS else s_v_few, BLOCKS - 1 - c if c < BLOCKS else 0), b_out, c > 0)
    return finish_sums(b_out), 1.0 / b_sum, b_max + gl.log2(b_sum)


@gluon.jit
def _scale_rows(b, b_factor):
    return b * gl.convert_layout(b_factor, rows_of(b.shape[1]))[:, None]


@gluon.jit
def _store_out(p_out, p_lse, b_out, b_factor, b_lse, i_row, stride, tokens):
    b_panels = ()
    for w in gl.static_range(len(b_out)):
        b_panels = b_panels + (_scale_rows(b_out[w], b_factor),)
    store_rows(p_out, b_panels, i_row, stride, tokens)
    i_rows = i_row + gl.arange(0, 64, layout=rows_of(64))
    gl.store(p_lse + i_rows, b_lse, mask=i_rows < tokens)


@gluon.jit
def attention_short_fwd_kernel(
    d_qkv,
    d_qkv_rest,
    d_few,
    d_few_rest,
    p_out,
    p_lse,
    tokens,
    heads,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCKS: gl.constexpr,
    RAGGED: gl.constexpr,
    TAIL: gl.constexpr,
):
    """One head: keys and values stay, the queries come through a ring of two blocks."""
    i_head = gl.program_id(0)
    i_batch = gl.program_id(1)
    width = heads * HEAD_DIM
    c_q = i_head * HEAD_DIM
    d_block = panels_of(d_qkv, d_qkv_rest)
    d_last = panels_of(d_few, d_few_rest)
    RING: gl.constexpr = 2 if BLOCKS > 1 else 1
    s_q = allocate(d_block, RING)
    s_k = allocate(d_block, BLOCKS)
    s_v = allocate(d_block, BLOCKS)
    if TAIL > 0:
        s_q_few = allocate(d_last, 1)
        s_k_few = allocate(d_last, 1)
        s_v_few = allocate(d_last, 1)
    else:
        s_q_few = ()
        s_k_few = ()
        s_v_few = ()
    # Of the two blocks of the ring, of all keys (and the few queries), of all values.
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    BLOCK_BYTES: gl.constexpr = 64 * HEAD_DIM * 2
    FEW_BYTES: gl.constexpr = TAIL * HEAD_DIM * 2
    mbarrier.expect(bars.index(0), BLOCK_BYTES)
    copy(d_block, i_batch, 0, c_q, bars.index(0), s_q, 0)
    mbarrier.expect(bars.index(2), BLOCKS * BLOCK_BYTES + 2 * FEW_BYTES)
    if TAIL > 0:
        copy(d_last, i_batch, BLOCKS * 64, c_q, bars.index(2), s_q_few, 0)
    _copy_head(d_block, d_last, i_batch, c_q + width, bars.index(2), s_k, s_k_few, BLOCKS, TAIL)
    mbarrier.expect(bars.index(3), BLOCKS * BLOCK_BYTES + FEW_BYTES)
    _copy_head(d_block, d_last, i_batch, c_q + 2 * width, bars.index(3), s_v, s_v_few, BLOCKS, TAIL)
    if BLOCKS > 1:
        mbarrier.expect(bars.index(1), BLOCK_BYTES)
        copy(d_block, i_batch, 64, c_q, bars.index(1), s_q, 1)
    p_o = p_out + (i_batch.to(gl.int64) * tokens * heads + i_head) * HEAD_DIM
    p_l = p_lse + (i_batch.to(gl.int64) * heads + i_head) * tokens
    mbarrier.wait(bars.index(2), 0)
    if TAIL > 0:
        # While the values arrive.
        attend_few(s_q_few, s_k, s_v, s_k_few, s_v_few, bars.index(3), p_o, p_l, width, tokens, scale, BLOCKS)
    for i in range(BLOCKS):
        mbarrier.wait(bars.index(i % RING), (i // RING) % 2)
        b_q = read(box(s_q, i % RING), left())
        b_begun = _begin_all_scores(b_q, s_k, s_k_few, BLOCKS, TAIL)
        if i + 2 < BLOCKS:
            # Every warp has read its queries.
            barrier()
            mbarrier.expect(bars.index(i % RING), BLOCK_BYTES)
            copy(d_block, i_batch, (i + 2) * 64, c_q, bars.index(i % RING), s_q, i % RING)
        b_out, b_factor, b_lse = _attend(b_begun, s_v, s_v_few, bars.index(3), tokens, scale, BLOCKS, RAGGED, TAIL)
        _store_out(p_o, p_l, b_out, b_factor, b_lse, i * 64, width, tokens)


@gluon.jit
def _key_step(b_k, b_v, b_dk, b_dv, s_q, s_do, s_lse, s_delta, scale, N: gl.constexpr):
    """Add what N queries give to dK and dV of 64 keys. Scores are transposed: P and dS are left factors as they come."""
    PANELS: gl.constexpr = len(s_q)
    b_s = begin_scores(b_k, s_q, N)
    b_dp = begin_scores(b_v, s_do, N)
    b_lse = s_lse.load(columns_of(N))
    b_delta = s_delta.load(columns_of(N))
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - b_lse[None, :])
    b_dv = begin_sums(b_p, s_do, b_dv)
    b_dp = warpgroup_mma_wait(PANELS, deps=(b_dp,))
    b_dk = begin_sums(b_p * (b_dp - b_delta[None, :]), s_q, b_dk)
    return b_dk, b_dv


@gluon.jit
def _query_step(b_q, b_do, b_dq, s_k, s_v, b_lse, b_delta, i_key, tokens, scale, N: gl.constexpr, MASKED: gl.constexpr):
    """Add what N keys give to dQ of 64 queries."""
    b_s = begin_scores(b_q, s_k, N)
    b_dp = begin_scores(b_do, s_v, N)
    b_s = warpgroup_mma_wait(len(s_k), deps=(b_s,))
    b_x = b_s * scale - gl.convert_layout(b_lse, rows_of(N))[:, None]
    if MASKED:
        b_x = _mask_keys(b_x, i_key, tokens, N, mma(N))
    b_p = gl.exp2(b_x)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    return begin_sums(b_p * (b_dp - gl.convert_layout(b_delta, rows_of(N))[:, None]), s_k, b_dq)


@gluon.jit
def attention_short_bwd_kernel(
    d_qkv,
    d_qkv_rest,
    d_few,
    d_few_rest,
    d_grad,
    d_grad_rest,
    d_grad_few,
    d_grad_few_rest,
    p_out,
    p_lse,
    p_dqkv,
    p_sums,
    tokens,
    heads,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCKS: gl.constexpr,
    RAGGED: gl.constexpr,
    TAIL: gl.constexpr,
):
    """One head: all its rows stay. First dK and dV of a block of keys after the other, then dQ, for which the scores are made again.

    That is seven products instead of five, but P and dS never leave registers, and the loops need no barrier.
    `p_sums` takes the sums over the tokens of dQ, dK (zero, as those of dS's rows are) and dV (dO's, as P's rows sum to one).
    """
    i_head = gl.program_id(0)
    i_batch = gl.program_id(1)
    width = heads * HEAD_DIM
    c_q = i_head * HEAD_DIM
    d_block = panels_of(d_qkv, d_qkv_rest)
    d_last = panels_of(d_few, d_few_rest)
    d_do_block = panels_of(d_grad, d_grad_rest)
    d_do_last = panels_of(d_grad_few, d_grad_few_rest)
    s_q = allocate(d_block, BLOCKS)
    s_k = allocate(d_block, BLOCKS)
    s_v = allocate(d_block, BLOCKS)
    s_do = allocate(d_do_block, BLOCKS)
    f_q = allocate(d_last, 1)
    f_k = allocate(d_last, 1)
    f_v = allocate(d_last, 1)
    f_do = allocate(d_do_last, 1)
    TILES: gl.constexpr = BLOCKS + (1 if TAIL > 0 else 0)
    s_lse = gl.allocate_shared_memory(gl.float32, [TILES, 64], line_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [TILES, 64], line_shared())
    bars = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(TILES):
        mbarrier.init(bars.index(c), count=1)
    fence_async_shared()
    for c in gl.static_range(BLOCKS):
        mbarrier.expect(bars.index(c), 4 * 64 * HEAD_DIM * 2)
        copy(d_do_block, i_batch, c * 64, c_q, bars.index(c), s_do, c)
        copy(d_block, i_batch, c * 64, c_q, bars.index(c), s_q, c)
        copy(d_block, i_batch, c * 64, c_q + width, bars.index(c), s_k, c)
        copy(d_block, i_batch, c * 64, c_q + 2 * width, bars.index(c), s_v, c)
    if TAIL > 0:
        mbarrier.expect(bars.index(BLOCKS), 4 * TAIL * HEAD_DIM * 2)
        copy(d_do_last, i_batch, BLOCKS * 64, c_q, bars.index(BLOCKS), f_do, 0)
        copy(d_last, i_batch, BLOCKS * 64, c_q, bars.index(BLOCKS), f_q, 0)
        copy(d_last, i_batch, BLOCKS * 64, c_q + width, bars.index(BLOCKS), f_k, 0)
        copy(d_last, i_batch, BLOCKS * 64, c_q + 2 * width, bars.index(BLOCKS), f_v, 0)
    p_o = p_out + (i_batch.to(gl.int64) * tokens * heads + i_head) * HEAD_DIM
    p_l = p_lse + (i_batch.to(gl.int64) * heads + i_head) * tokens
    p_dq = p_dqkv + (i_batch.to(gl.int64) * tokens * 3 * heads + i_head) * HEAD_DIM
    p_sum = p_sums + (i_batch.to(gl.int64) * 3 * heads + i_head) * HEAD_DIM
    b_out = ()
    for c in gl.static_range(TILES):
        b_out = b_out + (load_rows(p_o, box(s_do if c < BLOCKS else f_do, 0), c * 64, width, tokens),)
        # An infinite log-sum makes the probabilities of rows beyond the end zero.
        i_rows = c * 64 + gl.arange(0, 64, layout=line())
        s_lse.index(c).store(gl.load(p_l + i_rows, mask=i_rows < tokens, other=float("inf")))
    # rowsum(dO · O), which equals rowsum(dP · P).
    b_total = wide_zeros(box(s_do, 0))
    for c in gl.static_range(BLOCKS):
        mbarrier.wait(bars.index(c), 0)
        b_upstream = read_wide(box(s_do, c))
        s_delta.index(c).store(row_products(b_upstream, b_out[c]))
        b_total = plus(b_total, b_upstream)
    b_sums = column_sums(b_total)
    if TAIL > 0:
        mbarrier.wait(bars.index(BLOCKS), 0)
        b_few_do = read_wide(box(f_do, 0))
        s_delta.index(BLOCKS).slice(0, TAIL).store(row_products(b_few_do, b_out[BLOCKS]))
        b_sums = plus(b_sums, column_sums(b_few_do))
    store_sums(p_sum + 2 * width, b_sums)
    store_sums(p_sum + width, times(b_sums, 0.0))
    barrier()
    if TAIL > 0:
        b_few_sums = differentiate_few(
            s_q, s_k, s_v, s_do, f_q, f_k, f_v, f_do, s_lse, s_delta, p_dq, width, tokens, scale, BLOCKS
        )  # fmt: skip
    for j in range(BLOCKS):
        if HEAD_DIM <= 64:
            b_k = read(box(s_k, j), left())
            b_v = read(box(s_v, j), left())
        else:
            b_k = box(s_k, j)
            b_v = box(s_v, j)
        b_dk = accumulators(box(s_k, 0), 64)
        b_dv = accumulators(box(s_v, 0), 64)
        for i in range(BLOCKS):
            b_dk, b_dv = _key_step(b_k, b_v, b_dk, b_dv, box(s_q, i), box(s_do, i), s_lse.index(i), s_delta.index(i), scale, 64)
        if TAIL > 0:
            few_lse = s_lse.index(BLOCKS).slice(0, TAIL)
            few_delta = s_delta.index(BLOCKS).slice(0, TAIL)
            b_dk, b_dv = _key_step(b_k, b_v, b_dk, b_dv, box(f_q, 0), box(f_do, 0), few_lse, few_delta, scale, TAIL)
        store_rows(p_dq + 2 * width, finish_sums(b_dv, len(s_k)), j * 64, 3 * width, tokens)
        store_rows(p_dq + width, times(finish_sums(b_dk), scale * LN_2), j * 64, 3 * width, tokens)
    b_dq_sums = plain_zeros(box(s_q, 0))
    for i in range(BLOCKS):
        if HEAD_DIM <= 64:
            b_q = read(box(s_q, i), left())
            b_do = read(box(s_do, i), left())
        else:
            b_q = box(s_q, i)
            b_do = box(s_do, i)
        b_lse = s_lse.index(i).load(rows_of(64))
        b_delta = s_delta.index(i).load(rows_of(64))
        b_dq = accumulators(box(s_q, 0), 64)
        for j in range(BLOCKS - RAGGED):
            b_dq = _query_step(b_q, b_do, b_dq, box(s_k, j), box(s_v, j), b_lse, b_delta, 0, tokens, scale, 64, False)
        if RAGGED:
            LAST: gl.constexpr = BLOCKS - 1
            b_dq = _query_step(b_q, b_do, b_dq, box(s_k, LAST), box(s_v, LAST), b_lse, b_delta, LAST * 64, tokens, scale, 64, True)
        if TAIL > 0:
            b_dq = _query_step(b_q, b_do, b_dq, box(f_k, 0), box(f_v, 0), b_lse, b_delta, BLOCKS * 64, tokens, scale, TAIL, True)
        b_dq_done = times(finish_sums(b_dq), scale * LN_2)
        store_rows(p_dq, b_dq_done, i * 64, 3 * width, tokens)
        b_dq_sums = plus(b_dq_sums, b_dq_done)
    b_q_sums = column_sums(b_dq_sums)
    if TAIL > 0:
        b_q_sums = plus(b_q_sums, b_few_sums)
    store_sums(p_sum, b_q_sums)


def forward(qkv: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """As the portable kernels' of that name."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel():
        blocks = _blocks(tokens)
        inputs = _descriptors(packed(qkv), blocks["TAIL"])
        sizes = (tokens, heads, scale_of(head_dim))
        attention_short_fwd_kernel[(heads, batch)](*inputs, out, lse, *sizes, HEAD_DIM=head_dim, **blocks, **tile.launch())
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(the packed gradient, its sums over batch and tokens `[3, heads, head_dim]` in fp32), the sums of dK being zero."""
    batch, tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    sums = qkv.new_empty(batch, 3, heads, head_dim, dtype=torch.float32)
    if out.numel():
        blocks = _blocks(tokens)
        inputs = (*_descriptors(packed(qkv), blocks["TAIL"]), *_descriptors(packed(grad), blocks["TAIL"]), out, lse)
        sizes = (tokens, heads, scale_of(head_dim))
        attention_short_bwd_kernel[(heads, batch)](*inputs, dqkv, sums, *sizes, HEAD_DIM=head_dim, **blocks, **tile.launch())
    return dqkv, sums.sum(0)


def _blocks(tokens: int) -> dict[str, int]:
    """The constants of a length."""
    whole, rest = divmod(tokens, 64)
    if whole and 0 < rest <= 16:
        return {"BLOCKS": whole, "RAGGED": 0, "TAIL": 16}
    return {"BLOCKS": whole + (rest > 0), "RAGGED": int(rest > 0), "TAIL": 0}


def _descriptors(x: Tensor, tail: int) -> list[TensorDescriptor | None]:
    """Of the panels of a block of 64 rows and of the rows after the blocks."""
    return [descriptor for rows in (64, tail) for descriptor in descriptors(x, x.shape[-1], rows)]


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernel of a row, for some of its lengths."""
    direction = tile.op.removeprefix("attention_short_")
    kernel = attention_short_fwd_kernel if direction == "forward" else attention_short_bwd_kernel
    pointers = {"p_out": f"*{dtype}", "p_lse": "*fp32"}
    if direction == "backward":
        pointers |= {"p_dqkv": f"*{dtype}", "p_sums": "*fp32"}
    lengths = [tokens for tokens in _LENGTHS.get(tile.features, _FEW_LENGTHS) if tile.fits(tokens, tile.features)]
    for tokens in lengths or tile.tokens[1:]:
        blocks = _blocks(tokens)
        types = _descriptor_types(dtype, tile.features, blocks["TAIL"], ("d_qkv", "d_few"))
        if direction == "backward":
            types |= _descriptor_types(dtype, tile.features, blocks["TAIL"], ("d_grad", "d_grad_few"))
        yield Variant(
            kernel=kernel,
            signature={name: kind for name, kind in types.items() if kind} | pointers | {"tokens": "i32", "heads": "i32", "scale": "fp32"},
            constants=dict.fromkeys(name for name, kind in types.items() if not kind) | {"HEAD_DIM": tile.features} | blocks,
            divisible=tuple(pointers),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_registers=tile.max_registers,
        )


def _descriptor_types(dtype: str, head_dim: int, tail: int, names: tuple[str, str]) -> dict[str, str | None]:
    return {
        name + suffix: descriptor_type(dtype, rows, width) if rows * width else None
        for name, rows in zip(names, (64, tail), strict=True)
        for suffix, width in zip(("", "_rest"), panels(head_dim), strict=True)
    }
