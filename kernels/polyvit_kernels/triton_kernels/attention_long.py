# A launch is not the call that its signature says, to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of any number of tokens: online softmax forward, two-pass backward (FlashAttention-2, arXiv 2307.08691).

Reads packed QKV `[batch, tokens, 3, heads, head_dim]` and writes O `[batch, tokens, heads, head_dim]` and the log-sum-exp in base 2,
`[batch, heads, tokens]`. With VARLEN there is no batch: sequences lie one after the other, `[total, 3, heads, head_dim]`, the i-th from row
`cu_tokens[i]` on, and the log-sum-exp is `[heads, total]`.

Forward: a program has a block of queries of one head and walks over the keys with a running maximum and sum, so that scores never reach
memory. Backward: the first programs of a head each have a block of keys (dK, dV), the others a block of queries (dQ). That computes the
scores twice, but no two programs add to one element: no atomics, runs repeat bit for bit.

- BLOCK_M, BLOCK_N: queries of a program and keys of an iteration (forward, dQ)
- KEYS_M, KEYS_N: queries of an iteration and keys of a program (dK and dV)
- HEAD_DIM, BLOCK_D: a head's width and the power of two that holds it
- scale: log2(e) / √head_dim, as all exponentials are powers of two
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.attention_short import LN_2, scale_of
from polyvit_kernels.triton_kernels.rows import load_rows, store_rows

_DELTA_BLOCK_M = 64


@triton.jit
def _locate_sequence(p_cu_tokens, i_sequence, tokens, VARLEN: tl.constexpr):
    """(index of its first row, its length)"""
    if VARLEN:
        i_first = tl.load(p_cu_tokens + i_sequence)
        length = tl.load(p_cu_tokens + i_sequence + 1) - i_first
        i_first = i_first.to(tl.int64)
    else:
        i_first = i_sequence.to(tl.int64) * tokens
        length = tokens
    return i_first, length


@triton.jit
def _sequence_offset(i_first, i_sequence, stride_batch, stride_token, VARLEN: tl.constexpr):
    """Of a sequence's first row in a tensor with these strides."""
    if VARLEN:
        return i_first * stride_token
    return i_sequence.to(tl.int64) * stride_batch


@triton.jit
def _lse_offset(i_first, i_sequence, i_head, tokens, heads, VARLEN: tl.constexpr):
    """Of a sequence's first log-sum-exp in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(tl.int64) * tokens + i_first
    return (i_sequence.to(tl.int64) * heads + i_head) * tokens


@triton.jit
def _online_softmax_update(
    b_q, p_k, p_v, b_max, b_sum, b_out, i_start, stride, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output after one more block of keys."""
    # [BLOCK_N]
    i_key = i_start + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D]
    b_k = load_rows(p_k, i_key, stride, length, HEAD_DIM, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED:
        b_s = tl.where(i_key[None, :] < length, b_s, float("-inf"))
    # [BLOCK_M]
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    # [BLOCK_M, BLOCK_N]
    b_p = tl.exp2(b_s * scale - b_new_max[:, None])
    # [BLOCK_M]; rescales what was summed with the old maximum
    b_alpha = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    # [BLOCK_N, BLOCK_D]
    b_v = load_rows(p_v, i_key, stride, length, HEAD_DIM, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_D]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_alpha[:, None], input_precision="ieee")
    return b_new_max, b_sum, b_out


@triton.jit
def attention_long_fwd_kernel(
    p_qkv,
    p_out,
    p_lse,
    p_cu_tokens,
    tokens,
    heads,
    stride_batch,
    stride_token,
    stride_part,
    stride_head,
    scale,
    VARLEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head. Programs of a head are neighbours in the grid, so that its keys and values are read from L2."""
    i_head, i_sequence = tl.program_id(1), tl.program_id(2)
    i_first, length = _locate_sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    # The grid is as long as the longest sequence.
    if tl.program_id(0) * BLOCK_M >= length:
        return
    # [BLOCK_M]
    i_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_q = p_qkv + _sequence_offset(i_first, i_sequence, stride_batch, stride_token, VARLEN) + i_head.to(tl.int64) * stride_head
    p_k = p_q + stride_part
    p_v = p_k + stride_part
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(p_q, i_query, stride_token, length, HEAD_DIM, BLOCK_D, True)
    # [BLOCK_M]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_D]
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Only the last block of keys may need a mask.
    unmasked = length // BLOCK_N * BLOCK_N
    for i_start in range(0, unmasked, BLOCK_N):
        b_max, b_sum, b_out = _online_softmax_update(
            b_q, p_k, p_v, b_max, b_sum, b_out, i_start, stride_token, length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, False
        )  # fmt: skip
    if unmasked < length:
        b_max, b_sum, b_out = _online_softmax_update(
            b_q, p_k, p_v, b_max, b_sum, b_out, unmasked, stride_token, length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, True
        )  # fmt: skip
    p_head = p_out + (i_first * heads + i_head) * HEAD_DIM
    store_rows(p_head, b_out / b_sum[:, None], i_query, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D)
    # [BLOCK_M]
    p_row = p_lse + _lse_offset(i_first, i_sequence, i_head, tokens, heads, VARLEN) + i_query
    tl.store(p_row, b_max + tl.log2(b_sum), mask=i_query < length)


@triton.jit
def attention_long_bwd_kernel_delta(
    p_grad,
    p_out,
    p_delta,
    p_cu_tokens,
    tokens,
    heads,
    grad_batch,
    grad_token,
    grad_head,
    VARLEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """rowsum(dO · O), which equals rowsum(dP · P), laid out as the log-sum-exp."""
    i_head, i_sequence = tl.program_id(1), tl.program_id(2)
    i_first, length = _locate_sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    # [BLOCK_M]
    i_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_do = p_grad + _sequence_offset(i_first, i_sequence, grad_batch, grad_token, VARLEN) + i_head.to(tl.int64) * grad_head
    # [BLOCK_M, BLOCK_D]
    b_do = load_rows(p_do, i_query, grad_token, length, HEAD_DIM, BLOCK_D, True)
    b_o = load_rows(p_out + (i_first * heads + i_head) * HEAD_DIM, i_query, heads * HEAD_DIM, length, HEAD_DIM, BLOCK_D, True)
    # [BLOCK_M]
    p_row = p_delta + _lse_offset(i_first, i_sequence, i_head, tokens, heads, VARLEN) + i_query
    tl.store(p_row, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1), mask=i_query < length)


@triton.jit
def _compute_dkv(
    p_q, p_do, p_lse, p_delta, p_dq, i_start, length, stride_token, stride_part, grad_token, stride_d, part_d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_M: tl.constexpr, KEYS_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys. Scores are transposed, a row a key, so that P and dS are left operands as they come."""
    # [KEYS_N]
    i_key = i_start + tl.arange(0, KEYS_N)
    # [KEYS_N, BLOCK_D]
    b_k = load_rows(p_q + stride_part, i_key, stride_token, length, HEAD_DIM, BLOCK_D, True)
    b_v = load_rows(p_q + 2 * stride_part, i_key, stride_token, length, HEAD_DIM, BLOCK_D, True)
    b_dk = tl.zeros([KEYS_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([KEYS_N, BLOCK_D], tl.float32)
    for i_query_start in range(0, length, KEYS_M):
        # [KEYS_M]
        i_query = i_query_start + tl.arange(0, KEYS_M)
        # [KEYS_M, BLOCK_D]
        b_q = load_rows(p_q, i_query, stride_token, length, HEAD_DIM, BLOCK_D, True)
        b_do = load_rows(p_do, i_query, grad_token, length, HEAD_DIM, BLOCK_D, True)
        # [KEYS_M]; an infinite log-sum-exp makes the probabilities of rows beyond the end zero
        b_lse = tl.load(p_lse + i_query, mask=i_query < length, other=float("inf"))
        b_delta = tl.load(p_delta + i_query, mask=i_query < length, other=0.0)
        # [KEYS_N, KEYS_M]
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :])
        # [KEYS_N, BLOCK_D]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        # [KEYS_N, KEYS_M]
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :])
        # [KEYS_N, BLOCK_D]
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    store_rows(p_dq + part_d, b_dk * (scale * LN_2), i_key, stride_d, length, HEAD_DIM, BLOCK_D)
    store_rows(p_dq + 2 * part_d, b_dv, i_key, stride_d, length, HEAD_DIM, BLOCK_D)


@triton.jit
def _compute_dq(
    p_q, p_do, p_lse, p_delta, p_dq, i_start, length, stride_token, stride_part, grad_token, stride_d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries."""
    # [BLOCK_M]
    i_query = i_start + tl.arange(0, BLOCK_M)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(p_q, i_query, stride_token, length, HEAD_DIM, BLOCK_D, True)
    b_do = load_rows(p_do, i_query, grad_token, length, HEAD_DIM, BLOCK_D, True)
    # [BLOCK_M]
    b_lse = tl.load(p_lse + i_query, mask=i_query < length, other=float("inf"))
    b_delta = tl.load(p_delta + i_query, mask=i_query < length, other=0.0)
    # [BLOCK_M, BLOCK_D]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_key_start in range(0, length, BLOCK_N):
        # [BLOCK_N]
        i_key = i_key_start + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_q + stride_part, i_key, stride_token, length, HEAD_DIM, BLOCK_D, True)
        b_v = load_rows(p_q + 2 * stride_part, i_key, stride_token, length, HEAD_DIM, BLOCK_D, True)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        # A key beyond the end scores 0. Where all true scores are far below, its probability would be infinite, and dQ NaN.
        b_s = tl.where(i_key[None, :] < length, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        # [BLOCK_M, BLOCK_D]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_rows(p_dq, b_dq * (scale * LN_2), i_query, stride_d, length, HEAD_DIM, BLOCK_D)


@triton.jit
def attention_long_bwd_kernel(
    p_grad,
    p_qkv,
    p_lse,
    p_delta,
    p_dqkv,
    p_cu_tokens,
    tokens,
    heads,
    key_blocks,
    grad_batch,
    grad_token,
    grad_head,
    stride_batch,
    stride_token,
    stride_part,
    stride_head,
    scale,
    VARLEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_M: tl.constexpr,
    KEYS_N: tl.constexpr,
):
    """One block of keys (the first `key_blocks` programs of a head) or of queries (the others)."""
    i_block, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_first, length = _locate_sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    p_q = p_qkv + _sequence_offset(i_first, i_sequence, stride_batch, stride_token, VARLEN) + i_head.to(tl.int64) * stride_head
    p_do = p_grad + _sequence_offset(i_first, i_sequence, grad_batch, grad_token, VARLEN) + i_head.to(tl.int64) * grad_head
    o_lse = _lse_offset(i_first, i_sequence, i_head, tokens, heads, VARLEN)
    # dQ, dK and dV interleave as Q, K and V do, in a contiguous [..., 3, heads, HEAD_DIM].
    part_d = heads * HEAD_DIM
    stride_d = 3 * part_d
    p_dq = p_dqkv + i_first * stride_d + i_head * HEAD_DIM
    if i_block < key_blocks:
        if i_block * KEYS_N < length:
            _compute_dkv(
                p_q, p_do, p_lse + o_lse, p_delta + o_lse, p_dq, i_block * KEYS_N, length,
                stride_token, stride_part, grad_token, stride_d, part_d, scale, HEAD_DIM, BLOCK_D, KEYS_M, KEYS_N,
            )  # fmt: skip
    else:
        i_start = (i_block - key_blocks) * BLOCK_M
        if i_start < length:
            _compute_dq(
                p_q, p_do, p_lse + o_lse, p_delta + o_lse, p_dq, i_start, length,
                stride_token, stride_part, grad_token, stride_d, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip


def forward(qkv: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """(O, its log-sum-exp in base 2, fp32): `[batch, tokens, heads, head_dim]` and `[batch, heads, tokens]`.

    With `cu_tokens`, int32 `[sequences + 1]`: `[total, heads, head_dim]` and `[heads, total]`; no sequence is longer than `max_tokens`.
    The last stride of qkv is 1.
    """
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads, head_dim)
    lse = qkv.new_empty((heads, tokens) if cu_tokens is not None else (len(qkv), heads, tokens), dtype=torch.float32)
    if out.numel():
        varlen = cu_tokens is not None
        sequences, longest = _sizes(qkv, cu_tokens, max_tokens)
        grid = (triton.cdiv(longest, tile.blocks["BLOCK_M"]), heads, sequences)
        attention_long_fwd_kernel[grid](
            qkv, out, lse, cu_tokens, tokens, heads, *_strides(qkv, varlen), scale_of(head_dim),
            VARLEN=varlen, HEAD_DIM=head_dim, **tile.launch(),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(the gradient of packed QKV, contiguous; an empty tensor, as its sums over the tokens are not computed here).

    The last strides of grad and qkv are 1; out is contiguous.
    """
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        varlen, blocks = cu_tokens is not None, tile.blocks
        sequences, longest = _sizes(qkv, cu_tokens, max_tokens)
        delta = torch.empty_like(lse)
        shared = {"VARLEN": varlen, "HEAD_DIM": head_dim}
        attention_long_bwd_kernel_delta[(triton.cdiv(longest, _DELTA_BLOCK_M), heads, sequences)](
            grad, out, delta, cu_tokens, tokens, heads, *_strides(grad, varlen), **shared, BLOCK_D=blocks["BLOCK_D"], BLOCK_M=_DELTA_BLOCK_M
        )  # fmt: skip
        key_blocks = triton.cdiv(longest, blocks["KEYS_N"])
        grid = (key_blocks + triton.cdiv(longest, blocks["BLOCK_M"]), heads, sequences)
        attention_long_bwd_kernel[grid](
            grad, qkv, lse, delta, dqkv, cu_tokens, tokens, heads, key_blocks, *_strides(grad, varlen), *_strides(qkv, varlen),
            scale_of(head_dim), **shared, **tile.launch(),
        )  # fmt: skip
    return dqkv, lse.new_empty(0)


def _sizes(qkv: Tensor, cu_tokens: Tensor | None, max_tokens: int) -> tuple[int, int]:
    """(number of sequences, length of the longest)."""
    return (len(qkv), qkv.shape[1]) if cu_tokens is None else (len(cu_tokens) - 1, max_tokens)


def _strides(x: Tensor, varlen: bool) -> tuple[int, ...]:
    """All strides but the last, that of the batch first: 0 where there is none."""
    return ((0,) if varlen else ()) + x.stride()[:-1]


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a tile for packed QKV as a linear layer gives it: for equal sequences, then for varlen ones."""
    tensor, sum_ = f"*{dtype}", "*fp32"
    sizes = {"tokens": "i32", "heads": "i32"}
    strides = {"stride_batch": "i32", "stride_token": "i32", "stride_part": "i32", "stride_head": "i32"}
    grad_strides = {"grad_batch": "i32", "grad_token": "i32", "grad_head": "i32"}
    for varlen in (False, True):
        constants = {"VARLEN": varlen, "HEAD_DIM": min(tile.features, tile.blocks["BLOCK_D"])}
        cu_tokens = {"p_cu_tokens": "*i32"} if varlen else {}
        constants |= {} if varlen else {"p_cu_tokens": None}

        def variant(kernel, pointers, numbers, blocks, constants=constants, cu_tokens=cu_tokens):
            return Variant(
                kernel=kernel,
                signature=pointers | cu_tokens | numbers,
                constants=constants | blocks,
                divisible=(*pointers, *cu_tokens, *(name for name in numbers if name in strides or name in grad_strides)),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

        if tile.op == "attention_long_forward":
            pointers = {"p_qkv": tensor, "p_out": tensor, "p_lse": sum_}
            yield variant(attention_long_fwd_kernel, pointers, sizes | strides | {"scale": "fp32"}, dict(tile.blocks))
        else:
            pointers = {"p_grad": tensor, "p_qkv": tensor, "p_lse": sum_, "p_delta": sum_, "p_dqkv": tensor}
            numbers = sizes | {"key_blocks": "i32"} | grad_strides | strides | {"scale": "fp32"}
            yield variant(attention_long_bwd_kernel, pointers, numbers, dict(tile.blocks))
            pointers = {"p_grad": tensor, "p_out": tensor, "p_delta": sum_}
            blocks = {"BLOCK_D": tile.blocks["BLOCK_D"], "BLOCK_M": _DELTA_BLOCK_M}
            yield variant(attention_long_bwd_kernel_delta, pointers, sizes | grad_strides, blocks)
