"""What `fuse` makes of other libraries' modules: norms, attention, MLPs and blocks, as values for one call, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from polyvit_kernels.ops import AttentionBackend, Gelu


class Drop(NamedTuple):
    """The chance with which values are dropped, and whether that happens now."""

    rate: float
    training: bool


class Norm(NamedTuple):
    """layer_norm(x)."""

    weight: Tensor
    bias: Tensor
    eps: float
    drops: tuple[Drop, ...] = ()


class Attention(NamedTuple):
    """proj(attention(pack(x, shape))), where pack gives queries, keys and values in the shape that attention takes.

    With `gives_pair` the module's own `forward` returns the attention's weights, or None, beside it.
    """

    pack: Callable[[Tensor, tuple[int, ...]], Tensor]
    num_heads: int
    proj: nn.Module
    gives_pair: bool
    drops: tuple[Drop, ...]
    backend: AttentionBackend = "auto"


class Mlp(NamedTuple):
    """fc2(gelu(fc1(x)))."""

    fc1: nn.Linear
    fc2: nn.Linear
    gelu: Gelu
    drops: tuple[Drop, ...] = ()


class Block(NamedTuple):
    """x + attention(norm1(x)), and to that what mlp(norm2(·)) gives of it.

    `drop_paths`: modules that multiply each example of the one and the other branch by a factor that they draw; None where that is 1.
    """

    norm1: Norm
    attention: Attention
    norm2: Norm
    mlp: Mlp
    drops: tuple[Drop, ...]
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None)


Part = Norm | Attention | Mlp | Block


def _no_note(_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Row:
    """What a foreign class is to us; the functions take one of its objects."""

    kind: type[Part]
    unknown: Callable[[Any], str]
    """Why the object, as it was built, cannot be computed here; empty when it can."""
    unfit: Callable[[Any], str]
    """The same of what may change between calls: the kinds of its parts and their hooks."""
    read: Callable[[Any], Part]
    """What to compute, of an object that is fit."""
    sole_input: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
    """The one tensor that a call is about; None when the call asks for more than the part's plain value."""
    rotary: bool = False
    """Whether it is given rotary positions in models that have them."""
    note: Callable[[Any], str] = _no_note
    """When, beside dropout, the object's own `forward` still runs; empty when it does not."""


MARK = "_polyvit_fused"
"""The attribute of a module whose `forward` `fuse` replaced, whatever has become of that `forward` since."""


def fused_row(module: nn.Module) -> Row | None:
    """The row by which `fuse` replaced the `forward` of this object; None when it did not."""
    forward = module.__dict__.get("forward")
    return forward.args[1] if isinstance(forward, partial) and len(forward.args) == 2 and isinstance(forward.args[1], Row) else None


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """The model with all its own `forward`s, for the time being."""
    fused = {module: module.__dict__.pop("forward") for module in model.modules() if fused_row(module)}
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.__dict__["forward"] = forward


def full_name(thing: object) -> str:
    """Module and name of the class of `thing`."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
