"""Attention within sequences of several lengths that are packed one after the other."""

from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from polyvit_kernels.ops.attention.backends import choose_backend
from polyvit_kernels.ops.attention.dense import (
    MOST_SEQUENCES,
    attention,
    compute_on_cpu,
    differentiate_on_cpu,
    fake_attention,
    fake_packed_gradient,
    load_kernels,
    make_addressable,
    pick_kernel,
    save_attention,
)
from polyvit_kernels.ops.dtypes import check_floating, matmul_dtype
from polyvit_kernels.ops.registration import Pick, register
from polyvit_kernels.tiles import PACKAGES


def attention_varlen(
    qkv: Float[Tensor, "total 3 heads head_dim"], cu_tokens: Int32[Tensor, " sequences_plus_1"], max_tokens: int
) -> Float[Tensor, "total heads head_dim"]:
    """`attention` within each of several sequences that lie one after the other.

    Sequence i holds the rows `cu_tokens[i]` to `cu_tokens[i + 1]`, none is longer than `max_tokens`, and every row belongs to one. On a GPU
    that is the caller's promise, as a check would wait for the device (in fp32, and with more than 128 features, that wait is there).
    Raises ValueError for another shape or dtype.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but attention_varlen needs [total, 3, heads, head_dim]")
    if cu_tokens.ndim != 1 or len(cu_tokens) < 1 or cu_tokens.dtype != torch.int32 or cu_tokens.device != qkv.device:
        raise ValueError(
            f"cu_tokens is {list(cu_tokens.shape)} {cu_tokens.dtype} on {cu_tokens.device}, "
            f"but attention_varlen needs [sequences + 1] torch.int32 on {qkv.device}"
        )
    if len(cu_tokens) - 1 > MOST_SEQUENCES:
        raise ValueError(
            f"cu_tokens holds the offsets of {len(cu_tokens) - 1} sequences, but at most {MOST_SEQUENCES} fit one call; make several calls"
        )
    check_floating(qkv=qkv)
    qkv = qkv.to(matmul_dtype(qkv))
    if qkv.is_cuda and choose_backend("attention_long_forward", max_tokens, qkv.shape[3], qkv.device.index, qkv.dtype) not in PACKAGES:
        sequences = qkv.split(_check_lengths(qkv, cu_tokens, max_tokens))
        return torch.cat([attention(sequence[None])[0] for sequence in sequences]) if sequences else qkv.sum(1)
    return _attention_varlen_op(qkv, cu_tokens, max_tokens)[0]


def _check_lengths(qkv: Tensor, cu_tokens: Tensor, max_tokens: int) -> list[int]:
    """The length of each sequence. Raises ValueError when the offsets do not fit `qkv` or `max_tokens`."""
    lengths = cu_tokens.diff().tolist()
    if cu_tokens[0] != 0 or cu_tokens[-1] != len(qkv) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_tokens must rise from 0 to the {len(qkv)} rows of qkv, but is {cu_tokens.tolist()}")
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"a sequence has {max(lengths)} tokens, more than max_tokens = {max_tokens}")
    return lengths


def _attention_varlen(qkv: Tensor, cu_tokens: Tensor, max_tokens: int, pick: Pick) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp `[heads, total]`)."""
    tile = pick_kernel(pick, ("attention_long_forward",), qkv, max(max_tokens, 1))
    if tile.backend in PACKAGES:
        return load_kernels(tile).forward(make_addressable(qkv, 0), tile, cu_tokens.contiguous(), max_tokens)
    results = [compute_on_cpu(sequence[None]) for sequence in qkv.split(_check_lengths(qkv, cu_tokens, max_tokens))]
    outs, lses = [out[0] for out, _ in results], [lse[0] for _, lse in results]
    return (torch.cat(outs), torch.cat(lses, 1)) if results else fake_attention(qkv)


def _attention_varlen_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_tokens: Tensor, max_tokens: int, pick: Pick
) -> Tensor:
    tile = pick_kernel(pick, ("attention_long_backward",), qkv, max(max_tokens, 1))
    if tile.backend in PACKAGES:
        tensors = (make_addressable(grad, 0), make_addressable(qkv, 0), out, lse)
        return load_kernels(tile).backward(*tensors, tile, cu_tokens.contiguous(), max_tokens)[0]
    lengths = _check_lengths(qkv, cu_tokens, max_tokens)
    sequences = zip(*(tensor.split(lengths) for tensor in (grad, qkv, out)), lse.split(lengths, 1), strict=True)
    packed = [differentiate_on_cpu(*(tensor[None] for tensor in sequence))[0] for sequence in sequences]
    return torch.cat(packed) if packed else fake_packed_gradient(qkv)


def _fake_backward(grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return fake_packed_gradient(qkv)


_attention_varlen_backward_op = register("attention_varlen_backward", _attention_varlen_backward, _fake_backward)


def _differentiate_varlen(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    return grad if grad is None else _attention_varlen_backward_op(grad, *ctx.saved_tensors, *ctx.max_tokens), None, None


_attention_varlen_op = register(
    "attention_varlen", _attention_varlen, fake_attention, save=save_attention, differentiate=_differentiate_varlen
)
