"""Which modules `fuse` has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from polyvit_fast.drop_in.parts import Adapter

MARK = "_polyvit_fused"
"""The attribute of a module whose `forward` `fuse` replaced, whatever has become of that `forward` since."""


def fused_adapter(module: nn.Module) -> Adapter | None:
    """The adapter by which `fuse` replaced the `forward` of this object; None when it did not."""
    forward = module.__dict__.get("forward")
    return forward.args[1] if isinstance(forward, partial) and len(forward.args) == 2 and isinstance(forward.args[1], Adapter) else None


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Inside, all modules of `model` have their own `forward`."""
    fused = {module: module.__dict__.pop("forward") for module in model.modules() if fused_adapter(module)}
    try:
        yield
    finally:
        for module, forward in fused.items():
            module.__dict__["forward"] = forward
