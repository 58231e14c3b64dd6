# A launch is not the call that its signature says, to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of any number of tokens, of equal sequences or of sequences packed one after the other: online softmax, two-phase backward.

Reads the packed projection `[batch, tokens, 3, heads, head_dim]`, or `[total, 3, heads, head_dim]` with the first row of every sequence
in `cu_tokens` (`VARLEN`), and writes the same without the 3. The backward computes the scores twice, once for dK and dV with a block of
keys staying, once for dQ with a block of queries staying: no atomics, so runs repeat bit for bit.

- BLOCK_M, BLOCK_N: queries of a program and keys of an iteration (forward, dQ)
- KEYS_M, KEYS_N: queries of an iteration and keys of a program (dK and dV)
- HEAD_DIM, BLOCK_D: a head's width and the power of two that holds it
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.attention_short import LN_2, scale_of
from polyvit_kernels.triton_kernels.rows import load_rows, store_rows

_DELTA_ROWS = 64


@triton.jit
def _sequence(p_cu_tokens, i_sequence, tokens, VARLEN: tl.constexpr):
    """(first row, number of rows) of a sequence."""
    if VARLEN:
        i_first = tl.load(p_cu_tokens + i_sequence)
        count = tl.load(p_cu_tokens + i_sequence + 1) - i_first
        i_first = i_first.to(tl.int64)
    else:
        i_first = i_sequence.to(tl.int64) * tokens
        count = tokens
    return i_first, count


@triton.jit
def _first_element(i_first, i_sequence, stride_batch, stride_token, VARLEN: tl.constexpr):
    """Offset of a sequence's first row in a tensor with such strides."""
    if VARLEN:
        return i_first * stride_token
    return i_sequence.to(tl.int64) * stride_batch


@triton.jit
def _first_sum(i_first, i_sequence, i_head, tokens, heads, VARLEN: tl.constexpr):
    """Offset of a sequence's first log-sum in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(tl.int64) * tokens + i_first
    return (i_sequence.to(tl.int64) * heads + i_head) * tokens


@triton.jit
def _absorb(
    b_q, p_k, p_v, b_max, b_sum, b_out, i_start, stride, count, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys more in the running maximum, sum and output (arXiv 2205.14135, algorithm 1)."""
    i_key = i_start + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, i_key, stride, count, HEAD_DIM, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED:
        b_s = tl.where(i_key[None, :] < count, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_alpha = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_v = load_rows(p_v, i_key, stride, count, HEAD_DIM, BLOCK_D, MASKED)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_alpha[:, None], input_precision="ieee")
    return b_new, b_sum, b_out


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
    """One block of queries of one head. Blocks of a head are neighbours, so that its keys and values are read from L2."""
    i_head, i_sequence = tl.program_id(1), tl.program_id(2)
    i_first, count = _sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    i_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_q = p_qkv + _first_element(i_first, i_sequence, stride_batch, stride_token, VARLEN) + i_head.to(tl.int64) * stride_head
    p_k = p_q + stride_part
    p_v = p_k + stride_part
    b_q = load_rows(p_q, i_query, stride_token, count, HEAD_DIM, BLOCK_D, True)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = count // BLOCK_N * BLOCK_N
    for i_start in range(0, whole, BLOCK_N):
        b_max, b_sum, b_out = _absorb(
            b_q, p_k, p_v, b_max, b_sum, b_out, i_start, stride_token, count, scale, HEAD_DIM, BLOCK_D, BLOCK_N, False
        )  # fmt: skip
    if whole < count:
        b_max, b_sum, b_out = _absorb(
            b_q, p_k, p_v, b_max, b_sum, b_out, whole, stride_token, count, scale, HEAD_DIM, BLOCK_D, BLOCK_N, True
        )  # fmt: skip
    p_head = p_out + (i_first * heads + i_head) * HEAD_DIM
    store_rows(p_head, b_out / b_sum[:, None], i_query, heads * HEAD_DIM, count, HEAD_DIM, BLOCK_D)
    p_row = p_lse + _first_sum(i_first, i_sequence, i_head, tokens, heads, VARLEN) + i_query
    tl.store(p_row, b_max + tl.log2(b_sum), mask=i_query < count)


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
    """rowsum(dO · O), which equals rowsum(dP · P), laid out as the log-sums."""
    i_head, i_sequence = tl.program_id(1), tl.program_id(2)
    i_first, count = _sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    i_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_do = p_grad + _first_element(i_first, i_sequence, grad_batch, grad_token, VARLEN) + i_head.to(tl.int64) * grad_head
    b_do = load_rows(p_do, i_query, grad_token, count, HEAD_DIM, BLOCK_D, True)
    b_o = load_rows(p_out + (i_first * heads + i_head) * HEAD_DIM, i_query, heads * HEAD_DIM, count, HEAD_DIM, BLOCK_D, True)
    p_row = p_delta + _first_sum(i_first, i_sequence, i_head, tokens, heads, VARLEN) + i_query
    tl.store(p_row, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1), mask=i_query < count)


@triton.jit
def _d_keys(
    p_q, p_do, p_row, p_delta, p_dq, i_start, count, stride_token, stride_part, grad_token, stride_d, part_d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_M: tl.constexpr, KEYS_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys. Scores are transposed: their rows are keys, so that P and dS need not change hands."""
    i_key = i_start + tl.arange(0, KEYS_N)
    b_k = load_rows(p_q + stride_part, i_key, stride_token, count, HEAD_DIM, BLOCK_D, True)
    b_v = load_rows(p_q + 2 * stride_part, i_key, stride_token, count, HEAD_DIM, BLOCK_D, True)
    b_dk = tl.zeros([KEYS_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([KEYS_N, BLOCK_D], tl.float32)
    for i_query_start in range(0, count, KEYS_M):
        i_query = i_query_start + tl.arange(0, KEYS_M)
        b_q = load_rows(p_q, i_query, stride_token, count, HEAD_DIM, BLOCK_D, True)
        b_do = load_rows(p_do, i_query, grad_token, count, HEAD_DIM, BLOCK_D, True)
        # An infinite log-sum makes the probabilities of rows beyond the end zero.
        b_lse = tl.load(p_row + i_query, mask=i_query < count, other=float("inf"))
        b_delta = tl.load(p_delta + i_query, mask=i_query < count, other=0.0)
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    store_rows(p_dq + part_d, b_dk * (scale * LN_2), i_key, stride_d, count, HEAD_DIM, BLOCK_D)
    store_rows(p_dq + 2 * part_d, b_dv, i_key, stride_d, count, HEAD_DIM, BLOCK_D)


@triton.jit
def _d_queries(
    p_q, p_do, p_row, p_delta, p_dq, i_start, count, stride_token, stride_part, grad_token, stride_d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries."""
    i_query = i_start + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, i_query, stride_token, count, HEAD_DIM, BLOCK_D, True)
    b_do = load_rows(p_do, i_query, grad_token, count, HEAD_DIM, BLOCK_D, True)
    b_lse = tl.load(p_row + i_query, mask=i_query < count, other=float("inf"))
    b_delta = tl.load(p_delta + i_query, mask=i_query < count, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_key_start in range(0, count, BLOCK_N):
        i_key = i_key_start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_q + stride_part, i_key, stride_token, count, HEAD_DIM, BLOCK_D, True)
        b_v = load_rows(p_q + 2 * stride_part, i_key, stride_token, count, HEAD_DIM, BLOCK_D, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        # Where all scores of a query are far below zero, that of a key beyond the end, 0, would make infinity, and NaN of dQ.
        b_s = tl.where(i_key[None, :] < count, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_rows(p_dq, b_dq * (scale * LN_2), i_query, stride_d, count, HEAD_DIM, BLOCK_D)


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
    i_first, count = _sequence(p_cu_tokens, i_sequence, tokens, VARLEN)
    p_q = p_qkv + _first_element(i_first, i_sequence, stride_batch, stride_token, VARLEN) + i_head.to(tl.int64) * stride_head
    p_do = p_grad + _first_element(i_first, i_sequence, grad_batch, grad_token, VARLEN) + i_head.to(tl.int64) * grad_head
    o_row = _first_sum(i_first, i_sequence, i_head, tokens, heads, VARLEN)
    part_d = heads * HEAD_DIM
    stride_d = 3 * part_d
    p_dq = p_dqkv + i_first * stride_d + i_head * HEAD_DIM
    if i_block < key_blocks:
        if i_block * KEYS_N < count:
            _d_keys(
                p_q, p_do, p_lse + o_row, p_delta + o_row, p_dq, i_block * KEYS_N, count,
                stride_token, stride_part, grad_token, stride_d, part_d, scale, HEAD_DIM, BLOCK_D, KEYS_M, KEYS_N,
            )  # fmt: skip
    else:
        i_start = (i_block - key_blocks) * BLOCK_M
        if i_start < count:
            _d_queries(
                p_q, p_do, p_lse + o_row, p_delta + o_row, p_dq, i_start, count,
                stride_token, stride_part, grad_token, stride_d, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip


def forward(qkv: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """(out, log2 of the softmax's sum in fp32): `[batch, tokens, heads, head_dim]` and `[batch, heads, tokens]`.

    With `cu_tokens`, int32 `[sequences + 1]`: `[total, heads, head_dim]` and `[heads, total]`, no sequence being longer than
    `max_tokens`. qkv's last stride is 1.
    """
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    out = qkv.new_empty(*qkv.shape[:-3], heads, head_dim)
    lse = qkv.new_empty((heads, tokens) if cu_tokens is not None else (len(qkv), heads, tokens), dtype=torch.float32)
    if out.numel():
        packed = cu_tokens is not None
        sequences, longest = _sizes(qkv, cu_tokens, max_tokens)
        grid = (triton.cdiv(longest, tile.blocks["BLOCK_M"]), heads, sequences)
        attention_long_fwd_kernel[grid](
            qkv, out, lse, cu_tokens, tokens, heads, *_strides(qkv, packed), scale_of(head_dim),
            VARLEN=packed, HEAD_DIM=head_dim, **tile.launch(),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile, cu_tokens: Tensor | None = None, max_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """(the packed gradient, as `qkv` but contiguous; an empty tensor, as its sums are not known).

    The last strides of grad and qkv are 1; out is contiguous.
    """
    tokens, heads, head_dim = qkv.shape[-4], *qkv.shape[-2:]
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        packed, blocks = cu_tokens is not None, tile.blocks
        sequences, longest = _sizes(qkv, cu_tokens, max_tokens)
        delta = torch.empty_like(lse)
        shared = {"VARLEN": packed, "HEAD_DIM": head_dim}
        attention_long_bwd_kernel_delta[(triton.cdiv(longest, _DELTA_ROWS), heads, sequences)](
            grad, out, delta, cu_tokens, tokens, heads, *_strides(grad, packed), **shared, BLOCK_D=blocks["BLOCK_D"], BLOCK_M=_DELTA_ROWS
        )  # fmt: skip
        key_blocks = triton.cdiv(longest, blocks["KEYS_N"])
        grid = (key_blocks + triton.cdiv(longest, blocks["BLOCK_M"]), heads, sequences)
        attention_long_bwd_kernel[grid](
            grad, qkv, lse, delta, dqkv, cu_tokens, tokens, heads, key_blocks, *_strides(grad, packed), *_strides(qkv, packed),
            scale_of(head_dim), **shared, **tile.launch(),
        )  # fmt: skip
    return dqkv, lse.new_empty(0)


def _sizes(qkv: Tensor, cu_tokens: Tensor | None, max_tokens: int) -> tuple[int, int]:
    """(number of sequences, length of the longest)."""
    return (len(qkv), qkv.shape[1]) if cu_tokens is None else (len(cu_tokens) - 1, max_tokens)


def _strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """The strides of the batch (0 where sequences lie one after the other), the token and so on, but not the last."""
    return ((0,) if packed else ()) + x.stride()[:-1]


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a row for a packed projection as a linear layer gives it: for equal sequences, then for packed ones."""
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
            blocks = {"BLOCK_D": tile.blocks["BLOCK_D"], "BLOCK_M": _DELTA_ROWS}
            yield variant(attention_long_bwd_kernel_delta, pointers, sizes | grad_strides, blocks)
