"""Who computes attention: our kernels, or a library through torch's scaled_dot_product_attention or xformers; and the calls of these."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvit_kernels import tiles
from polyvit_kernels.ops.attention import xformers

AttentionBackend = Literal["auto", "cudnn", "flash", "xformers"]
"""auto: as the tile table says for the size; else the library that computes it on a GPU: cuDNN, torch's FlashAttention, xformers."""

ALIGNMENT = 16
"""Bytes that the attention kernels of PyTorch's backends load at once, without a check of the address."""

_BACKENDS = get_args(AttentionBackend)
_PRIORITIES = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "torch": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def check_backend(backend: str, device: str) -> None:
    """Raises ValueError unless attention on a device of that type can be computed by `backend`."""
    if backend not in _BACKENDS:
        raise ValueError(f"attention by {backend!r} is unknown; there are: {', '.join(_BACKENDS)}")
    if backend != "auto" and device != "cuda":
        raise ValueError(f"attention by {backend} needs a GPU, but is to be computed on {device}; leave it auto")
    if backend == "xformers" and not torch.compiler.is_compiling():
        xformers.load()


def choose_backend(op: str, tokens: int, features: int, device: int, dtype: torch.dtype) -> str:
    """The backend that `tiles.pick` gives, in steps that torch.compile can follow when the sizes are symbols.

    A width that 16 does not divide, such as 72, is torch's: our kernels could not load its rows in large chunks, and would spill.
    """
    if features % 16:
        return "torch"
    for low, high, widest, backend in _limits(op, device, dtype):
        if low <= tokens <= high and features <= widest:
            return backend
    return "torch"


def _limits(op: str, device: int, dtype: torch.dtype) -> tuple[tuple[int, int, int, str], ...]:
    """(fewest tokens, most tokens, most features, backend) of the rows for a GPU and dtype whose package is installed."""
    rows = tiles.rows_for(op, torch.device("cuda", device), dtype)
    installed = [row for row in rows if row.backend != "xformers" or xformers.is_installed()]
    return tuple((*row.tokens, row.features, row.backend) for row in installed)


# torch.compile takes the result as a constant. This is the mark that torch.compiler.assume_constant_result sets; to call that would import
# the compiler and Triton with this module, which takes three seconds (torch 2.13). Not needed once it sets the mark without that import.
vars(_limits)["_dynamo_marked_constant"] = True


def library_attention(qkv: Tensor, backend: str) -> Tensor:
    """Attention by a library, where it has no kernel by another of torch's own (xformers raises NotImplementedError)."""
    if backend == "xformers":
        return xformers.xformers_attention(align(qkv))[0]
    with sdpa_kernel(_PRIORITIES[backend], set_priority=True):
        return functional.scaled_dot_product_attention(*split_heads(align(qkv))).transpose(1, 2)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `[batch, heads, tokens, head_dim]`."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return q, k, v


def align(x: Tensor) -> Tensor:
    """`x`, copied if an address in it is no multiple of `ALIGNMENT`: the libraries' kernels would fail there, and lose the CUDA context.

    A head_dim whose rows no copy can align is left as it is: those kernels do not take it.
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
