# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Attention of any number of tokens on Hopper, of equal sequences or of sequences packed one after the other.

What stays with a consumer, and what streams past it (`streams`):

- forward: queries; keys and values (online softmax)
- dQ: queries, dO and out; keys and values. rowsum(dO · out), which the other kernel needs too, comes from here
- dK and dV: keys and values; queries and dO. Scores are transposed: their rows are keys

So the backward computes scores and dP twice, seven products instead of five, but P and dS never leave registers, and no two programs add
to one element: no atomics, runs repeat bit for bit.

- HEAD_DIM: a head's width, in one or two panels (`layouts`): `d_..._rest` describe the second one
- VARLEN, WARPGROUPS, BLOCK_N, STAGES, TAIL: as in `streams`
- IN_REGISTERS: keys and values are read from shared memory once (dK and dV)
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from polyvit_kernels.hopper.layouts import (
    LN_2,
    accumulators,
    allocate,
    begin_scores,
    begin_sums,
    box,
    columns_of,
    descriptor_type,
    descriptors,
    finish_sums,
    left,
    line_shared,
    mma,
    packed,
    panels,
    panels_of,
    read,
    rows_of,
    store_rows,
    times,
)
from polyvit_kernels.hopper.streams import KEYS, QUERIES, run
from polyvit_kernels.tiles import Tile, Variant, num_sms
from polyvit_kernels.triton_kernels.attention_short import scale_of

_INTEGERS = ["tokens", "heads", "groups", "tiles"]


@gluon.jit
def _top(s_panels, ROWS: gl.constexpr):
    """The first rows of all panels."""
    s_top = ()
    for w in gl.static_range(len(s_panels)):
        s_top = s_top + (s_panels[w].slice(0, ROWS),)
    return s_top


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
    OPTION: gl.constexpr,
):  # fmt: skip
    """The output of 64 queries."""
    p_out, p_lse, s_q, s_k, s_v = tensors
    i_row, count, o_row, o_sum, column, width = rows
    b_q = read(box(s_q, place), left())
    mbarrier.arrive(read_all, count=1)
    slot = start % STAGES
    mbarrier.wait(full.index(slot), start // STAGES & 1)
    b_out, b_max, b_sum = _absorb_last(
        b_q, _top(box(s_k, slot), TAIL), _top(box(s_v, slot), TAIL), empty.index(slot), count - (end - start - 1) * BLOCK_N, scale
    )  # fmt: skip
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
    b_s = warpgroup_mma_wait(PANELS, deps=(b_s,))
    b_p = gl.exp2(b_s * scale - s_lse.load(columns_of(N))[None, :])
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
    i_row, count, o_row, _o_sum, column, width = rows
    if IN_REGISTERS:
        b_k = read(box(s_k, place), left())
        b_v = read(box(s_v, place), left())
    else:
        b_k = box(s_k, place)
        b_v = box(s_v, place)
    slot = start % STAGES
    mbarrier.wait(full.index(slot), start // STAGES & 1)
    b_dk, b_dv = _key_step(
        b_k, b_v, accumulators(box(s_k, place), 64), accumulators(box(s_v, place), 64), _top(box(s_q, slot), TAIL),
        _top(box(s_do, slot), TAIL), s_lse.index(slot).slice(0, TAIL), s_delta.index(slot).slice(0, TAIL), empty.index(slot), scale,
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


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_fwd_kernel(
    d_rows, d_rows_rest, d_stream, d_stream_rest, p_out, p_lse, p_cu_tokens, tokens, heads, groups, tiles, scale,
    VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Output and log-sums."""
    d_q = panels_of(d_rows, d_rows_rest)
    d_kv = panels_of(d_stream, d_stream_rest)
    s_q = allocate(d_q, WARPGROUPS)
    s_k = allocate(d_kv, STAGES)
    s_v = allocate(d_kv, STAGES)
    run(
        _attend, (p_out, p_lse, s_q, s_k, s_v), ((d_q,), (s_q,)), ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse),
        (p_cu_tokens, tokens, heads, groups, tiles, scale), QUERIES, VARLEN, HEAD_DIM, WARPGROUPS, BLOCK_N, STAGES, TAIL, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_queries(
    d_rows, d_rows_rest, d_grad, d_grad_rest, d_out, d_out_rest, d_stream, d_stream_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """dQ and rowsum(dO · out)."""
    d_q = panels_of(d_rows, d_rows_rest)
    d_do = panels_of(d_grad, d_grad_rest)
    d_o = panels_of(d_out, d_out_rest)
    d_kv = panels_of(d_stream, d_stream_rest)
    s_q = allocate(d_q, WARPGROUPS)
    s_do = allocate(d_do, WARPGROUPS)
    s_out = allocate(d_o, WARPGROUPS)
    s_k = allocate(d_kv, STAGES)
    s_v = allocate(d_kv, STAGES)
    run(
        _differentiate_queries, (p_lse, p_delta, p_dqkv, s_q, s_do, s_out, s_k, s_v), ((d_q, d_do, d_o), (s_q, s_do, s_out)),
        ((d_kv, d_kv), (s_k, s_v)), (p_lse, p_lse, p_lse, p_lse), (p_cu_tokens, tokens, heads, groups, tiles, scale),
        QUERIES, VARLEN, HEAD_DIM, WARPGROUPS, BLOCK_N, STAGES, TAIL, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_long_bwd_kernel_keys(
    d_rows, d_rows_rest, d_stream, d_stream_rest, d_grad, d_grad_rest, p_lse, p_delta, p_dqkv, p_cu_tokens,
    tokens, heads, groups, tiles, scale, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAIL: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV."""
    d_kv = panels_of(d_rows, d_rows_rest)
    d_q = panels_of(d_stream, d_stream_rest)
    d_do = panels_of(d_grad, d_grad_rest)
    s_k = allocate(d_kv, WARPGROUPS * 2)
    s_v = allocate(d_kv, WARPGROUPS * 2)
    s_q = allocate(d_q, STAGES)
    s_do = allocate(d_do, STAGES)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], line_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], line_shared())
    run(
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
    kernel[(min(tiles, num_sms(qkv.device)),)](
        *tensors, cu_tokens, tokens, heads, groups, tiles, scale_of(head_dim), VARLEN=cu_tokens is not None, HEAD_DIM=head_dim,
        TAIL=_tail(tokens, blocks["BLOCK_N"]) if cu_tokens is None else blocks["BLOCK_N"], **blocks, **_options(blocks),
    )  # fmt: skip


def _tail(tokens: int, block: int) -> int:
    """How many rows of the last block are multiplied: those that there are, up to a power of two."""
    return max(16, 1 << ((tokens - 1) % block).bit_length())


def _options(blocks: Mapping[str, int]) -> dict[str, int]:
    """Registers of a thread at the launch, when consumers and the producer have equally many."""
    return {"num_warps": 4, "maxnreg": 128 if blocks["WARPGROUPS"] == 3 else 168}


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a row: for equal sequences whose last block is narrow, and for packed ones."""
    numbers = {**dict.fromkeys(_INTEGERS, "i32"), "scale": "fp32"}
    if tile.op == "attention_long_forward":
        blocks = dict(tile.blocks)
        streams = {"d_rows": 64, "d_stream": blocks["BLOCK_N"]}
        kernels = ((attention_long_fwd_kernel, streams, {"p_out": f"*{dtype}", "p_lse": "*fp32"}, blocks),)
    else:
        queries, keys = blocks_of(tile)
        pointers = {"p_lse": "*fp32", "p_delta": "*fp32", "p_dqkv": f"*{dtype}"}
        first = {"d_rows": 64, "d_grad": 64, "d_out": 64, "d_stream": queries["BLOCK_N"]}
        second = {"d_rows": 64, "d_stream": keys["BLOCK_N"], "d_grad": keys["BLOCK_N"]}
        kernels = (
            (attention_long_bwd_kernel_queries, first, pointers, queries),
            (attention_long_bwd_kernel_keys, second, pointers, keys),
        )
    for kernel, streams, pointers, blocks in kernels:
        types = _descriptor_types(dtype, tile.features, streams)
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


def _descriptor_types(dtype: str, head_dim: int, streams: Mapping[str, int]) -> dict[str, str | None]:
    return {
        name + suffix: descriptor_type(dtype, rows, width) if width else None
        for name, rows in streams.items()
        for suffix, width in zip(("", "_rest"), panels(head_dim), strict=True)
    }
