"""What a GPU would launch, listed where there is none: on meta tensors, by the operators and kernels that are called."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from capturable import on_meta as on_meta  # a fixture
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from polyvit_kernels.ops import dtypes, weights

SILENT = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "view", "_unsafe_view"),
    *(
        "as_strided",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
    ),
}
"""Operators that give a view, or memory in which nothing is yet."""

PRODUCTS = {"addmm", "mm", "bmm", "baddbmm"}


class Launch(NamedTuple):
    """A kernel of ours, or one of torch's operators (which launches one kernel, seldom more), and the tensors that it meets."""

    name: str
    ours: bool
    tensors: list[Tensor]
    """Arguments, then results."""

    @property
    def num_bytes(self) -> int:
        """What it moves, if it meets each tensor once."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((tensor.numel() for tensor in self.tensors), default=0)


class Launches(TorchDispatchMode):
    """Inside, all launches are appended to `found`, those within our operations too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[Launch] = []
        for kind in (JITFunction, InterpretedFunction):
            monkeypatch.setattr(kind, "run", self._following(kind.run))

    def _following(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
            self.found.append(Launch(kernel.__name__, True, [tensor for tensor in tensors if isinstance(tensor, Tensor)]))
            return run(kernel, *args, **kwargs)

        return launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "polyvit":
            with self:
                return OPDEFS[func._schema.name]._backend_fns["cuda"](*args, **(kwargs or {}))
        with self:  # what torch's own operators are made of
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        if name not in SILENT:
            self.found.append(Launch(name, False, [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]))
        return out


@pytest.fixture
def h100_on_meta(monkeypatch, on_meta):
    """As on an H100, and for what our operations ask as under autocast in bf16, of which torch's autocast on meta tensors knows nothing."""
    for module in (dtypes, weights):
        monkeypatch.setattr(module, "is_autocast_on", lambda x: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(dtypes, "without_autocast", lambda x: nullcontext())
