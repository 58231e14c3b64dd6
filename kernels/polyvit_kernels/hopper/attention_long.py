# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Attention of any number of tokens on Hopper, of equal sequences or of varlen ones, one after the other.

The consumers of `pipeline` do the products, on blocks of 64 rows. Resident and streamed rows are:

- forward: queries; keys and values, with an online softmax (FlashAttention, arXiv 2205.14135)
- dQ: queries, dO and O; keys and values. rowsum(dO · O), which the other kernel needs too, comes from here
- dK and dV: keys and values; queries and dO. Scores are transposed: a row is a key

The backward computes scores and dP twice, seven products instead of five, but P and dS never leave registers, and no two programs add to
one element: no atomics, runs repeat bit for bit.

- HEAD_DIM: a head's width, in one or two panels (`layouts`); `d_…_rest` describe the second one
- VARLEN, WARPGROUPS, BLOCK_N, STAGES, TAIL: as in `pipeline`
- IN_REGISTERS: keys and values are loaded from shared memory once (dK and dV)
- scale: log2(e) / √head_dim, as all exponentials are powers of two
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

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
    vector_shared,
)
from polyvit_kernels.hopper.pipeline import KEYS, QUERIES, run
from polyvit_kernels.tiles import Tile, Variant, num_sms
from polyvit_kernels.triton_kernels.attention_short import scale_of

_INTEGERS = ["tokens", "heads", "groups", "tiles"]


@gluon.jit
def _online_softmax_update(b_s, b_max, b_sum, scale):
    """(P, the new maximum, the new sum, the factor of what was summed with the old maximum)"""
    N: gl.constexpr = b_s.shape[1]
    # [64]
    b_new_max = gl.maximum(b_max, gl.convert_layout(gl.max(b_s, 1), mma_rows(64)) * scale)
    # [64, N]
    b_p = gl.exp2(b_s * scale - gl.convert_layout(b_new_max, mma_rows(N))[:, None])
    # [64]
    b_alpha = gl.exp2(b_max - b_new_max)
    return b_p, b_new_max, b_sum * b_alpha + gl.convert_layout(gl.sum(b_p, 1), mma_rows(64)), b_alpha


@gluon.jit
def _attend_last_keys(b_q, s_k, s_v, done, keys, scale):
    """(output, maximum, sum) with the last block of keys, of which `keys` exist. It comes first, so there is nothing to rescale."""
    N: gl.constexpr = s_k[0].shape[0]
    # [64, N]
    b_s = warpgroup_mma_wait(0, deps=(panels.mma_scores(b_q, s_k, N),))
    b_s = gl.where(gl.arange(0, N, layout=mma_columns(N))[None, :] < keys, b_s, float("-inf"))
    # [64]
    b_max = gl.max(b_s, 1) * scale
    # [64, N]
    b_p = gl.exp2(b_s * scale - b_max[:, None])
    # [64, width] a panel
    b_out = panels.mma_wait(panels.mma_accumulate(b_p, s_v, panels.accumulators(s_v, 64)))
    mbarrier.arrive(done, count=1)
    return b_out, gl.convert_layout(b_max, mma_rows(64)), gl.convert_layout(gl.sum(b_p, 1), mma_rows(64))


@gluon.jit
def _attend(
    tensors, i_buffer, released, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    OPTION: gl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of 64 queries."""
    p_out, p_lse, s_q, s_k, s_v = tensors
    i_row, length, o_row, o_lse, column, width = rows
    # [64, width] a panel; in registers, so the buffer is free for the next tile at once
    b_q = panels.load_shared(panels.stage(s_q, i_buffer), operand_a())
    mbarrier.arrive(released, count=1)
    i_stage = start % STAGES
    mbarrier.wait(full.index(i_stage), start // STAGES & 1)
    # [TAIL, width] a panel
    s_last_k = panels.first_rows(panels.stage(s_k, i_stage), TAIL)
    s_last_v = panels.first_rows(panels.stage(s_v, i_stage), TAIL)
    # [64, width] a panel, [64], [64]
    b_out, b_max, b_sum = _attend_last_keys(b_q, s_last_k, s_last_v, empty.index(i_stage), length - (end - start - 1) * BLOCK_N, scale)
    for j in range(start + 1, end):
        i_stage = j % STAGES
        mbarrier.wait(full.index(i_stage), j // STAGES & 1)
        # [64, BLOCK_N]
        b_s = warpgroup_mma_wait(0, deps=(panels.mma_scores(b_q, panels.stage(s_k, i_stage), BLOCK_N),))
        # [64, BLOCK_N], [64], [64], [64]
        b_p, b_max, b_sum, b_alpha = _online_softmax_update(b_s, b_max, b_sum, scale)
        # [64, width] a panel
        b_out = panels.mma_wait(panels.mma_accumulate(b_p, panels.stage(s_v, i_stage), panels.scale_rows(b_out, b_alpha)))
        mbarrier.arrive(empty.index(i_stage), count=1)
    panels.store_rows(p_out + o_row * width + column, panels.scale_rows(b_out, 1.0 / b_sum), i_row, width, length)
    # [64]
    i = i_row + gl.arange(0, 64, layout=mma_rows(64))
    gl.store(p_lse + o_lse + i, b_max + gl.log2(b_sum), mask=i < length)


@gluon.jit
def _accumulate_dq(b_q, b_do, b_dq, s_k, s_v, b_lse, b_delta, done, keys, scale, MASKED: gl.constexpr):
    """dQ with one more block of keys, of which `keys` exist if MASKED."""
    N: gl.constexpr = s_k[0].shape[0]
    PANELS: gl.constexpr = len(s_k)
    # [64, N]; both products are in flight, P is computed while the second one runs
    b_s = panels.mma_scores(b_q, s_k, N)
    b_dp = panels.mma_scores(b_do, s_v, N)
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_exponent = b_s * scale - gl.convert_layout(b_lse, mma_rows(N))[:, None]
    if MASKED:
        b_exponent = gl.where(gl.arange(0, N, layout=mma_columns(N))[None, :] < keys, b_exponent, float("-inf"))
    b_p = gl.exp2(b_exponent)
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    # [64, width] a panel
    b_dq = panels.mma_wait(panels.mma_accumulate(b_p * (b_dp - gl.convert_layout(b_delta, mma_rows(N))[:, None]), s_k, b_dq))
    mbarrier.arrive(done, count=1)
    return b_dq


@gluon.jit
def _panel_row_dots(s_a, s_b):
    LAYOUT: gl.constexpr = mma(s_a.shape[1])
    # [64]
    return gl.convert_layout(gl.sum(s_a.load(LAYOUT).to(gl.float32) * s_b.load(LAYOUT).to(gl.float32), 1), mma_rows(64))


@gluon.jit
def _row_dots(s_a, s_b):
    """rowsum(a · b) over all panels in shared memory."""
    # [64]
    b_sum = _panel_row_dots(s_a[0], s_b[0])
    for w in gl.static_range(1, len(s_a)):
        b_sum = b_sum + _panel_row_dots(s_a[w], s_b[w])
    return b_sum


@gluon.jit
def _compute_dq(
    tensors, i_buffer, released, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    OPTION: gl.constexpr,
):  # fmt: skip
    """dQ and rowsum(dO · O) of 64 queries."""
    p_lse, p_delta, p_dqkv, s_q, s_do, s_out, s_k, s_v = tensors
    i_row, length, o_row, o_lse, column, width = rows
    # [64, width] a panel
    b_q = panels.load_shared(panels.stage(s_q, i_buffer), operand_a())
    b_do = panels.load_shared(panels.stage(s_do, i_buffer), operand_a())
    # [64]
    b_delta = _row_dots(panels.stage(s_do, i_buffer), panels.stage(s_out, i_buffer))
    mbarrier.arrive(released, count=1)
    # [64]
    i = i_row + gl.arange(0, 64, layout=mma_rows(64))
    gl.store(p_delta + o_lse + i, b_delta, mask=i < length)
    b_lse = gl.load(p_lse + o_lse + i, mask=i < length, other=float("inf"))
    i_stage = start % STAGES
    mbarrier.wait(full.index(i_stage), start // STAGES & 1)
    # [TAIL, width] a panel
    s_last_k = panels.first_rows(panels.stage(s_k, i_stage), TAIL)
    s_last_v = panels.first_rows(panels.stage(s_v, i_stage), TAIL)
    # [64, width] a panel
    b_dq = panels.accumulators(panels.stage(s_k, i_stage), 64)
    last_keys = length - (end - start - 1) * BLOCK_N
    b_dq = _accumulate_dq(b_q, b_do, b_dq, s_last_k, s_last_v, b_lse, b_delta, empty.index(i_stage), last_keys, scale, True)
    for j in range(start + 1, end):
        i_stage = j % STAGES
        mbarrier.wait(full.index(i_stage), j // STAGES & 1)
        # [BLOCK_N, width] a panel
        s_block_k = panels.stage(s_k, i_stage)
        s_block_v = panels.stage(s_v, i_stage)
        b_dq = _accumulate_dq(b_q, b_do, b_dq, s_block_k, s_block_v, b_lse, b_delta, empty.index(i_stage), 0, scale, False)
    panels.store_rows(p_dqkv + o_row * (3 * width) + column, panels.scale(b_dq, scale * LN_2), i_row, 3 * width, length)


@gluon.jit
def _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_q, s_do, s_lse, s_delta, done, scale):
    """dK and dV with one more block of queries. Scores are transposed, so that P and dS are left operands as they come."""
    N: gl.constexpr = s_q[0].shape[0]
    PANELS: gl.constexpr = len(s_q)
    # [64, N]; both products are in flight, P is computed while the second one runs
    b_s = panels.mma_scores(b_k, s_q, N)
    b_dp = panels.mma_scores(b_v, s_do, N)
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - s_lse.load(mma_columns(N))[None, :])
    # [64, width] a panel
    b_dv = panels.mma_accumulate(b_p, s_do, b_dv)
    b_dp = warpgroup_mma_wait(PANELS, deps=(b_dp,))
    b_dk = panels.mma_accumulate(b_p * (b_dp - s_delta.load(mma_columns(N))[None, :]), s_q, b_dk)
    b_dv = panels.mma_wait(b_dv)
    b_dk = panels.mma_wait(b_dk)
    mbarrier.arrive(done, count=1)
    return b_dk, b_dv


@gluon.jit
def _compute_dkv(
    tensors, i_buffer, released, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys."""
    p_dqkv, s_k, s_v, s_q, s_do, s_lse, s_delta = tensors
    i_row, length, o_row, _o_lse, column, width = rows
    # [64, width] a panel
    if IN_REGISTERS:
        b_k = panels.load_shared(panels.stage(s_k, i_buffer), operand_a())
        b_v = panels.load_shared(panels.stage(s_v, i_buffer), operand_a())
    else:
        b_k = panels.stage(s_k, i_buffer)
        b_v = panels.stage(s_v, i_buffer)
    i_stage = start % STAGES
    mbarrier.wait(full.index(i_stage), start // STAGES & 1)
    # [64, width] a panel
    b_dk = panels.accumulators(panels.stage(s_k, i_buffer), 64)
    b_dv = panels.accumulators(panels.stage(s_v, i_buffer), 64)
    # [TAIL, width] a panel, [TAIL]
    s_last_q = panels.first_rows(panels.stage(s_q, i_stage), TAIL)
    s_last_do = panels.first_rows(panels.stage(s_do, i_stage), TAIL)
    s_last_lse = s_lse.index(i_stage).slice(0, TAIL)
    s_last_delta = s_delta.index(i_stage).slice(0, TAIL)
    # [64, width] a panel
    b_dk, b_dv = _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_last_q, s_last_do, s_last_lse, s_last_delta, empty.index(i_stage), scale)
    for j in range(start + 1, end):
        i_stage = j % STAGES
        mbarrier.wait(full.index(i_stage), j // STAGES & 1)
        # [BLOCK_N, width] a panel, [BLOCK_N]
        s_block_q, s_block_do = panels.stage(s_q, i_stage), panels.stage(s_do, i_stage)
        s_block_lse, s_block_delta = s_lse.index(i_stage), s_delta.index(i_stage)
        # [64, width] a panel
        b_dk, b_dv = _accumulate_dkv(b_k, b_v, b_dk, b_dv, s_block_q, s_block_do, s_block_lse, s_block_delta, empty.index(i_stage), scale)
    mbarrier.arrive(released, count=1)
    p_head = p_dqkv + o_row * (3 * width) + width + column
    panels.store_rows(p_head, panels.scale(b_dk, scale * LN_2), i_row, 3 * width, length)
    panels.store_rows(p_head + width, b_dv, i_row, 3 * width, length)


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_fwd_kernel(
    d_resident, d_resident_rest, d_streamed, d_streamed_rest, p_out, p_lse, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """O and its log-sum-exp."""
    d_q = panels.combine(d_resident, d_resident_rest)
    d_kv = panels.combine(d_streamed, d_streamed_rest)
    s_q = panels.allocate(d_q, WARPGROUPS)
    s_k = panels.allocate(d_kv, STAGES)
    s_v = panels.allocate(d_kv, STAGES)
    run(
        _attend, (p_out, p_lse, s_q, s_k, s_v), ((d_q,), (s_q,)), ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse),
        (p_cu_tokens, tokens, heads, groups, tiles, scale), QUERIES, VARLEN, HEAD_DIM, WARPGROUPS, BLOCK_N, STAGES, TAIL, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_dq(
    d_resident, d_resident_rest, d_grad, d_grad_rest, d_out, d_out_rest, d_streamed, d_streamed_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """dQ and rowsum(dO · O)."""
    d_q = panels.combine(d_resident, d_resident_rest)
    d_do = panels.combine(d_grad, d_grad_rest)
    d_o = panels.combine(d_out, d_out_rest)
    d_kv = panels.combine(d_streamed, d_streamed_rest)
    s_q = panels.allocate(d_q, WARPGROUPS)
    s_do = panels.allocate(d_do, WARPGROUPS)
    s_out = panels.allocate(d_o, WARPGROUPS)
    s_k = panels.allocate(d_kv, STAGES)
    s_v = panels.allocate(d_kv, STAGES)
    run(
        _compute_dq, (p_lse, p_delta, p_dqkv, s_q, s_do, s_out, s_k, s_v), ((d_q, d_do, d_o), (s_q, s_do, s_out)),
        ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse), (p_cu_tokens, tokens, heads, groups, tiles, scale),
        QUERIES, VARLEN, HEAD_DIM, WARPGROUPS, BLOCK_N, STAGES, TAIL, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_dkv(
    d_resident, d_resident_rest, d_streamed, d_streamed_rest, d_grad, d_grad_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV."""
    d_kv = panels.combine(d_resident, d_resident_rest)
    d_q = panels.combine(d_streamed, d_streamed_rest)
    d_do = panels.combine(d_grad, d_grad_rest)
    s_k = panels.allocate(d_kv, WARPGROUPS * 2)
    s_v = panels.allocate(d_kv, WARPGROUPS * 2)
    s_q = panels.allocate(d_q, STAGES)
    s_do = panels.allocate(d_do, STAGES)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], vector_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], vector_shared())
    run(
        _compute_dkv, (p_dqkv, s_k, s_v, s_q, s_do, s_lse, s_delta), ((d_kv, d_kv), (s_k, s_v)), ((d_q, d_do), (s_q, s_do)),
        (p_lse, p_delta, s_lse, s_delta), (p_cu_tokens, tokens, heads, groups, tiles, scale), KEYS, VARLEN, HEAD_DIM,
        WARPGROUPS, BLOCK_N, STAGES, TAIL, IN_REGISTERS,
    )  # fmt: skip


def forward(qkv: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """As `forward` of the portable kernels."""
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads, head_dim)
    lse = qkv.new_empty((heads, tokens) if cu_tokens is not None else (len(qkv), heads, tokens), dtype=torch.float32)
    if out.numel():
        (qkv,) = _as_batch(cu_tokens, qkv)
        tensors = (*descriptors(qkv, head_dim, 64), *descriptors(qkv, head_dim, tile.blocks["BLOCK_N"]), out, lse)
        _launch(attention_long_fwd_kernel, tensors, qkv, cu_tokens, max_tokens, tile.blocks)
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(the gradient of packed QKV, contiguous; an empty tensor, as its sums over the tokens are not computed here)."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        qkv, grad, out = _as_batch(cu_tokens, qkv, grad, out)
        delta = torch.empty_like(lse)
        d_qkv, d_grad, d_out = (descriptors(x, qkv.shape[-1], 64) for x in (qkv, grad, out))
        queries, keys = blocks_of(tile)
        tensors = (*d_qkv, *d_grad, *d_out, *descriptors(qkv, qkv.shape[-1], queries["BLOCK_N"]), lse, delta, dqkv)
        _launch(attention_long_bwd_kernel_dq, tensors, qkv, cu_tokens, max_tokens, queries)
        d_streamed = (d for x in (qkv, grad) for d in descriptors(x, qkv.shape[-1], keys["BLOCK_N"]))
        _launch(attention_long_bwd_kernel_dkv, (*d_qkv, *d_streamed, lse, delta, dqkv), qkv, cu_tokens, max_tokens, keys)
    return dqkv, lse.new_empty(0)


def blocks_of(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of the two kernels of the backward: those of dK and dV have the prefix `KEYS_` in the tile."""
    keys = {name.removeprefix("KEYS_"): size for name, size in tile.blocks.items() if name.startswith("KEYS_")}
    return {name: size for name, size in tile.blocks.items() if not name.startswith("KEYS_")}, keys


def _as_batch(cu_tokens: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors `[batch, tokens, ...]` that TMA can address; varlen sequences are one example."""
    return [tma_aligned(x if cu_tokens is None else x[None]) for x in tensors]


def _launch(kernel: Callable, tensors: tuple, qkv: Tensor, cu_tokens: Tensor | None, max_tokens: int, blocks: Mapping[str, int]) -> None:
    batch, tokens, _, heads, head_dim = qkv.shape
    sequences, longest = (batch, tokens) if cu_tokens is None else (len(cu_tokens) - 1, max_tokens)
    groups = triton.cdiv(longest, 64 * blocks["WARPGROUPS"])
    tiles = sequences * heads * groups
    kernel[(min(tiles, num_sms(qkv.device)),)](
        *tensors, cu_tokens, tokens, heads, groups, tiles, scale_of(head_dim), VARLEN=cu_tokens is not None, HEAD_DIM=head_dim,
        TAIL=_tail(tokens, blocks["BLOCK_N"]) if cu_tokens is None else blocks["BLOCK_N"], **blocks, **_options(blocks),
    )  # fmt: skip


def _tail(tokens: int, block: int) -> int:
    """How many rows of the last streamed block are multiplied: those that exist, rounded up to a power of two from 16."""
    return max(16, 1 << ((tokens - 1) % block).bit_length())


def _options(blocks: Mapping[str, int]) -> dict[str, int]:
    """Registers a thread at the launch, before the producer gives some up to the consumers."""
    return {"num_warps": 4, "maxnreg": 128 if blocks["WARPGROUPS"] == 3 else 168}


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a tile: for equal sequences whose last block is narrow, and for varlen ones."""
    numbers = {**dict.fromkeys(_INTEGERS, "i32"), "scale": "fp32"}
    if tile.op == "attention_long_forward":
        blocks = dict(tile.blocks)
        rows = {"d_resident": 64, "d_streamed": blocks["BLOCK_N"]}
        kernels = ((attention_long_fwd_kernel, rows, {"p_out": f"*{dtype}", "p_lse": "*fp32"}, blocks),)
    else:
        queries, keys = blocks_of(tile)
        pointers = {"p_lse": "*fp32", "p_delta": "*fp32", "p_dqkv": f"*{dtype}"}
        first = {"d_resident": 64, "d_grad": 64, "d_out": 64, "d_streamed": queries["BLOCK_N"]}
        second = {"d_resident": 64, "d_streamed": keys["BLOCK_N"], "d_grad": keys["BLOCK_N"]}
        kernels = (
            (attention_long_bwd_kernel_dq, first, pointers, queries),
            (attention_long_bwd_kernel_dkv, second, pointers, keys),
        )
    for kernel, rows, pointers, blocks in kernels:
        types = descriptor_types(dtype, tile.features, rows)
        for varlen in (False, True):
            cu_tokens = {"p_cu_tokens": "*i32"} if varlen else {}
            options = _options(blocks)
            yield Variant(
                kernel=kernel,
                signature={name: kind for name, kind in types.items() if kind} | pointers | cu_tokens | numbers,
                constants={name: None for name, kind in (types | {"p_cu_tokens": varlen}).items() if not kind}
                | {"VARLEN": varlen, "HEAD_DIM": tile.features, "TAIL": blocks["BLOCK_N"] if varlen else 16}
                | blocks,
                divisible=(*pointers, *cu_tokens),
                num_warps=options["num_warps"],
                num_stages=tile.num_stages,
                max_registers=options["maxnreg"],
            )
