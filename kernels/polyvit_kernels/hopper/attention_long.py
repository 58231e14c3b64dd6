# A launch is not the call that its signature says, to a type checker; Gluon's functions are not what they say either.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Attention of any number of tokens on Hopper, of equal sequences or of sequences packed one after the other.

One program a processor, which takes one tile after the other: a few blocks of 64 rows of a head that stay, one for each of WARPGROUPS
consumers, while the head's other rows stream past them through a ring in shared memory, filled by TMA from a warp of its own. What stays
and what streams:

- forward: queries; keys and values (online softmax)
- dQ: queries, dO and out; keys and values. It also leaves rowsum(dO * out) for the other one
- dK and dV: keys and values; queries and dO, with their log-sums. Scores are transposed: their rows are keys

Together the backward computes scores and dP twice, seven products instead of five, but P and dS never leave registers, and nothing is added
by several programs: no atomics, runs repeat bit for bit. The last block of what streams comes first: it alone is masked, and where it is
the only one, the loop over the others does nothing.

- VARLEN: sequences are packed; of the rows that stream, the producer zeroes those beyond a sequence's end, which are another one's
- BLOCK_N: rows that stream at a time; TAIL: of the last block, so many are multiplied
- STAGES: places in the ring
- REGISTERS: of a consumer's thread
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.attention_short import scale_of
from polyvit_kernels.tiles import Tile

LN_2 = gl.constexpr(0.6931471805599453)
QUERIES, KEYS = gl.constexpr(0), gl.constexpr(1)  # what stays


@gluon.constexpr_function
def mma(n):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def left():
    return gl.DotOperandLayout(operand_index=0, parent=mma(64), k_width=2)


@gluon.constexpr_function
def rows_of(n):
    return gl.SliceLayout(1, mma(n))


@gluon.constexpr_function
def columns_of(n):
    return gl.SliceLayout(0, mma(n))


@gluon.constexpr_function
def store_layout():
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )


@gluon.jit
def _store_block(p, b_x, i_row, stride, count, HEAD_DIM: gl.constexpr):
    LAYOUT: gl.constexpr = store_layout()
    b_y = gl.convert_layout(b_x.to(p.dtype.element_ty), LAYOUT)
    i = i_row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(p + i[:, None] * stride + c[None, :], b_y, mask=i[:, None] < count)


@gluon.jit
def _box(x_s, slot):
    return x_s.index(slot).reshape([x_s.shape[2], x_s.shape[3]])


# Where a program is


@gluon.jit
def _sequence(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr):
    """(sequence, its first row, number of its rows, head, group of blocks, number of the sequence's groups)"""
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
def _first_row(i_sequence, i_first, tokens, VARLEN: gl.constexpr):
    if VARLEN:
        return i_first.to(gl.int64)
    return i_sequence.to(gl.int64) * tokens


@gluon.jit
def _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN: gl.constexpr):
    """Offset of a sequence's first log-sum in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(gl.int64) * tokens + i_first
    return (i_sequence.to(gl.int64) * heads + i_head) * tokens


# What streams


@gluon.jit
def _zero_beyond(x_s, rest):
    """Zero the rows from `rest` on, by one warp, eight rows at a time."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for i in gl.static_range(x_s.shape[0] // 8):
        if rest < i * 8 + 8:
            part_s = x_s.slice(i * 8, 8)
            b_x = part_s.load(LAYOUT)
            r = i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            part_s.store(gl.where(r[:, None] < rest, b_x, gl.zeros_like(b_x)))


@gluon.jit
def _produce(shared, STAYS: gl.constexpr, SLOTS: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Fill the slots of the consumers and the ring, tile after tile, as they become free."""
    d_stay, d_stream, stay_s, stream_s, p_lse, p_delta, l_s, d_s, own_full, own_empty, full, empty, landed, p_cu_tokens, tokens, heads, groups, tiles = shared
    LINE: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    BYTES: gl.constexpr = HEAD_DIM * 2
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _sequence(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            i_batch = 0 if VARLEN else i_sequence
            width = heads * HEAD_DIM
            c_q = i_head * HEAD_DIM
            for w in gl.static_range(WARPGROUPS):
                slot = w * SLOTS + turn % SLOTS
                i_row = i_first + (i_group + w * used) * 64
                mbarrier.wait(own_empty.index(slot), (turn // SLOTS & 1) ^ 1)
                bar = own_full.index(slot)
                mbarrier.expect(bar, len(d_stay) * 64 * BYTES)
                for x in gl.static_range(len(d_stay)):
                    if STAYS == KEYS:
                        c = c_q + (x + 1) * width
                    else:
                        c = c_q
                    tma.async_copy_global_to_shared(d_stay[x], [i_batch, i_row, c], bar, stay_s[x].index(slot))
            steps = (count + BLOCK_N - 1) // BLOCK_N
            if STAYS == KEYS:
                o_sum = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                c_0 = c_q
                c_1 = c_q
            else:
                c_0 = c_q + width
                c_1 = c_q + 2 * width
            for j in range(steps):
                slot = (step + j) % STAGES
                i_start = (steps - 1 if j == 0 else j - 1) * BLOCK_N
                if STAYS == KEYS:
                    i = i_start + gl.arange(0, BLOCK_N, layout=LINE)
                    # An infinite log-sum makes the probabilities of rows beyond the end zero.
                    b_l = gl.load(p_lse + o_sum + i, mask=i < count, other=float("inf"))
                    b_d = gl.load(p_delta + o_sum + i, mask=i < count, other=0.0)
                mbarrier.wait(empty.index(slot), ((step + j) // STAGES & 1) ^ 1)
                s_0 = stream_s[0].index(slot)
                s_1 = stream_s[1].index(slot)
                if STAYS == KEYS:
                    l_s.index(slot).store(b_l)
                    d_s.index(slot).store(b_d)
                bar = full.index(slot)
                if VARLEN:
                    if j == 0:
                        mbarrier.expect(landed, 2 * BLOCK_N * BYTES)
                        tma.async_copy_global_to_shared(d_stream[0], [i_batch, i_first + i_start, c_0], landed, s_0)
                        tma.async_copy_global_to_shared(d_stream[1], [i_batch, i_first + i_start, c_1], landed, s_1)
                        mbarrier.wait(landed, turn & 1)
                        _zero_beyond(_box(stream_s[0], slot), count - i_start)
                        _zero_beyond(_box(stream_s[1], slot), count - i_start)
                        fence_async_shared()
                        mbarrier.arrive(bar, count=1)
                    else:
                        mbarrier.expect(bar, 2 * BLOCK_N * BYTES)
                        tma.async_copy_global_to_shared(d_stream[0], [i_batch, i_first + i_start, c_0], bar, s_0)
                        tma.async_copy_global_to_shared(d_stream[1], [i_batch, i_first + i_start, c_1], bar, s_1)
                else:
                    mbarrier.expect(bar, 2 * BLOCK_N * BYTES)
                    tma.async_copy_global_to_shared(d_stream[0], [i_batch, i_start, c_0], bar, s_0)
                    tma.async_copy_global_to_shared(d_stream[1], [i_batch, i_start, c_1], bar, s_1)
                if STAYS == KEYS:
                    # This arrival comes after the stores of all lanes, the one above need not.
                    mbarrier.arrive(bar, count=1)
            step += steps
            turn += 1


@gluon.jit
def _pass_by(full, empty, first, steps, STAGES: gl.constexpr):
    """What a consumer without rows does about what streams."""
    for j in range(first, first + steps):
        mbarrier.wait(full.index(j % STAGES), j // STAGES & 1)
        mbarrier.arrive(empty.index(j % STAGES), count=1)


# Forward


@gluon.jit
def _scores(b_q, k):
    """Begin the scores of 64 queries."""
    N: gl.constexpr = k.shape[0]
    return warpgroup_mma(b_q, k.permute((1, 0)), gl.zeros([64, N], gl.float32, mma(N)), use_acc=False, is_async=True)


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale):
    """(exponentials, new maximum, new sum, what the older ones are multiplied by): arXiv 2205.14135, algorithm 1."""
    N: gl.constexpr = b_s.shape[1]
    b_new = gl.maximum(b_max, gl.convert_layout(gl.max(b_s, 1), rows_of(64)) * scale)
    b_p = gl.exp2(b_s * scale - gl.convert_layout(b_new, rows_of(N))[:, None])
    b_alpha = gl.exp2(b_max - b_new)
    return b_p, b_new, b_sum * b_alpha + gl.convert_layout(gl.sum(b_p, 1), rows_of(64)), b_alpha


@gluon.jit
def _absorb_last(b_q, k, v, ready, scale, rest):
    """(output, maximum, sum) of the last keys, the first to be seen."""
    N: gl.constexpr = k.shape[0]
    HEAD_DIM: gl.constexpr = v.shape[1]
    b_s = warpgroup_mma_wait(0, deps=(_scores(b_q, k),))
    i = gl.arange(0, N, layout=columns_of(N))
    b_s = gl.where(i[None, :] < rest, b_s, float("-inf"))
    b_max = gl.max(b_s, 1) * scale
    b_p = gl.exp2(b_s * scale - b_max[:, None])
    b_sum = gl.convert_layout(gl.sum(b_p, 1), rows_of(64))
    b_zero = gl.zeros([64, HEAD_DIM], gl.float32, mma(HEAD_DIM))
    b_out = warpgroup_mma(gl.convert_layout(b_p.to(v.dtype), left()), v, b_zero, use_acc=False, is_async=True)
    b_out = warpgroup_mma_wait(0, deps=(b_out,))
    mbarrier.arrive(ready, count=1)
    return b_out, gl.convert_layout(b_max, rows_of(64)), b_sum


@gluon.jit
def _absorb(b_q, k, v, b_out, b_max, b_sum, ready, scale):
    """One block of keys more in output, maximum and sum."""
    b_s = warpgroup_mma_wait(0, deps=(_scores(b_q, k),))
    b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
    b_out = b_out * b_alpha[:, None]
    b_out = warpgroup_mma(gl.convert_layout(b_p.to(v.dtype), left()), v, b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, deps=(b_out,))
    mbarrier.arrive(ready, count=1)
    return b_out, b_max, b_sum


@gluon.jit
def _attend(shared, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, AHEAD: gl.constexpr):
    """The output of 64 queries of every tile."""
    p_out, p_lse, p_cu_tokens, q_s, k_s, v_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale = shared
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _sequence(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            steps = (count + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            mbarrier.wait(own_full.index(WARPGROUP), turn & 1)
            b_q = _box(q_s, WARPGROUP).load(left())
            mbarrier.arrive(own_empty.index(WARPGROUP), count=1)
            if i_row < count:
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                b_out, b_max, b_sum = _absorb_last(
                    b_q, _box(k_s, slot).slice(0, TAIL), _box(v_s, slot).slice(0, TAIL), empty.index(slot), scale, count - (steps - 1) * BLOCK_N
                )  # fmt: skip
                if AHEAD:
                    if steps > 1:
                        slot = (step + 1) % STAGES
                        mbarrier.wait(full.index(slot), (step + 1) // STAGES & 1)
                        b_s = warpgroup_mma_wait(0, deps=(_scores(b_q, _box(k_s, slot)),))
                        b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
                        b_out = b_out * b_alpha[:, None]
                        b_a = gl.convert_layout(b_p.to(q_s.dtype), left())
                        for j in range(step + 2, step + steps):
                            before = (j - 1) % STAGES
                            slot = j % STAGES
                            mbarrier.wait(full.index(slot), j // STAGES & 1)
                            b_s = _scores(b_q, _box(k_s, slot))
                            b_out = warpgroup_mma(b_a, _box(v_s, before), b_out, is_async=True)
                            b_s = warpgroup_mma_wait(1, deps=(b_s,))
                            b_p, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, scale)
                            b_out = warpgroup_mma_wait(0, deps=(b_out,))
                            mbarrier.arrive(empty.index(before), count=1)
                            b_out = b_out * b_alpha[:, None]
                            b_a = gl.convert_layout(b_p.to(q_s.dtype), left())
                        before = (step + steps - 1) % STAGES
                        b_out = warpgroup_mma(b_a, _box(v_s, before), b_out, is_async=True)
                        b_out = warpgroup_mma_wait(0, deps=(b_out,))
                        mbarrier.arrive(empty.index(before), count=1)
                else:
                    for j in range(step + 1, step + steps):
                        slot = j % STAGES
                        mbarrier.wait(full.index(slot), j // STAGES & 1)
                        b_out, b_max, b_sum = _absorb(b_q, _box(k_s, slot), _box(v_s, slot), b_out, b_max, b_sum, empty.index(slot), scale)
                width = heads * HEAD_DIM
                p_head = p_out + _first_row(i_sequence, i_first, tokens, VARLEN) * width + i_head * HEAD_DIM
                _store_block(p_head, b_out * (1.0 / b_sum)[:, None], i_row, width, count, HEAD_DIM)
                i = i_row + gl.arange(0, 64, layout=rows_of(64))
                p_row = p_lse + _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                gl.store(p_row + i, b_max + gl.log2(b_sum), mask=i < count)
            else:
                _pass_by(full, empty, step, steps, STAGES)
            step += steps
            turn += 1


# dQ


@gluon.jit
def _d_queries_step(b_q, b_do, b_dq, k, v, b_l, b_d, ready, scale, rest, MASKED: gl.constexpr):
    N: gl.constexpr = k.shape[0]
    b_zero = gl.zeros([64, N], gl.float32, mma(N))
    b_s = warpgroup_mma(b_q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(b_do, v.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_x = b_s * scale - gl.convert_layout(b_l, rows_of(N))[:, None]
    if MASKED:
        i = gl.arange(0, N, layout=columns_of(N))
        b_x = gl.where(i[None, :] < rest, b_x, float("-inf"))
    b_p = gl.exp2(b_x)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    b_ds = b_p * (b_dp - gl.convert_layout(b_d, rows_of(N))[:, None])
    b_dq = warpgroup_mma(gl.convert_layout(b_ds.to(k.dtype), left()), k, b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    mbarrier.arrive(ready, count=1)
    return b_dq


@gluon.jit
def _d_queries(shared, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr):
    """dQ of 64 queries of every tile."""
    p_lse, p_delta, p_dqkv, p_cu_tokens, q_s, do_s, o_s, k_s, v_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale = shared
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _sequence(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            steps = (count + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            mbarrier.wait(own_full.index(WARPGROUP), turn & 1)
            b_q = _box(q_s, WARPGROUP).load(left())
            b_do = _box(do_s, WARPGROUP).load(left())
            b_d = gl.sum(_box(do_s, WARPGROUP).load(mma(64)).to(gl.float32) * _box(o_s, WARPGROUP).load(mma(64)).to(gl.float32), 1)
            mbarrier.arrive(own_empty.index(WARPGROUP), count=1)
            if i_row < count:
                o_sum = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                i = i_row + gl.arange(0, 64, layout=rows_of(64))
                gl.store(p_delta + o_sum + i, b_d, mask=i < count)
                b_l = gl.load(p_lse + o_sum + i, mask=i < count, other=float("inf"))
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                b_dq = _d_queries_step(
                    b_q, b_do, gl.zeros([64, HEAD_DIM], gl.float32, mma(HEAD_DIM)), _box(k_s, slot).slice(0, TAIL), _box(v_s, slot).slice(0, TAIL),
                    b_l, b_d, empty.index(slot), scale, count - (steps - 1) * BLOCK_N, True,
                )  # fmt: skip
                for j in range(step + 1, step + steps):
                    slot = j % STAGES
                    mbarrier.wait(full.index(slot), j // STAGES & 1)
                    b_dq = _d_queries_step(b_q, b_do, b_dq, _box(k_s, slot), _box(v_s, slot), b_l, b_d, empty.index(slot), scale, 0, False)
                stride = 3 * heads * HEAD_DIM
                p_head = p_dqkv + _first_row(i_sequence, i_first, tokens, VARLEN) * stride + i_head * HEAD_DIM
                _store_block(p_head, b_dq * (scale * LN_2), i_row, stride, count, HEAD_DIM)
            else:
                _pass_by(full, empty, step, steps, STAGES)
            step += steps
            turn += 1


# dK and dV


@gluon.jit
def _d_keys_step(k, v, b_dk, b_dv, q, do, l_s, d_s, ready, scale):
    """Scores are transposed: their rows are keys."""
    N: gl.constexpr = q.shape[0]
    b_zero = gl.zeros([64, N], gl.float32, mma(N))
    b_s = warpgroup_mma(k, q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(v, do.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_l = l_s.load(columns_of(N))
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - b_l[None, :])
    b_dv = warpgroup_mma(gl.convert_layout(b_p.to(q.dtype), left()), do, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
    b_ds = b_p * (b_dp - d_s.load(columns_of(N))[None, :])
    b_dk = warpgroup_mma(gl.convert_layout(b_ds.to(q.dtype), left()), q, b_dk, is_async=True)
    b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))
    mbarrier.arrive(ready, count=1)
    return b_dk, b_dv


@gluon.jit
def _d_keys(shared, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """dK and dV of 64 keys of every tile."""
    p_dqkv, p_cu_tokens, k_s, v_s, q_s, do_s, l_s, d_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale = shared
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _sequence(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            steps = (count + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            own = WARPGROUP * 2 + turn % 2
            mbarrier.wait(own_full.index(own), turn // 2 & 1)
            if i_row < count:
                if IN_REGISTERS:
                    k = _box(k_s, own).load(left())
                    v = _box(v_s, own).load(left())
                else:
                    k = _box(k_s, own)
                    v = _box(v_s, own)
                b_zero = gl.zeros([64, HEAD_DIM], gl.float32, mma(HEAD_DIM))
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                b_dk, b_dv = _d_keys_step(
                    k, v, b_zero, b_zero, _box(q_s, slot).slice(0, TAIL), _box(do_s, slot).slice(0, TAIL),
                    l_s.index(slot).slice(0, TAIL), d_s.index(slot).slice(0, TAIL), empty.index(slot), scale,
                )  # fmt: skip
                for j in range(step + 1, step + steps):
                    slot = j % STAGES
                    mbarrier.wait(full.index(slot), j // STAGES & 1)
                    b_dk, b_dv = _d_keys_step(
                        k, v, b_dk, b_dv, _box(q_s, slot), _box(do_s, slot), l_s.index(slot), d_s.index(slot), empty.index(slot), scale
                    )  # fmt: skip
                mbarrier.arrive(own_empty.index(own), count=1)
                width = heads * HEAD_DIM
                p_head = p_dqkv + _first_row(i_sequence, i_first, tokens, VARLEN) * (3 * width) + width + i_head * HEAD_DIM
                _store_block(p_head, b_dk * (scale * LN_2), i_row, 3 * width, count, HEAD_DIM)
                _store_block(p_head + width, b_dv, i_row, 3 * width, count, HEAD_DIM)
            else:
                mbarrier.arrive(own_empty.index(own), count=1)
                _pass_by(full, empty, step, steps, STAGES)
            step += steps
            turn += 1


# Kernels


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(do_not_specialize=["tokens", "heads", "groups", "tiles"])
def attention_long_fwd_kernel(
    d_qkv, d_stream, p_out, p_lse, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, REGISTERS: gl.constexpr, AHEAD: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS, 1, 64, HEAD_DIM], d_qkv.layout)
    k_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    v_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    own_full = _barriers(WARPGROUPS, 1)
    own_empty = _barriers(WARPGROUPS, 1)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, WARPGROUPS)
    landed = _barriers(1, 1).index(0)
    fence_async_shared()
    shared = (p_out, p_lse, p_cu_tokens, q_s, k_s, v_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale)
    given = (
        (d_qkv,), (d_stream, d_stream), (q_s,), (k_s, v_s), p_lse, p_lse, q_s, q_s, own_full, own_empty, full, empty, landed, p_cu_tokens,
        tokens, heads, groups, tiles,
    )  # fmt: skip
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_attend, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, AHEAD)),
            (_attend, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, AHEAD)),
            (_attend, (shared, 2, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, AHEAD)),
            (_produce, (given, QUERIES, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, AHEAD)),
            (_attend, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, AHEAD)),
            (_produce, (given, QUERIES, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "heads", "groups", "tiles"])
def attention_long_bwd_queries_kernel(
    d_qkv, d_do, d_out, d_stream, p_lse, p_delta, p_dqkv, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, REGISTERS: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS, 1, 64, HEAD_DIM], d_qkv.layout)
    do_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS, 1, 64, HEAD_DIM], d_qkv.layout)
    o_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS, 1, 64, HEAD_DIM], d_qkv.layout)
    k_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    v_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    own_full = _barriers(WARPGROUPS, 1)
    own_empty = _barriers(WARPGROUPS, 1)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, WARPGROUPS)
    landed = _barriers(1, 1).index(0)
    fence_async_shared()
    shared = (
        p_lse, p_delta, p_dqkv, p_cu_tokens, q_s, do_s, o_s, k_s, v_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale
    )  # fmt: skip
    given = (
        (d_qkv, d_do, d_out), (d_stream, d_stream), (q_s, do_s, o_s), (k_s, v_s), p_lse, p_lse, q_s, q_s, own_full, own_empty, full, empty, landed, p_cu_tokens,
        tokens, heads, groups, tiles,
    )  # fmt: skip
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_d_queries, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL)),
            (_d_queries, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL)),
            (_d_queries, (shared, 2, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL)),
            (_produce, (given, QUERIES, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_d_queries, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL)),
            (_d_queries, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL)),
            (_produce, (given, QUERIES, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "heads", "groups", "tiles"])
def attention_long_bwd_keys_kernel(
    d_qkv, d_stream, d_do, p_lse, p_delta, p_dqkv, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, REGISTERS: gl.constexpr, IN_REGISTERS: gl.constexpr,
):
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS * 2, 1, 64, HEAD_DIM], d_qkv.layout)
    v_s = gl.allocate_shared_memory(d_qkv.dtype, [WARPGROUPS * 2, 1, 64, HEAD_DIM], d_qkv.layout)
    q_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    do_s = gl.allocate_shared_memory(d_qkv.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], d_qkv.layout)
    l_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], LINE)
    d_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], LINE)
    own_full = _barriers(WARPGROUPS * 2, 1)
    own_empty = _barriers(WARPGROUPS * 2, 1)
    full = _barriers(STAGES, 2)
    empty = _barriers(STAGES, WARPGROUPS)
    landed = _barriers(1, 1).index(0)
    fence_async_shared()
    shared = (p_dqkv, p_cu_tokens, k_s, v_s, q_s, do_s, l_s, d_s, own_full, own_empty, full, empty, tokens, heads, groups, tiles, scale)
    given = (
        (d_qkv, d_qkv), (d_stream, d_do), (k_s, v_s), (q_s, do_s), p_lse, p_delta, l_s, d_s, own_full, own_empty, full, empty, landed, p_cu_tokens,
        tokens, heads, groups, tiles,
    )  # fmt: skip
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_d_keys, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, IN_REGISTERS)),
            (_d_keys, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, IN_REGISTERS)),
            (_d_keys, (shared, 2, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, IN_REGISTERS)),
            (_produce, (given, KEYS, 2, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_d_keys, (shared, 0, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, IN_REGISTERS)),
            (_d_keys, (shared, 1, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, IN_REGISTERS)),
            (_produce, (given, KEYS, 2, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip


def forward(qkv: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """(out, log2 of the softmax's sum in fp32): `[batch, tokens, heads, head_dim]` and `[batch, heads, tokens]`.

    With `cu_tokens`, int32 `[sequences + 1]`: `[total, heads, head_dim]` and `[heads, total]`, no sequence being longer than
    `max_tokens`.
    """
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads, head_dim)
    lse = qkv.new_empty((heads, tokens) if cu_tokens is not None else (len(qkv), heads, tokens), dtype=torch.float32)
    if out.numel():
        qkv, block = _packed(qkv), tile.blocks["BLOCK_N"]
        d_rows, d_stream = _descriptor(qkv, 64, cu_tokens is not None), _descriptor(qkv, block, cu_tokens is not None)
        _launch(attention_long_fwd_kernel, (d_rows, d_stream, out, lse), qkv, cu_tokens, max_tokens, tile.blocks)
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(the packed gradient, as `qkv` but contiguous; nothing). out is contiguous."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        qkv, grad, delta = _packed(qkv), _packed(grad), torch.empty_like(lse)
        d_qkv, d_do, d_out = (_descriptor(x, 64, cu_tokens is not None) for x in (qkv, grad, out))
        queries = {name: size for name, size in tile.blocks.items() if not name.startswith("KEYS_")}
        keys = {name.removeprefix("KEYS_"): size for name, size in tile.blocks.items() if name.startswith("KEYS_")}
        _launch(attention_long_bwd_queries_kernel, (d_qkv, d_do, d_out, d_qkv, lse, delta, dqkv), qkv, cu_tokens, max_tokens, queries)
        _launch(attention_long_bwd_keys_kernel, (d_qkv, d_qkv, d_do, lse, delta, dqkv), qkv, cu_tokens, max_tokens, keys)
    return dqkv, lse.new_empty(0)


def _launch(kernel, tensors: tuple, qkv: Tensor, cu_tokens: Tensor | None, max_tokens: int, blocks) -> None:
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    varlen = cu_tokens is not None
    sequences, longest = (len(cu_tokens) - 1, max_tokens) if cu_tokens is not None else (len(qkv), tokens)
    groups = triton.cdiv(longest, 64 * blocks["WARPGROUPS"])
    tiles = sequences * heads * groups
    threads = 128 * (blocks["WARPGROUPS"] + 1)
    kernel[(min(tiles, _processors(qkv.device)),)](
        *tensors, cu_tokens, tokens, heads, groups, tiles, scale_of(head_dim),
        VARLEN=varlen, HEAD_DIM=head_dim, TAIL=blocks["BLOCK_N"] if varlen else _tail(tokens, blocks["BLOCK_N"]),
        **blocks, num_warps=4, maxnreg=65536 // threads // 8 * 8,
    )  # fmt: skip


def _tail(tokens: int, block: int) -> int:
    """How many rows of the last block are multiplied: those that there are, and up to a power of two."""
    rest = (tokens - 1) % block + 1
    return max(16, triton.next_power_of_2(rest))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _packed(x: Tensor) -> Tensor:
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int, varlen: bool) -> TensorDescriptor:
    """For blocks of rows of a head: `[batch, tokens, parts * heads * head_dim]`, or one batch of all packed sequences."""
    head_dim = x.shape[-1]
    flat = x.reshape(*((1, len(x)) if varlen else x.shape[:2]), -1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * head_dim), element_bitwidth=16, rank=3)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, rows, head_dim], layout)
