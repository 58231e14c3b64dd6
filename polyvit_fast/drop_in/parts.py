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
from polyvit_kernels.layers import add_linear, is_plain
from polyvit_kernels.ops.dtypes import matmul_dtype
from polyvit_kernels.ops.gradients import expand_factors


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

    Without `proj` nothing follows attention. With `gives_pair` the module's own `forward` returns a second value, the attention's weights
    or None. `linears` are the layers whose products `pack` makes as one, if the module has several; `head_norms` normalise each head's
    queries and keys.
    """

    pack: Callable[[Tensor, tuple[int, ...]], Tensor]
    num_heads: int
    head_dim: int
    proj: nn.Module | None
    gives_pair: bool
    drops: tuple[Drop, ...]
    backend: ops.AttentionBackend = "auto"
    head_norms: tuple[NormPart, NormPart] | None = None
    linears: tuple[Any, ...] = ()


class MlpPart(NamedTuple):
    """fc2(gelu(fc1(x)))."""

    fc1: nn.Linear
    fc2: nn.Linear
    gelu: ops.Gelu
    drops: tuple[Drop, ...] = ()


class BlockPart(NamedTuple):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    `drop_paths`: modules that multiply each example of the first and of the second branch by a factor that they draw; None where that is 1.
    `scales`: what each feature of the branches is multiplied by (LayerScale, arXiv 2103.17239); None where that is 1.
    """

    norm1: NormPart
    attention: AttentionPart
    norm2: NormPart
    mlp: MlpPart
    drops: tuple[Drop, ...]
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)


Part = NormPart | AttentionPart | MlpPart | BlockPart

# Functions, not methods of the parts: torch.compile cannot follow a decorated method of a named tuple that is made while it traces.


def accepts(part: Part, x: Tensor) -> bool:
    """Whether `compute` gives what torch would: no rule for mixed dtypes is needed, and there are a batch and tokens to attend to."""
    if isinstance(part, NormPart):
        return x.dtype is part.weight.dtype and (x.dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
    if isinstance(part, BlockPart):
        scales = all(scale is None or scale.dtype is x.dtype for scale in part.scales)
        return scales and (accepts(part.norm1, x) or _is_rounded(x, part.norm1)) and accepts(part.attention, x)
    if isinstance(part, AttentionPart):
        # Under autocast torch normalises heads in fp32, whatever their dtype, and rounds the result.
        norms = part.head_norms is None or torch.is_autocast_enabled(x.device.type) or part.head_norms[0].weight.dtype is x.dtype
        return norms and x.ndim == 3
    return True


def _is_rounded(x: Tensor, norm: NormPart) -> bool:
    """Whether autocast has rounded the residual stream, as it does VideoMAE's: norms read it in fp32, and sums have its dtype."""
    device = x.device.type
    rounded = torch.is_autocast_enabled(device) and x.dtype is torch.get_autocast_dtype(device)
    return rounded and norm.weight.dtype is torch.float32


def compute(part: Part, x: Tensor) -> Any:
    """What the module from which `part` was read returns."""
    if isinstance(part, NormPart):
        return ops.layer_norm(x, part.weight, part.bias, part.eps)
    if isinstance(part, AttentionPart):
        y = _mix(part, x)
        y = y if part.proj is None else part.proj(y)
        return (y, None) if part.gives_pair else y
    return add_mlp(part, x) if isinstance(part, MlpPart) else _compute_block(part, x)


def add_attention(part: AttentionPart, x: Tensor, residual: Tensor, factors: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """`residual` plus what attention gives of x, each example multiplied by its one of `factors`, each feature by `scale`, if given."""
    mixed, proj = _mix(part, x), part.proj
    if scale is None:
        return add_linear(proj, mixed, residual, factors)
    if is_plain(proj) and _can_fold(x):
        return ops.linear_add(mixed, *_fold(proj, scale), residual, factors)
    return _add_scaled(residual, add_linear(proj, mixed), factors, scale)


def add_mlp(part: MlpPart, x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`residual` plus what the MLP gives of x, each example multiplied by its one of `factors`, each feature by `scale`, if given."""
    if residual is not None and scale is not None and not _can_fold(x):
        return _add_scaled(residual, add_mlp(part, x), factors, scale)
    weight, bias = (part.fc2.weight, part.fc2.bias) if scale is None else _fold(part.fc2, scale)
    return ops.mlp(x, part.fc1.weight, part.fc1.bias, weight, bias, part.gelu, residual, factors)


def _can_fold(x: Tensor) -> bool:
    """Whether weights in x's dtype can be multiplied by small numbers: fp16 has none below 6e-8, and LayerScale begins with 1e-5."""
    return x.dtype is not torch.float16


def _fold(linear: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that give scale · linear(x): a pass over the weight, which is smaller than the tokens."""
    return scale[:, None] * linear.weight, scale * linear.bias


def _add_scaled(residual: Tensor, branch: Tensor, factors: Tensor | None, scale: Tensor) -> Tensor:
    scale = scale if factors is None else expand_factors(factors, branch) * scale
    return torch.addcmul(residual, branch, scale).to(torch.promote_types(residual.dtype, branch.dtype))


def _mix(part: AttentionPart, x: Tensor) -> Tensor:
    """The weighted means of the values, before they are projected."""
    qkv = part.pack(x, (3, part.num_heads, -1))
    if part.head_norms:
        q, k, v = qkv.unbind(2)
        q, k = (ops.layer_norm(part, n.weight, n.bias, n.eps, v.dtype) for part, n in zip((q, k), part.head_norms, strict=True))
        qkv = torch.stack([q, k, v], 2)
    return ops.attention(qkv, part.backend).flatten(2)


def _compute_block(part: BlockPart, x: Tensor) -> Tensor:
    first, second = (None if path is None else _draw_factors(path, x) for path in part.drop_paths)
    attn = partial(add_attention, part.attention, scale=part.scales[0])
    mlp = partial(add_mlp, part.mlp, scale=part.scales[1])
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
