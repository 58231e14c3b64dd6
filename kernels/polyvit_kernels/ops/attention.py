"""Softmax attention of every token to all tokens of its sequence, on the packed projection that a linear layer gives."""

from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvit_kernels import tiles
from polyvit_kernels.ops import dtypes, gradients
from polyvit_kernels.ops import xformers_attention as xformers
from polyvit_kernels.ops.dtypes import check_floating, matmul_dtype
from polyvit_kernels.tiles import PACKAGES

AttentionBackend = Literal["auto", "cudnn", "flash", "xformers"]
"""auto: as the tile table says for the size; else the library that computes it on a GPU: cuDNN, torch's FlashAttention, xformers."""

MOST_SEQUENCES = 65_535
"""In one launch: what the third axis of a grid may have."""

ALIGNMENT = 16
"""Bytes: what the attention kernels of PyTorch's backends load at once, without looking at the address."""

_OPS = ("attention_short", "attention_long")
"""Of the tile table, the first choice first; their modules have the same names."""

_BACKENDS = get_args(AttentionBackend)
_PRIORITIES = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "torch": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def attention(
    qkv: Float[Tensor, "batch tokens 3 heads head_dim"], backend: AttentionBackend = "auto"
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Softmax attention of every token to all tokens of its example, scores divided by sqrt(head_dim) (arXiv 1706.03762, eq. 1).

    Any strides will do; the gradient is packed and contiguous. On a GPU, fp32 and a head_dim beyond 128 or that 16 does not divide are
    torch's, unless a `backend` is named; where cuDNN or FlashAttention has no kernel, another one of torch's takes its place, and xformers
    raises NotImplementedError. Raises ValueError for another shape or dtype, and for a backend that is not there.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but attention needs [batch, tokens, 3, heads, head_dim]")
    check_floating(qkv=qkv)
    qkv = qkv.to(matmul_dtype(qkv))
    if backend != "auto":
        check_backend(backend, qkv.device.type)
        return _library_attention(qkv, backend)
    if not dtypes.runs_registered(qkv):
        return functional.scaled_dot_product_attention(*_split(qkv)).transpose(1, 2)
    row = _route("attention", qkv.shape[1], qkv.shape[4], qkv.device.index, qkv.dtype) if qkv.is_cuda else "triton"
    if row != "triton":
        return _library_attention(qkv, row)
    return torch.ops.polyvit.attention(qkv)[0]


def attention_varlen(
    qkv: Float[Tensor, "total 3 heads head_dim"], cu_tokens: Int32[Tensor, " sequences_plus_1"], max_tokens: int
) -> Float[Tensor, "total heads head_dim"]:
    """`attention` within each of several sequences that lie one after the other.

    Sequence i holds the rows `cu_tokens[i]` to `cu_tokens[i + 1]`, none is longer than `max_tokens`, all rows belong to one: on a GPU
    the caller answers for that, as looking would wait for the device (in fp32, and with more than 128 features, that wait is there).
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
            f"cu_tokens tells of {len(cu_tokens) - 1} sequences, but at most {MOST_SEQUENCES} fit one call; make several calls"
        )
    check_floating(qkv=qkv)
    qkv = qkv.to(matmul_dtype(qkv))
    if qkv.is_cuda and _route("attention_long_forward", max_tokens, qkv.shape[3], qkv.device.index, qkv.dtype) not in PACKAGES:
        pieces = qkv.split(_lengths(qkv, cu_tokens, max_tokens))
        return torch.cat([attention(piece[None])[0] for piece in pieces]) if pieces else qkv.sum(1)
    return torch.ops.polyvit.attention_varlen(qkv, cu_tokens, max_tokens)[0]


def check_backend(backend: str, device: str) -> None:
    """Raises ValueError unless attention on a device of that type can be computed by `backend`."""
    if backend not in _BACKENDS:
        raise ValueError(f"attention by {backend!r} is unknown; there are: {', '.join(_BACKENDS)}")
    if backend != "auto" and device != "cuda":
        raise ValueError(f"attention by {backend} needs a GPU, but is to be computed on {device}; leave it auto")
    if backend == "xformers" and not torch.compiler.is_compiling():
        xformers.load()


def _route(op: str, tokens: int, features: int, device: int, dtype: torch.dtype) -> str:
    """The backend that `tiles.pick` gives, in steps that torch.compile can follow when the sizes are symbols.

    A width that 16 does not divide, 72 say, is torch's: the kernels could not load its rows in large pieces, and would spill.
    """
    if features % 16:
        return "torch"
    for low, high, widest, backend in _rows(op, device, dtype):
        if low <= tokens <= high and features <= widest:
            return backend
    return "torch"


def _rows(op: str, device: int, dtype: torch.dtype) -> tuple[tuple[int, int, int, str], ...]:
    """(fewest tokens, most tokens, most features, backend) of the rows for a card and dtype whose package is there."""
    rows = tiles.rows_for(op, torch.device("cuda", device), dtype)
    there = [row for row in rows if row.backend != "xformers" or xformers.is_installed()]
    return tuple((*row.tokens, row.features, row.backend) for row in there)


# The mark that torch.compiler.assume_constant_result makes; calling that would import the compiler with this module.
vars(_rows)["_dynamo_marked_constant"] = True


def _library_attention(qkv: Tensor, backend: str) -> Tensor:
    if backend == "xformers":
        return xformers.xformers_attention(_aligned(qkv))[0]
    with sdpa_kernel(_PRIORITIES[backend], set_priority=True):
        return functional.scaled_dot_product_attention(*_split(_aligned(qkv))).transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied where an address in it is no multiple of `ALIGNMENT`: the libraries' kernels would read there, and lose the CUDA context.

    They leave a head_dim alone whose rows no copy can align.
    """
    if x.shape[-1] * x.itemsize % ALIGNMENT:
        return x
    steps = [stride * x.itemsize for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if _starts_aligned(x) and x.stride(-1) == 1 and all(step % ALIGNMENT == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _starts_aligned(x: Tensor) -> bool:
    """Whether its address is a multiple of `ALIGNMENT`. The compiler cannot follow that, and aligns the inputs of a graph itself."""
    if torch.compiler.is_compiling():
        return True
    try:
        return x.data_ptr() % ALIGNMENT == 0
    except RuntimeError:  # torch.func's tensors and those of a trace have no address
        return True


@torch.library.custom_op("polyvit::attention", mutates_args=(), device_types="cpu")
def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum of every query's exponentials `[batch, heads, tokens]`); the logarithm's base is the device's own affair."""
    if not qkv.numel():
        return _empty_like_out(qkv)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_split(_addressable(qkv, 1)))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@_attention.register_kernel("cuda")
def _attention_on_cuda(qkv: Tensor) -> tuple[Tensor, Tensor]:
    if len(qkv) > MOST_SEQUENCES:
        outs, sums = zip(*map(_attention_on_cuda, qkv.split(MOST_SEQUENCES)), strict=True)
        return torch.cat(outs), torch.cat(sums)
    qkv = _addressable(qkv, 1)
    kernels, tile = _kernels("forward", qkv)
    with torch.cuda.device_of(qkv):
        return kernels.forward(qkv, tile)


@_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like_out(qkv)


@torch.library.custom_op("polyvit::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(the packed gradient, its sums over batch and tokens `[3, heads, head_dim]`), the latter empty where no kernel gives them."""
    if not qkv.numel():
        return _empty_packed(qkv), lse.new_empty(0)
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _addressable(grad, 1).transpose(1, 2), *_split(_addressable(qkv, 1)), out.transpose(1, 2), lse, 0.0, False
    )
    return torch.stack([part.transpose(1, 2) for part in parts], 2), lse.new_empty(0)


@_attention_backward.register_kernel("cuda")
def _attention_backward_on_cuda(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    if len(qkv) > MOST_SEQUENCES:
        pieces = zip(*(tensor.split(MOST_SEQUENCES) for tensor in (grad, qkv, out, lse)), strict=True)
        packed, sums = zip(*(_attention_backward_on_cuda(*piece) for piece in pieces), strict=True)
        return torch.cat(packed), torch.stack(sums).sum(0)
    qkv = _addressable(qkv, 1)
    kernels, tile = _kernels("backward", qkv)
    with torch.cuda.device_of(qkv):
        return kernels.backward(_addressable(grad, 1), qkv, out, lse, tile)


@_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_packed(qkv), lse.new_empty((3, *qkv.shape[3:]) if _gives_sums(qkv) else 0)


def _gives_sums(qkv: Tensor) -> bool:
    """Whether the kernel of `_kernels` does: the short one for Hopper alone."""
    return qkv.is_cuda and _route("attention_short_backward", qkv.shape[1], qkv.shape[4], qkv.device.index, qkv.dtype) == "hopper"


@torch.library.custom_op("polyvit::attention_varlen", mutates_args=(), device_types="cpu")
def _attention_varlen(qkv: Tensor, cu_tokens: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """(out, log-sums `[heads, total]`)."""
    pieces = [_attention(piece[None]) for piece in qkv.split(_lengths(qkv, cu_tokens, max_tokens))]
    outs, sums = [out[0] for out, _ in pieces], [lse[0] for _, lse in pieces]
    return (torch.cat(outs), torch.cat(sums, 1)) if pieces else _empty_like_out(qkv)


@_attention_varlen.register_kernel("cuda")
def _(qkv: Tensor, cu_tokens: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    kernels, tile = _packed_kernels("forward", qkv, max_tokens)
    with torch.cuda.device_of(qkv):
        return kernels.forward(_addressable(qkv, 0), tile, cu_tokens.contiguous(), max_tokens)


@_attention_varlen.register_fake
def _(qkv: Tensor, cu_tokens: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    return _empty_like_out(qkv)


@torch.library.custom_op("polyvit::attention_varlen_backward", mutates_args=(), device_types="cpu")
def _attention_varlen_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_tokens: Tensor, max_tokens: int) -> Tensor:
    lengths = _lengths(qkv, cu_tokens, max_tokens)
    rows = zip(*(tensor.split(lengths) for tensor in (grad, qkv, out)), lse.split(lengths, 1), strict=True)
    pieces = [_attention_backward(*(tensor[None] for tensor in row))[0][0] for row in rows]
    return torch.cat(pieces) if pieces else _empty_packed(qkv)


@_attention_varlen_backward.register_kernel("cuda")
def _(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_tokens: Tensor, max_tokens: int) -> Tensor:
    kernels, tile = _packed_kernels("backward", qkv, max_tokens)
    with torch.cuda.device_of(qkv):
        return kernels.backward(_addressable(grad, 0), _addressable(qkv, 0), out, lse, tile, cu_tokens.contiguous(), max_tokens)[0]


@_attention_varlen_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_tokens: Tensor, max_tokens: int) -> Tensor:
    return _empty_packed(qkv)


def _keep(ctx, inputs, output) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], out, lse, *inputs[1:2])
    ctx.max_tokens = inputs[2:]


def _differentiate(ctx, grad: Tensor | None, _: None) -> Tensor | None:
    if grad is None:
        return None
    dqkv, sums = torch.ops.polyvit.attention_backward(grad, *ctx.saved_tensors)
    return gradients.attach(dqkv, sums=sums)


def _differentiate_varlen(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    return grad if grad is None else torch.ops.polyvit.attention_varlen_backward(grad, *ctx.saved_tensors, *ctx.max_tokens), None, None


_attention.register_autograd(_differentiate, setup_context=_keep)
_attention_varlen.register_autograd(_differentiate_varlen, setup_context=_keep)


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `[batch, heads, tokens, head_dim]`."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return q, k, v


def _empty_like_out(qkv: Tensor) -> tuple[Tensor, Tensor]:
    *batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(*batch, tokens, heads, head_dim), qkv.new_empty(*batch, heads, tokens, dtype=_sum_dtype(qkv))


def _sum_dtype(qkv: Tensor) -> torch.dtype:
    return torch.promote_types(qkv.dtype, torch.float32)


def _empty_packed(qkv: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _lengths(qkv: Tensor, cu_tokens: Tensor, max_tokens: int) -> list[int]:
    lengths = cu_tokens.diff().tolist()
    if cu_tokens[0] != 0 or cu_tokens[-1] != len(qkv) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_tokens must rise from 0 to the {len(qkv)} rows of qkv, but is {cu_tokens.tolist()}")
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"a sequence has {max(lengths)} tokens, more than max_tokens = {max_tokens}")
    return lengths


def _addressable(x: Tensor, token_axis: int) -> Tensor:
    """`x` as the kernels can read it: rows of adjacent elements, and offsets within a sequence that fit 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[token_axis:], x.stride()[token_axis:], strict=True))
    return x if x.stride(-1) == 1 and reach < 2**31 else x.contiguous()


def _kernels(direction: str, qkv: Tensor) -> tuple[ModuleType, tiles.Tile]:
    tokens, features = qkv.shape[1], qkv.shape[4]
    for op in _OPS:
        tile = tiles.pick_for(f"{op}_{direction}", qkv, tokens=tokens, features=features, portable=features % 16 != 0)
        if tile.backend in PACKAGES:
            return import_module(f"{PACKAGES[tile.backend]}.{op}"), tile
    raise ValueError(
        f"polyvit::attention has no kernel for {qkv.dtype} with head_dim {qkv.shape[4]}; polyvit_kernels.attention calls torch's"
    )


def _packed_kernels(direction: str, qkv: Tensor, max_tokens: int) -> tuple[ModuleType, tiles.Tile]:
    features = qkv.shape[3]
    op, portable = f"attention_long_{direction}", features % 16 != 0
    tile = tiles.pick_for(op, qkv, tokens=max(max_tokens, 1), features=features, portable=portable)
    return import_module(f"{PACKAGES[tile.backend]}.attention_long"), tile
