"""What `fuse` computes in other libraries' modules: norms, attention, MLPs and blocks, read from a module for one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyvit_kernels import ops
from polyvit_kernels.block import pre_norm_block
from polyvit_kernels.layers import add_linear
from polyvit_kernels.ops.dtypes import matmul_dtype


class Drop(NamedTuple):
    """The probability with which values are dropped, and whether that happens now."""

    rate: float
    training: bool


class NormPart(NamedTuple):
    """layer_norm(x)."""

    weight: Tensor
    bias: Tensor
    eps: float
    drops: tuple[Drop, ...] = ()


class AttentionPart(NamedTuple):
    """proj(attention(pack(x, shape))), where pack gives queries, keys and values in the shape that attention takes.

    With `gives_pair` the module's own `forward` returns a second value, the attention's weights or None.
    """

    pack: Callable[[Tensor, tuple[int, ...]], Tensor]
    num_heads: int
    proj: nn.Module
    gives_pair: bool
    drops: tuple[Drop, ...]
    backend: ops.AttentionBackend = "auto"


class MlpPart(NamedTuple):
    """fc2(gelu(fc1(x)))."""

    fc1: nn.Linear
    fc2: nn.Linear
    gelu: ops.Gelu
    drops: tuple[Drop, ...] = ()


class BlockPart(NamedTuple):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    `drop_paths`: modules that multiply each example of the first and of the second branch by a factor that they draw; None where that is 1.
    """

    norm1: NormPart
    attention: AttentionPart
    norm2: NormPart
    mlp: MlpPart
    drops: tuple[Drop, ...]
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None)


Part = NormPart | AttentionPart | MlpPart | BlockPart

# Functions, not methods of the parts: torch.compile cannot follow a decorated method of a named tuple that is made while it traces.


def accepts(part: Part, x: Tensor) -> bool:
    """Whether `compute` gives what torch would: no rule for mixed dtypes is needed, and there are a batch and tokens to attend to."""
    if isinstance(part, NormPart):
        return x.dtype is part.weight.dtype and (x.dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
    if isinstance(part, BlockPart):
        return x.ndim == 3 and accepts(part.norm1, x)
    return isinstance(part, MlpPart) or x.ndim == 3


def compute(part: Part, x: Tensor) -> Any:
    """What the module from which `part` was read returns."""
    if isinstance(part, NormPart):
        return ops.layer_norm(x, part.weight, part.bias, part.eps)
    if isinstance(part, AttentionPart):
        y = part.proj(_mix(part, x))
        return (y, None) if part.gives_pair else y
    return add_mlp(part, x) if isinstance(part, MlpPart) else _compute_block(part, x)


def add_attention(part: AttentionPart, x: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    """`residual` plus what attention gives of x, each example multiplied by its one of `factors` if there are any."""
    return add_linear(part.proj, _mix(part, x), residual, factors)


def add_mlp(part: MlpPart, x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """`residual` plus what the MLP gives of x, each example multiplied by its one of `factors` if there are any."""
    return ops.mlp(x, part.fc1.weight, part.fc1.bias, part.fc2.weight, part.fc2.bias, part.gelu, residual, factors)


def _mix(part: AttentionPart, x: Tensor) -> Tensor:
    """The weighted means of the values, before they are projected."""
    return ops.attention(part.pack(x, (3, part.num_heads, -1)), part.backend).flatten(2)


def _compute_block(part: BlockPart, x: Tensor) -> Tensor:
    first, second = (None if path is None else _draw_factors(path, x) for path in part.drop_paths)
    attn, mlp = partial(add_attention, part.attention), partial(add_mlp, part.mlp)
    return pre_norm_block(x, part.norm1, attn, part.norm2, mlp, first, second)


def _draw_factors(drop_path: nn.Module, x: Tensor) -> Tensor:
    """What drop path multiplies the examples of a branch by, drawn and rounded by the module itself."""
    ones = torch.ones(len(x), 1, 1, dtype=matmul_dtype(x), device=x.device)
    return drop_path(ones).flatten().to(torch.promote_types(x.dtype, torch.float32))


def _no_note(_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Adapter:
    """How the modules of a foreign class are read; the functions take one of its modules."""

    kind: type[Part]
    unknown: Callable[[Any], str]
    """Why the module, as it was built, cannot be computed here; empty when it can."""
    unfit: Callable[[Any], str]
    """The same of what may change between calls: the classes of its members and their hooks."""
    read: Callable[[Any], Part]
    """What to compute, of a module that is fit."""
    sole_input: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
    """The one tensor that a call is about; None when the call asks for more than the plain value."""
    rotary: bool = False
    """Whether it is given rotary positions in models that have them."""
    note: Callable[[Any], str] = _no_note
    """When, apart from dropout, the module's own `forward` still runs; empty when it does not."""
