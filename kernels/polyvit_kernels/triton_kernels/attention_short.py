# A launch is not the call that its signature says, to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of at most 256 tokens: a row of scores fits in registers, so the softmax needs no running maximum.

Reads packed QKV `[batch, tokens, 3, heads, head_dim]`, writes O `[batch, tokens, heads, head_dim]` and the log-sum-exp in base 2
`[batch, heads, tokens]`. Forward: a program has a block of queries of one head and all its keys at once. Backward: a program has a head,
with all queries in registers, and finishes dK and dV of one block of keys an iteration. No atomics: every element has one writer, and runs
repeat bit for bit.

- BLOCK_M: queries of a program (forward), or the power of two that holds all tokens (backward)
- KEYS_0, KEYS_1, KEYS_2: the keys in chunks of powers of two, 128 + 64 + 16 for 197, cheaper than 256; only the last one is masked
- BLOCK_N: keys of an iteration of the backward
- HEAD_DIM, BLOCK_D: a head's width and the power of two that holds it
- scale: log2(e) / √head_dim, as all exponentials are powers of two
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.rows import load_rows, store_columns, store_rows

LN_2 = tl.constexpr(0.6931471805599453)  # takes the log2(e) out of the scale again


@triton.jit
def attention_short_fwd_kernel(
    p_qkv,
    p_out,
    p_lse,
    tokens,
    heads,
    stride_batch,
    stride_token,
    stride_part,
    stride_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS_0: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
):
    """One block of queries of one head. Programs of a head are neighbours in the grid, so that its keys and values are read from L2."""
    i_head, i_batch = tl.program_id(1), tl.program_id(2)
    # [BLOCK_M]
    i_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_q = p_qkv + i_batch.to(tl.int64) * stride_batch + i_head.to(tl.int64) * stride_head
    p_k = p_q + stride_part
    p_v = p_k + stride_part
    # All loads come first: they are in flight together, and hold no registers once they are in shared memory.
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(p_q, i_query, stride_token, tokens, HEAD_DIM, BLOCK_D, True)
    # [KEYS_0], [KEYS_0, BLOCK_D]
    i_0 = tl.arange(0, KEYS_0)
    b_k0 = load_rows(p_k, i_0, stride_token, tokens, HEAD_DIM, BLOCK_D, KEYS_1 == 0)
    if KEYS_1 > 0:
        # [KEYS_1], [KEYS_1, BLOCK_D]
        i_1 = KEYS_0 + tl.arange(0, KEYS_1)
        b_k1 = load_rows(p_k, i_1, stride_token, tokens, HEAD_DIM, BLOCK_D, KEYS_2 == 0)
    if KEYS_2 > 0:
        # [KEYS_2], [KEYS_2, BLOCK_D]
        i_2 = KEYS_0 + KEYS_1 + tl.arange(0, KEYS_2)
        b_k2 = load_rows(p_k, i_2, stride_token, tokens, HEAD_DIM, BLOCK_D, True)
    # [KEYS_0, BLOCK_D], [KEYS_1, BLOCK_D], [KEYS_2, BLOCK_D]
    b_v0 = load_rows(p_v, i_0, stride_token, tokens, HEAD_DIM, BLOCK_D, KEYS_1 == 0)
    if KEYS_1 > 0:
        b_v1 = load_rows(p_v, i_1, stride_token, tokens, HEAD_DIM, BLOCK_D, KEYS_2 == 0)
    if KEYS_2 > 0:
        b_v2 = load_rows(p_v, i_2, stride_token, tokens, HEAD_DIM, BLOCK_D, True)

    # [BLOCK_M, KEYS_0], [BLOCK_M]
    b_s0 = tl.dot(b_q, tl.trans(b_k0), input_precision="ieee")
    if KEYS_1 == 0:
        b_s0 = tl.where(i_0[None, :] < tokens, b_s0, float("-inf"))
    b_max = tl.max(b_s0, 1)
    if KEYS_1 > 0:
        # [BLOCK_M, KEYS_1]
        b_s1 = tl.dot(b_q, tl.trans(b_k1), input_precision="ieee")
        if KEYS_2 == 0:
            b_s1 = tl.where(i_1[None, :] < tokens, b_s1, float("-inf"))
        # [BLOCK_M]
        b_max = tl.maximum(b_max, tl.max(b_s1, 1))
    if KEYS_2 > 0:
        # [BLOCK_M, KEYS_2]
        b_s2 = tl.dot(b_q, tl.trans(b_k2), input_precision="ieee")
        b_s2 = tl.where(i_2[None, :] < tokens, b_s2, float("-inf"))
        # [BLOCK_M]
        b_max = tl.maximum(b_max, tl.max(b_s2, 1))

    # The scale is positive: it goes into the exponent, one fused multiply-add per score.
    b_max = b_max * scale
    # [BLOCK_M, KEYS_0], [BLOCK_M], [BLOCK_M, BLOCK_D]
    b_p = tl.exp2(b_s0 * scale - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v0.dtype), b_v0, input_precision="ieee")
    if KEYS_1 > 0:
        # [BLOCK_M, KEYS_1], [BLOCK_M], [BLOCK_M, BLOCK_D]
        b_p = tl.exp2(b_s1 * scale - b_max[:, None])
        b_sum += tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v0.dtype), b_v1, b_out, input_precision="ieee")
    if KEYS_2 > 0:
        # [BLOCK_M, KEYS_2], [BLOCK_M], [BLOCK_M, BLOCK_D]
        b_p = tl.exp2(b_s2 * scale - b_max[:, None])
        b_sum += tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v0.dtype), b_v2, b_out, input_precision="ieee")

    p_head = p_out + (i_batch.to(tl.int64) * tokens * heads + i_head) * HEAD_DIM
    store_rows(p_head, b_out / b_sum[:, None], i_query, heads * HEAD_DIM, tokens, HEAD_DIM, BLOCK_D)
    p_row = p_lse + (i_batch.to(tl.int64) * heads + i_head) * tokens + i_query
    tl.store(p_row, b_max + tl.log2(b_sum), mask=i_query < tokens)


@triton.jit
def attention_short_bwd_kernel(
    p_grad,
    p_qkv,
    p_out,
    p_lse,
    p_dqkv,
    tokens,
    heads,
    grad_batch,
    grad_token,
    grad_head,
    stride_batch,
    stride_token,
    stride_part,
    stride_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head. All its queries, their gradients and dQ stay in registers; an iteration finishes dK and dV of a block of keys.

    Keeping dK and dV instead would need twice the accumulators, which spill.
    """
    i_head, i_batch = tl.program_id(0), tl.program_id(1)
    # [BLOCK_M]
    i_query = tl.arange(0, BLOCK_M)
    m_query = i_query < tokens
    p_q = p_qkv + i_batch.to(tl.int64) * stride_batch + i_head.to(tl.int64) * stride_head
    p_do = p_grad + i_batch.to(tl.int64) * grad_batch + i_head.to(tl.int64) * grad_head
    o_head = (i_batch.to(tl.int64) * tokens * heads + i_head) * HEAD_DIM
    # [BLOCK_M, BLOCK_D]
    b_do = load_rows(p_do, i_query, grad_token, tokens, HEAD_DIM, BLOCK_D, True)
    b_o = load_rows(p_out + o_head, i_query, heads * HEAD_DIM, tokens, HEAD_DIM, BLOCK_D, True)
    # [BLOCK_M]; rowsum(dO · O), which equals rowsum(dP · P)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(p_q, i_query, stride_token, tokens, HEAD_DIM, BLOCK_D, True)
    # [BLOCK_M]; an infinite log-sum-exp makes the probabilities of rows beyond the end zero
    b_lse = tl.load(p_lse + (i_batch.to(tl.int64) * heads + i_head) * tokens + i_query, mask=m_query, other=float("inf"))
    # The gradient of packed QKV, [batch, tokens, 3, heads, HEAD_DIM], is contiguous.
    p_dq = p_dqkv + (i_batch.to(tl.int64) * tokens * 3 * heads + i_head) * HEAD_DIM
    p_dk = p_dq + heads * HEAD_DIM
    p_dv = p_dk + heads * HEAD_DIM
    stride_d = 3 * heads * HEAD_DIM
    # [BLOCK_M, BLOCK_D]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_start in range(0, tokens, BLOCK_N):
        # [BLOCK_N]
        i_key = i_start + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_q + stride_part, i_key, stride_token, tokens, HEAD_DIM, BLOCK_D, True)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        # A key beyond the end scores 0. Where all true scores are far below, its probability would be infinite, and dQ NaN.
        b_s = tl.where(i_key[None, :] < tokens, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        # [BLOCK_D, BLOCK_N]: dV and dK come transposed, so that P and dS need not be
        b_dv = tl.dot(tl.trans(b_do), b_p.to(b_do.dtype), input_precision="ieee")
        store_columns(p_dv, b_dv, i_key, stride_d, tokens, HEAD_DIM, BLOCK_D)
        # [BLOCK_N, BLOCK_D]
        b_v = load_rows(p_q + 2 * stride_part, i_key, stride_token, tokens, HEAD_DIM, BLOCK_D, True)
        # [BLOCK_M, BLOCK_N]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
        # [BLOCK_D, BLOCK_N]
        b_dk = tl.dot(tl.trans(b_q), b_ds, input_precision="ieee") * (scale * LN_2)
        store_columns(p_dk, b_dk, i_key, stride_d, tokens, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_D]
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
    store_rows(p_dq, b_dq * (scale * LN_2), i_query, stride_d, tokens, HEAD_DIM, BLOCK_D)


def scale_of(head_dim: int) -> float:
    """log2(e) / √head_dim: turns a dot product into an exponent of 2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def forward(qkv: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(O `[batch, tokens, heads, head_dim]`, its log-sum-exp in base 2, fp32 `[batch, heads, tokens]`). The last stride of qkv is 1."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel():
        grid = (triton.cdiv(tokens, tile.blocks["BLOCK_M"]), heads, batch)
        attention_short_fwd_kernel[grid](
            qkv, out, lse, tokens, heads, *qkv.stride()[:4], scale_of(head_dim), HEAD_DIM=head_dim, **tile.launch()
        )  # fmt: skip
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(the gradient of packed QKV, contiguous; an empty tensor, as its sums over the tokens are not computed here).

    The last strides of grad and qkv are 1; out is contiguous.
    """
    batch, tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        strides = (*grad.stride()[:3], *qkv.stride()[:4])
        attention_short_bwd_kernel[(heads, batch)](
            grad, qkv, out, lse, dqkv, tokens, heads, *strides, scale_of(head_dim), HEAD_DIM=head_dim, **tile.launch()
        )  # fmt: skip
    return dqkv, lse.new_empty(0)


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernel of a tile for packed QKV as a linear layer gives it."""
    tensor = f"*{dtype}"
    sizes = {"tokens": "i32", "heads": "i32"}
    strides = {"stride_batch": "i32", "stride_token": "i32", "stride_part": "i32", "stride_head": "i32"}
    if tile.op == "attention_short_forward":
        kernel, pointers = attention_short_fwd_kernel, {"p_qkv": tensor, "p_out": tensor, "p_lse": "*fp32"}
    else:
        kernel = attention_short_bwd_kernel
        pointers = dict.fromkeys(("p_grad", "p_qkv", "p_out"), tensor) | {"p_lse": "*fp32", "p_dqkv": tensor}
        strides = {"grad_batch": "i32", "grad_token": "i32", "grad_head": "i32"} | strides
    yield Variant(
        kernel=kernel,
        signature=pointers | sizes | strides | {"scale": "fp32"},
        constants={"HEAD_DIM": min(tile.features, tile.blocks["BLOCK_D"])} | dict(tile.blocks),
        divisible=(*pointers, *strides),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
