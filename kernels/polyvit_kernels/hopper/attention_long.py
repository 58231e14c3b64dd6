# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Attention of any number of tokens on Hopper, of equal sequences or of sequences packed one after the other.

A processor has one program, which takes one tile after the other. Of a tile's head a few blocks of 64 rows stay, one with each consumer, a
warpgroup; the other rows stream past them all through a ring in shared memory, which a warp of its own fills by TMA:

- forward: queries stay, keys and values stream (online softmax)
- dQ: queries, dO and out stay, keys and values stream. rowsum(dO · out) comes from here
- dK and dV: keys and values stay, queries and dO stream with their log-sums. Scores are transposed: their rows are keys

So the backward computes scores and dP twice, seven products instead of five, but P and dS never leave registers, and no two programs add
to one element: no atomics, runs repeat bit for bit. The last block of what streams comes first: it alone is masked, and it may be narrower.

- VARLEN: sequences are packed, and the rows beyond a sequence's end, which are another one's, are zeroed in the ring
- HEAD_DIM: a head's width, in one or two panels (`layouts`): `d_..._rest` describe the second one
- WARPGROUPS: consumers, two or three
- BLOCK_N: rows that stream at a time, STAGES: places for them; TAIL: so many rows of the last block are multiplied
- AHEAD: the next scores are computed while this block's exponentials are taken (forward)
- IN_REGISTERS: keys and values are read from shared memory once (dK and dV)
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from polyvit_kernels.attention_short import scale_of
from polyvit_kernels.hopper.layouts import (
    LN_2,
    accumulators,
    allocate,
    begin_scores,
    begin_sums,
    box,
    columns_of,
    copy,
    descriptors,
    finish_sums,
    left,
    line_shared,
    mma,
    packed,
    panels_of,
    read,
    rows_of,
    store_rows,
    times,
)
from polyvit_kernels.tiles import Tile

FORWARD, QUERIES, KEYS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what a kernel gives: the output, dQ, or dK and dV
_INTEGERS = ["tokens", "heads", "groups", "tiles"]


@gluon.jit
def _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr):
    """(sequence, its first row, number of its rows, head, group of its blocks, number of its groups)"""
    i_group = i_tile % groups
    i_head = i_tile // groups % heads
    i_sequence = i_tile // groups // heads
    if VARLEN:
        i_first = gl.load(p_cu_tokens + i_sequence)
        count = gl.load(p_cu_tokens + i_sequence + 1) - i_first
    else:
        i_first = 0
        count = tokens
    return i_sequence, i_first, count, i_head, i_group, (count + WARPGROUPS * 64 - 1) // (WARPGROUPS * 64)


@gluon.jit
def _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN: gl.constexpr):
    """Offset of a sequence's first log-sum in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(gl.int64) * tokens + i_first
    return (i_sequence.to(gl.int64) * heads + i_head) * tokens


@gluon.jit
def _top(s_panels, ROWS: gl.constexpr):
    """The first rows of all panels."""
    s_top = ()
    for w in gl.static_range(len(s_panels)):
        s_top = s_top + (s_panels[w].slice(0, ROWS),)
    return s_top


@gluon.jit
def _zero_beyond(s_panel, rest):
    """Zero the rows from `rest` on: one warp, eight rows at a time."""
    WIDTH: gl.constexpr = s_panel.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    for i in gl.static_range(s_panel.shape[0] // 8):
        if rest < i * 8 + 8:
            s_part = s_panel.slice(i * 8, 8)
            b_part = s_part.load(LAYOUT)
            r = i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            s_part.store(gl.where(r[:, None] < rest, b_part, gl.zeros_like(b_part)))


@gluon.jit
def _produce(
    stay, stream, sums, bars, sizes, GIVES: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the consumers' places and the ring, tile after tile, as they become free."""
    d_stay, s_stay = stay
    d_stream, s_stream = stream
    p_lse, p_delta, s_lse, s_delta = sums
    own_full, own_empty, full, empty, landed = bars
    p_cu_tokens, tokens, heads, groups, tiles, scale = sizes
    LINE: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    PLACES: gl.constexpr = 2 if GIVES == KEYS else 1
    BYTES: gl.constexpr = 2 * HEAD_DIM
    width = heads * HEAD_DIM
    turn = 0
    step = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            i_batch = 0 if VARLEN else i_sequence
            column = i_head * HEAD_DIM
            for w in gl.static_range(WARPGROUPS):
                place = w * PLACES + turn % PLACES
                mbarrier.wait(own_empty.index(place), (turn // PLACES & 1) ^ 1)
                mbarrier.expect(own_full.index(place), len(d_stay) * 64 * BYTES)
                for x in gl.static_range(len(d_stay)):
                    c = column + (x + 1) * width if GIVES == KEYS else column
                    copy(d_stay[x], i_batch, i_first + (i_group + w * used) * 64, c, own_full.index(place), s_stay[x], place)
            steps = (count + BLOCK_N - 1) // BLOCK_N
            for j in range(step, step + steps):
                slot = j % STAGES
                i_row = (steps if j == step else j - step) * BLOCK_N - BLOCK_N
                if GIVES == KEYS:
                    i = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN) + i_row + gl.arange(0, BLOCK_N, layout=LINE)
                    is_row = i_row + gl.arange(0, BLOCK_N, layout=LINE) < count
                    # An infinite log-sum makes the probabilities of rows beyond the end zero.
                    b_lse = gl.load(p_lse + i, mask=is_row, other=float("inf"))
                    b_delta = gl.load(p_delta + i, mask=is_row, other=0.0)
                mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)
                if GIVES == KEYS:
                    s_lse.index(slot).store(b_lse)
                    s_delta.index(slot).store(b_delta)
                    mbarrier.arrive(full.index(slot), count=1)
                c_0 = column if GIVES == KEYS else column + width
                c_1 = column if GIVES == KEYS else column + 2 * width
                if VARLEN and j == step:
                    mbarrier.expect(landed, 2 * BLOCK_N * BYTES)
                    copy(d_stream[0], i_batch, i_first + i_row, c_0, landed, s_stream[0], slot)
                    copy(d_stream[1], i_batch, i_first + i_row, c_1, landed, s_stream[1], slot)
                    mbarrier.wait(landed, turn & 1)
                    for x in gl.static_range(2):
                        for w in gl.static_range(len(s_stream[x])):
                            _zero_beyond(box(s_stream[x], slot)[w], count - i_row)
                    fence_async_shared()
                    mbarrier.arrive(full.index(slot), count=1)
                else:
                    mbarrier.expect(full.index(slot), 2 * BLOCK_N * BYTES)
                    copy(d_stream[0], i_batch, i_first + i_row, c_0, full.index(slot), s_stream[0], slot)
                    copy(d_stream[1], i_batch, i_first + i_row, c_1, full.index(slot), s_stream[1], slot)
            step += steps
            turn += 1


@gluon.jit
def _consume(
    work, tensors, bars, sizes, WARPGROUP: gl.constexpr, PLACES: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    """One block of 64 rows of every tile."""
    own_full, own_empty, full, empty, landed = bars
    p_cu_tokens, tokens, heads, groups, tiles, scale = sizes
    turn = 0
    step = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            steps = (count + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            place = WARPGROUP * PLACES + turn % PLACES
            mbarrier.wait(own_full.index(place), turn // PLACES & 1)
            if i_row < count:
                o_row = i_first.to(gl.int64) if VARLEN else i_sequence.to(gl.int64) * tokens
                o_sum = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                rows = (i_row, count, o_row, o_sum, i_head * HEAD_DIM, heads * HEAD_DIM)
                work(tensors, place, own_empty.index(place), full, empty, rows, step, step + steps, scale, BLOCK_N, STAGES, TAIL, OPTION)
            else:
                mbarrier.arrive(own_empty.index(place), count=1)
                for j in range(step, step + steps):
                    mbarrier.wait(full.index(j % STAGES), j // STAGES & 1)
                    mbarrier.arrive(empty.index(j % STAGES), count=1)
            step += steps
            turn += 1


# Forward


@gluon.jit
def _scale_rows(b_panel, b_factor):
    return b_panel * gl.convert_layout(b_factor, rows_of(b_panel.shape[1]))[:, None]


@gluon.jit
def _rescale(b_panels, b_factor):
    """Every row of all panels times a number of its own."""
    b_new = ()
    for w in gl.static_range(len(b_panels)):
        b_new = b_new + (_scale_rows(b_panels[w], b_factor),)
    return b_new


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale):
    """(exponentials, maximum, sum, factor of what was summed before): arXiv 2205.14135, algorithm 1."""
    N: gl.constexpr = b_s.shape[1]
    b_new = gl.maximum(b_max, gl.convert_layout(gl.max(b_s, 1), rows_of(64)) * scale)
    b_p = gl.exp2(b_s * scale - gl.convert_layout(b_new, rows_of(N))[:, None])
    b_alpha = gl.exp2(b_max - b_new)
    return b_p, b_new, b_sum * b_alpha + gl.convert_layout(gl.sum(b_p, 1), rows_of(64)), b_alpha


@gluon.jit
def _absorb_last(b_q, s_k, s_v, done, rest, scale):
    """(output, maximum, sum) of the last keys, which are the first to be seen."""
    N: gl.constexpr = s_k[0].shape[0]
    b_s = warpgroup_mma_wait(0, deps=(begin_scores(b_q, s_k, N),))
    b_s = gl.where(gl.arange(0, N, layout=columns_of(N))[None, :] < rest, b_s, float("-inf"))
    b_max = gl.max(b_s, 1) * scale
    b_p = gl.exp2(b_s * scale - b_max[:, None])
    b_out = finish_sums(begin_sums(b_p, s_v, accumulators(s_v, 64)))
    mbarrier.arrive(done, count=1)
    return b_out, gl.convert_layout(b_max, rows_of(64)), gl.convert_layout(gl.sum(b_p, 1), rows_of(64))


@gluon.jit
def _attend(
    tensors, place, read_all, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """The output of 64 queries."""
    p_out, p_lse, s_q, s_k, s_v = tensors
    i_row, count, o_row, o_sum, column, width = rows
    PANELS: gl.constexpr = len(s_q)
    b_q = read(box(s_q, place), left())
    mbarrier.arrive(read_all, count=1)
    slot = start % STAGES
    mbarrier.wait(full.index(slot), start // STAGES & 1)
    b_out, b_max, b_sum = _absorb_last(
        b_q, _top(box(s_k, slot), TAIL), _top(box(s_v, slot), TAIL), empty.index(slot), count - (end - start - 1) * BLOCK_N, scale
    )  # fmt: skip
    if AHEAD:
        if end - start > 1:
            slot = (start + 1) % STAGES
            mbarrier.wait(full.index(slot), (start + 1) // STAGES & 1)
            b_s = warpgroup_mma_wait(0, deps=(begin_scores(b_q, box(s_k, slot), BLOCK_N),))
            b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
            b_out = _rescale(b_out, b_alpha)
            b_left = b_p.to(s_v[0].dtype)
            for j in range(start + 2, end):
                before = (j - 1) % STAGES
                slot = j % STAGES
                mbarrier.wait(full.index(slot), j // STAGES & 1)
                b_s = begin_scores(b_q, box(s_k, slot), BLOCK_N)
                b_out = begin_sums(b_left, box(s_v, before), b_out)
                b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
                b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
                b_out = finish_sums(b_out)
                mbarrier.arrive(empty.index(before), count=1)
                b_out = _rescale(b_out, b_alpha)
                b_left = b_p.to(s_v[0].dtype)
            slot = (end - 1) % STAGES
            b_out = finish_sums(begin_sums(b_left, box(s_v, slot), b_out))
            mbarrier.arrive(empty.index(slot), count=1)
    else:
        for j in range(start + 1, end):
            slot = j % STAGES
            mbarrier.wait(full.index(slot), j // STAGES & 1)
            b_s = warpgroup_mma_wait(0, deps=(begin_scores(b_q, box(s_k, slot), BLOCK_N),))
            b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
            b_out = finish_sums(begin_sums(b_p, box(s_v, slot), _rescale(b_out, b_alpha)))
            mbarrier.arrive(empty.index(slot), count=1)
    store_rows(p_out + o_row * width + column, _rescale(b_out, 1.0 / b_sum), i_row, width, count)
    i = i_row + gl.arange(0, 64, layout=rows_of(64))
    gl.store(p_lse + o_sum + i, b_max + gl.log2(b_sum), mask=i < count)


# Backward


@gluon.jit
def _query_step(b_q, b_do, b_dq, s_k, s_v, b_lse, b_delta, done, rest, scale, MASKED: gl.constexpr):
    N: gl.constexpr = s_k[0].shape[0]
    PANELS: gl.constexpr = len(s_k)
    b_s = begin_scores(b_q, s_k, N)
    b_dp = begin_scores(b_do, s_v, N)
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_x = b_s * scale - gl.convert_layout(b_lse, rows_of(N))[:, None]
    if MASKED:
        b_x = gl.where(gl.arange(0, N, layout=columns_of(N))[None, :] < rest, b_x, float("-inf"))
    b_p = gl.exp2(b_x)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    b_dq = finish_sums(begin_sums(b_p * (b_dp - gl.convert_layout(b_delta, rows_of(N))[:, None]), s_k, b_dq))
    mbarrier.arrive(done, count=1)
    return b_dq


@gluon.jit
def _panel_row_sums(a, b):
    LAYOUT: gl.constexpr = mma(a.shape[1])
    return gl.convert_layout(gl.sum(a.load(LAYOUT).to(gl.float32) * b.load(LAYOUT).to(gl.float32), 1), rows_of(64))


@gluon.jit
def _row_sums(a, b):
    """rowsum(a · b) over all panels in shared memory."""
    b_sum = _panel_row_sums(a[0], b[0])
    for w in gl.static_range(1, len(a)):
        b_sum = b_sum + _panel_row_sums(a[w], b[w])
    return b_sum


@gluon.jit
def _differentiate_queries(
    tensors, place, read_all, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    OPTION: gl.constexpr,
):  # fmt: skip
    """dQ and rowsum(dO · out) of 64 queries."""
    p_lse, p_delta, p_dqkv, s_q, s_do, s_out, s_k, s_v = tensors
    i_row, count, o_row, o_sum, column, width = rows
    b_q = read(box(s_q, place), left())
    b_do = read(box(s_do, place), left())
    b_delta = _row_sums(box(s_do, place), box(s_out, place))
    mbarrier.arrive(read_all, count=1)
    i = i_row + gl.arange(0, 64, layout=rows_of(64))
    gl.store(p_delta + o_sum + i, b_delta, mask=i < count)
    b_lse = gl.load(p_lse + o_sum + i, mask=i < count, other=float("inf"))
    slot = start % STAGES
    mbarrier.wait(full.index(slot), start // STAGES & 1)
    b_dq = _query_step(
        b_q, b_do, accumulators(box(s_k, slot), 64), _top(box(s_k, slot), TAIL), _top(box(s_v, slot), TAIL), b_lse, b_delta,
        empty.index(slot), count - (end - start - 1) * BLOCK_N, scale, True,
    )  # fmt: skip
    for j in range(start + 1, end):
        slot = j % STAGES
        mbarrier.wait(full.index(slot), j // STAGES & 1)
        b_dq = _query_step(b_q, b_do, b_dq, box(s_k, slot), box(s_v, slot), b_lse, b_delta, empty.index(slot), 0, scale, False)
    store_rows(p_dqkv + o_row * (3 * width) + column, times(b_dq, scale * LN_2), i_row, 3 * width, count)


@gluon.jit
def _key_step(b_k, b_v, b_dk, b_dv, s_q, s_do, s_lse, s_delta, done, scale):
    N: gl.constexpr = s_q[0].shape[0]
    PANELS: gl.constexpr = len(s_q)
    b_s = begin_scores(b_k, s_q, N)
    b_dp = begin_scores(b_v, s_do, N)
    b_lse = s_lse.load(columns_of(N))
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - b_lse[None, :])
    b_dv = begin_sums(b_p, s_do, b_dv)
    b_dp = warpgroup_mma_wait(PANELS, deps=(b_dp,))
    b_dk = begin_sums(b_p * (b_dp - s_delta.load(columns_of(N))[None, :]), s_q, b_dk)
    b_dv = finish_sums(b_dv)
    b_dk = finish_sums(b_dk)
    mbarrier.arrive(done, count=1)
    return b_dk, b_dv


@gluon.jit
def _differentiate_keys(
    tensors, place, read_all, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys."""
    p_dqkv, s_k, s_v, s_q, s_do, s_lse, s_delta = tensors
    i_row, count, o_row, o_sum, column, width = rows
    if IN_REGISTERS:
        b_k = read(box(s_k, place), left())
        b_v = read(box(s_v, place), left())
    else:
        b_k = box(s_k, place)
        b_v = box(s_v, place)
    slot = start % STAGES
    mbarrier.wait(full.index(slot), start // STAGES & 1)
    b_dk, b_dv = _key_step(
        b_k, b_v, accumulators(box(s_k, place), 64), accumulators(box(s_v, place), 64), _top(box(s_q, slot), TAIL), _top(box(s_do, slot), TAIL),
        s_lse.index(slot).slice(0, TAIL), s_delta.index(slot).slice(0, TAIL), empty.index(slot), scale,
    )  # fmt: skip
    for j in range(start + 1, end):
        slot = j % STAGES
        mbarrier.wait(full.index(slot), j // STAGES & 1)
        b_dk, b_dv = _key_step(
            b_k, b_v, b_dk, b_dv, box(s_q, slot), box(s_do, slot), s_lse.index(slot), s_delta.index(slot), empty.index(slot), scale
        )  # fmt: skip
    mbarrier.arrive(read_all, count=1)
    p_head = p_dqkv + o_row * (3 * width) + width + column
    store_rows(p_head, times(b_dk, scale * LN_2), i_row, 3 * width, count)
    store_rows(p_head + width, b_dv, i_row, 3 * width, count)


# Kernels


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def _run(
    work, tensors, stay, stream, sums, sizes, GIVES: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    PLACES: gl.constexpr = 2 if GIVES == KEYS else 1
    own_full = _barriers(WARPGROUPS * PLACES, 1)
    own_empty = _barriers(WARPGROUPS * PLACES, 1)
    full = _barriers(STAGES, 2 if GIVES == KEYS else 1)
    empty = _barriers(STAGES, WARPGROUPS)
    bars = (own_full, own_empty, full, empty, _barriers(1, 1).index(0))
    fence_async_shared()
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 2, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (stay, stream, sums, bars, sizes, GIVES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (stay, stream, sums, bars, sizes, GIVES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [232, 40])  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_fwd_kernel(
    d_rows, d_rows_rest, d_stream, d_stream_rest, p_out, p_lse, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    TAIL: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    d_q = panels_of(d_rows, d_rows_rest)
    d_kv = panels_of(d_stream, d_stream_rest)
    s_q = allocate(d_q, WARPGROUPS)
    s_k = allocate(d_kv, STAGES)
    s_v = allocate(d_kv, STAGES)
    _run(
        _attend, (p_out, p_lse, s_q, s_k, s_v), ((d_q,), (s_q,)), ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse),
        (p_cu_tokens, tokens, heads, groups, tiles, scale), FORWARD, VARLEN, HEAD_DIM, WARPGROUPS, BLOCK_N, STAGES, TAIL, AHEAD,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_queries(
    d_rows, d_rows_rest, d_grad, d_grad_rest, d_out, d_out_rest, d_stream, d_stream_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    d_q = panels_of(d_rows, d_rows_rest)
    d_do = panels_of(d_grad, d_grad_rest)
    d_o = panels_of(d_out, d_out_rest)
    d_kv = panels_of(d_stream, d_stream_rest)
    s_q = allocate(d_q, WARPGROUPS)
    s_do = allocate(d_do, WARPGROUPS)
    s_out = allocate(d_o, WARPGROUPS)
    s_k = allocate(d_kv, STAGES)
    s_v = allocate(d_kv, STAGES)
    _run(
        _differentiate_queries, (p_lse, p_delta, p_dqkv, s_q, s_do, s_out, s_k, s_v), ((d_q, d_do, d_o), (s_q, s_do, s_out)),
        ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse), (p_cu_tokens, tokens, heads, groups, tiles, scale), QUERIES, VARLEN, HEAD_DIM,
        WARPGROUPS, BLOCK_N, STAGES, TAIL, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_keys(
    d_rows, d_rows_rest, d_stream, d_stream_rest, d_grad, d_grad_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    d_kv = panels_of(d_rows, d_rows_rest)
    d_q = panels_of(d_stream, d_stream_rest)
    d_do = panels_of(d_grad, d_grad_rest)
    s_k = allocate(d_kv, WARPGROUPS * 2)
    s_v = allocate(d_kv, WARPGROUPS * 2)
    s_q = allocate(d_q, STAGES)
    s_do = allocate(d_do, STAGES)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], line_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], line_shared())
    _run(
        _differentiate_keys, (p_dqkv, s_k, s_v, s_q, s_do, s_lse, s_delta), ((d_kv, d_kv), (s_k, s_v)), ((d_q, d_do), (s_q, s_do)),
        (p_lse, p_delta, s_lse, s_delta), (p_cu_tokens, tokens, heads, groups, tiles, scale), KEYS, VARLEN, HEAD_DIM,
        WARPGROUPS, BLOCK_N, STAGES, TAIL, IN_REGISTERS,
    )  # fmt: skip


def forward(qkv: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """As the portable kernels' of that name."""
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads, head_dim)
    lse = qkv.new_empty((heads, tokens) if cu_tokens is not None else (len(qkv), heads, tokens), dtype=torch.float32)
    if out.numel():
        (qkv,) = _examples(cu_tokens, qkv)
        tensors = (*descriptors(qkv, head_dim, 64), *descriptors(qkv, head_dim, tile.blocks["BLOCK_N"]), out, lse)
        _launch(attention_long_fwd_kernel, tensors, qkv, cu_tokens, max_tokens, tile.blocks)
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(the packed gradient, as `qkv` but contiguous; no sums)."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        qkv, grad, out = _examples(cu_tokens, qkv, grad, out)
        delta = torch.empty_like(lse)
        d_qkv, d_grad, d_out = (descriptors(x, qkv.shape[-1], 64) for x in (qkv, grad, out))
        queries, keys = blocks_of(tile)
        tensors = (*d_qkv, *d_grad, *d_out, *descriptors(qkv, qkv.shape[-1], queries["BLOCK_N"]), lse, delta, dqkv)
        _launch(attention_long_bwd_kernel_queries, tensors, qkv, cu_tokens, max_tokens, queries)
        d_stream = (d for x in (qkv, grad) for d in descriptors(x, qkv.shape[-1], keys["BLOCK_N"]))
        _launch(attention_long_bwd_kernel_keys, (*d_qkv, *d_stream, lse, delta, dqkv), qkv, cu_tokens, max_tokens, keys)
    return dqkv, lse.new_empty(0)


def blocks_of(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of both kernels of the backward: the second one's have the prefix `KEYS_` in the row."""
    keys = {name.removeprefix("KEYS_"): size for name, size in tile.blocks.items() if name.startswith("KEYS_")}
    return {name: size for name, size in tile.blocks.items() if not name.startswith("KEYS_")}, keys


def _examples(cu_tokens: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Packed tensors `[batch, tokens, ...]`: sequences one after the other are one example."""
    return [packed(x if cu_tokens is None else x[None]) for x in tensors]


def _launch(kernel: Callable, tensors: tuple, qkv: Tensor, cu_tokens: Tensor | None, max_tokens: int, blocks: Mapping[str, int]) -> None:
    batch, tokens, _, heads, head_dim = qkv.shape
    sequences, longest = (batch, tokens) if cu_tokens is None else (len(cu_tokens) - 1, max_tokens)
    groups = triton.cdiv(longest, 64 * blocks["WARPGROUPS"])
    tiles = sequences * heads * groups
    kernel[(min(tiles, _processors(qkv.device)),)](
        *tensors, cu_tokens, tokens, heads, groups, tiles, scale_of(head_dim), VARLEN=cu_tokens is not None, HEAD_DIM=head_dim,
        TAIL=_tail(tokens, blocks["BLOCK_N"]) if cu_tokens is None else blocks["BLOCK_N"], **blocks, **_options(blocks),
    )  # fmt: skip


def _tail(tokens: int, block: int) -> int:
    """How many rows of the last block are multiplied: those that there are, up to a power of two."""
    return max(16, triton.next_power_of_2((tokens - 1) % block + 1))


def _options(blocks: Mapping[str, int]) -> dict[str, int]:
    """Registers of a thread at the launch, when consumers and the producer have equally many."""
    return {"num_warps": 4, "maxnreg": 128 if blocks["WARPGROUPS"] == 3 else 168}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
