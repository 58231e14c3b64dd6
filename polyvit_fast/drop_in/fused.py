"""Which modules `fuse` has changed, and what they compute as members of a module that is computed whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from polyvit_fast.drop_in.parts import Adapter
from polyvit_kernels.layers import has_hooks

MARK = "_polyvit_fused"
"""The attribute of a module whose `forward` `fuse` replaced, whatever has become of that `forward` since."""


def fused_adapter(module: nn.Module) -> Adapter | None:
    """The adapter by which `fuse` replaced the `forward` of this object; None when it did not."""
    forward = module.__dict__.get("forward")
    return forward.args[1] if isinstance(forward, partial) and len(forward.args) == 2 and isinstance(forward.args[1], Adapter) else None


def unfit_member(module: nn.Module, name: str, kind: type) -> str:
    """Why the member `name` of a module that is computed whole is no part of that kind which can be computed with it."""
    adapter = fused_adapter(module)
    if adapter is None or adapter.kind is not kind:
        return f"{name}: {type(module).__name__} is left"
    reason = "it has hooks" if has_hooks(module) else adapter.unfit(module)
    return f"{name}: {reason}" if reason else ""


def read_member(module: nn.Module) -> Any:
    """The part of a member that is fit."""
    adapter: Any = fused_adapter(module)
    return adapter.read(module)


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Inside, all modules of `model` have their own `forward`."""
    fused = {module: module.__dict__.pop("forward") for module in model.modules() if fused_adapter(module)}
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.__dict__["forward"] = forward
