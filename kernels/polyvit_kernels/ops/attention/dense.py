"""Softmax attention of every token to all tokens of its example, on the packed projection that a linear layer gives."""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from polyvit_kernels.ops import dtypes, gradients
from polyvit_kernels.ops.attention.backends import AttentionBackend, check_backend, choose_backend, library_attention, split_heads
from polyvit_kernels.ops.dtypes import check_floating, matmul_dtype
from polyvit_kernels.ops.registration import Pick, register
from polyvit_kernels.tiles import PACKAGES, Tile

MOST_SEQUENCES = 65_535
"""In one launch: the limit of a grid's third axis."""


def attention(
    qkv: Float[Tensor, "batch tokens 3 heads head_dim"], backend: AttentionBackend = "auto"
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Softmax attention of every token to all tokens of its example, scores divided by sqrt(head_dim) (arXiv 1706.03762, eq. 1).

    Any strides will do; the gradient is packed and contiguous. On a GPU, fp32 and a head_dim beyond 128 or not divisible by 16 are computed
    by torch, unless a `backend` is named; where cuDNN or FlashAttention has no kernel, another one of torch's is used, and xformers raises
    NotImplementedError. Raises ValueError for another shape or dtype, and for a backend that is not installed.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but attention needs [batch, tokens, 3, heads, head_dim]")
    check_floating(qkv=qkv)
    qkv = qkv.to(matmul_dtype(qkv))
    if backend != "auto":
        check_backend(backend, qkv.device.type)
        return library_attention(qkv, backend)
    if not dtypes.runs_registered(qkv):
        return functional.scaled_dot_product_attention(*split_heads(qkv)).transpose(1, 2)
    chosen = choose_backend("attention", qkv.shape[1], qkv.shape[4], qkv.device.index, qkv.dtype) if qkv.is_cuda else "triton"
    if chosen != "triton":
        return library_attention(qkv, chosen)
    return _attention_op(qkv)[0]


def _attention(qkv: Tensor, pick: Pick) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp of every query's scores `[batch, heads, tokens]`); the base of the logarithm is the kernel's own choice."""
    tile = _pick_kernel(pick, "forward", qkv)
    if tile.backend in PACKAGES:
        if len(qkv) > MOST_SEQUENCES:
            outs, lses = zip(*(_attention(part, pick) for part in qkv.split(MOST_SEQUENCES)), strict=True)
            return torch.cat(outs), torch.cat(lses)
        return load_kernels(tile).forward(make_addressable(qkv, 1), tile)
    return compute_on_cpu(qkv)


def compute_on_cpu(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """`_attention` by torch. Its public scaled_dot_product_attention does not return the log-sum-exp that a backward needs (torch 2.13)."""
    if not qkv.numel():
        return fake_attention(qkv)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*split_heads(make_addressable(qkv, 1)))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def fake_attention(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Empty results, for packed sequences too."""
    *batch, tokens, _, heads, head_dim = qkv.shape
    precise = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(*batch, tokens, heads, head_dim), qkv.new_empty(*batch, heads, tokens, dtype=precise)


def _attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, pick: Pick) -> tuple[Tensor, Tensor]:
    """(the packed gradient, its sum over batch and tokens `[3, heads, head_dim]`), the latter empty where no kernel returns it."""
    tile = _pick_kernel(pick, "backward", qkv)
    if tile.backend in PACKAGES:
        if len(qkv) > MOST_SEQUENCES:
            parts = zip(
                grad.split(MOST_SEQUENCES), qkv.split(MOST_SEQUENCES), out.split(MOST_SEQUENCES), lse.split(MOST_SEQUENCES), strict=True
            )
            packed, sums = zip(*(_attention_backward(*part, pick) for part in parts), strict=True)
            return torch.cat(packed), torch.stack(sums).sum(0)
        return load_kernels(tile).backward(make_addressable(grad, 1), make_addressable(qkv, 1), out, lse, tile)
    return differentiate_on_cpu(grad, qkv, out, lse), lse.new_empty(0)


def differentiate_on_cpu(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The packed gradient by torch, for the results of `compute_on_cpu`."""
    if not qkv.numel():
        return fake_packed_gradient(qkv)
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        make_addressable(grad, 1).transpose(1, 2), *split_heads(make_addressable(qkv, 1)), out.transpose(1, 2), lse, 0.0, False
    )
    return torch.stack([part.transpose(1, 2) for part in parts], 2)


def fake_packed_gradient(qkv: Tensor) -> Tensor:
    """An empty gradient of `qkv`."""
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _fake_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return fake_packed_gradient(qkv), lse.new_empty((3, *qkv.shape[3:]) if _returns_sums(qkv) else 0)


def _returns_sums(qkv: Tensor) -> bool:
    """Whether the backward's kernel does: the short one for Hopper alone."""
    if not qkv.is_cuda:
        return False
    return choose_backend("attention_short_backward", qkv.shape[1], qkv.shape[4], qkv.device.index, qkv.dtype) == "hopper"


_attention_backward_op = register("attention_backward", _attention_backward, _fake_attention_backward)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For the backward pass, of packed sequences too."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], out, lse, *inputs[1:2])
    ctx.max_tokens = inputs[2:]


def _differentiate_attention(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    if grad is None:
        return None
    d_qkv, sums = _attention_backward_op(grad, *ctx.saved_tensors)
    return gradients.attach(d_qkv, sums=sums)


_attention_op = register("attention", _attention, fake_attention, save=save_attention, differentiate=_differentiate_attention)


def make_addressable(x: Tensor, token_axis: int) -> Tensor:
    """`x` as the kernels can read it: rows of adjacent elements, and offsets within a sequence that fit 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[token_axis:], x.stride()[token_axis:], strict=True))
    return x if x.stride(-1) == 1 and reach < 2**31 else x.contiguous()


def _pick_kernel(pick: Pick, direction: str, qkv: Tensor) -> Tile:
    """The row of the short kernel, or of the long one where that has none."""
    return pick_kernel(pick, (f"attention_short_{direction}", f"attention_long_{direction}"), qkv, qkv.shape[1])


def pick_kernel(pick: Pick, ops: tuple[str, ...], qkv: Tensor, tokens: int) -> Tile:
    """The row of the first of the `ops` that has a kernel. Raises ValueError when none has on a GPU."""
    features = qkv.shape[-1]
    tile = pick(ops, qkv, tokens=tokens, features=features, portable=features % 16 != 0)
    if qkv.is_cuda and tile.backend not in PACKAGES:
        raise ValueError(
            f"polyvit::attention has no kernel for {qkv.dtype} with head_dim {features}; polyvit_kernels.attention calls torch's"
        )
    return tile


def load_kernels(tile: Tile) -> ModuleType:
    """The module with the kernels of a row, which has the name of its operation without the direction."""
    return import_module(f"{PACKAGES[tile.backend]}.{tile.op.rpartition('_')[0]}")
