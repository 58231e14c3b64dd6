"""Fixtures that run the public operations as on a GPU, where there is none."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from compare import DEVICE
from gluon_executor import executing
from torch._library.custom_ops import OPDEFS
from triton.runtime import interpreter

from polyvit_kernels import tiles
from polyvit_kernels.hopper import linear as hopper_linear
from polyvit_kernels.ops import dtypes
from polyvit_kernels.tiles import lookup
from polyvit_kernels.triton_kernels import linear

ENOUGH_ROWS = 2048
"""Enough for the table to choose Hopper's linear layer; the kernels must be right for fewer too."""


@pytest.fixture
def patched_once(monkeypatch):
    """Triton's interpreter replaces the functions of `triton.language` once in a launch, not again in each call of a device function.

    That would change nothing, but take a third of the time.
    """
    patched, patch, run = set(), interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.cache
    def modules_of(function: Callable) -> frozenset:
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    def patch_once(function: Callable) -> Any:
        modules = modules_of(function)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(function)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def registered(monkeypatch):
    """The public operations call what is registered with torch.library on a CPU too."""
    monkeypatch.setattr(dtypes, "runs_registered", lambda x: True)


@pytest.fixture
def on_kernels(monkeypatch, registered, patched_once):
    """The public operations as on a GPU: what is registered for CUDA runs in Triton's interpreter, with an H100's portable tiles.

    The interpreter cannot multiply bf16, so tensors are fp32 and take bf16's tiles. It does not run Gluon.
    """
    if DEVICE.type == "cuda":
        return
    choose_an_h100s_rows(monkeypatch, portable=True)
    _run_as_on_cuda(monkeypatch, lambda name: True)


@pytest.fixture
def on_hopper(monkeypatch, registered):
    """Attention and linear layers as on an H100, by the kernels for Hopper alone, executed on the CPU. Norms are torch's there."""
    if DEVICE.type == "cuda":
        if tiles.architecture(DEVICE) != 90:
            pytest.skip("these kernels run on compute capability 9.0 alone")
        yield
        return
    choose_an_h100s_rows(monkeypatch, portable=False)
    pick = lookup.pick

    def pick_hoppers(op, arch, dtype, **sizes):
        row = pick(op, arch, dtype, **sizes)
        return row if row.backend == "hopper" else pick(op, arch, dtype, **sizes | {"tokens": ENOUGH_ROWS})

    monkeypatch.setattr(lookup, "pick", pick_hoppers)
    _run_as_on_cuda(monkeypatch, lambda name: "norm" not in name)
    monkeypatch.setattr(hopper_linear, "num_sms", lambda device: 3)
    # The last sums are a portable kernel's, and Triton's interpreter truncates to bf16 instead of rounding.
    monkeypatch.setattr(linear, "sum_partials", lambda partials, dtype: partials.sum(0).to(dtype))
    with executing() as report:
        yield
    assert report.products


def _run_as_on_cuda(monkeypatch, chooses: Callable[[str], bool]) -> None:
    for name, operation in OPDEFS.items():
        if name.startswith("polyvit::") and chooses(name):
            monkeypatch.setitem(operation._backend_fns, "cpu", operation._backend_fns["cuda"])


def choose_an_h100s_rows(monkeypatch, *, portable: bool) -> None:
    """An H100's tiles; fp32, which has none, takes bf16's portable ones. With `portable`, no dtype takes Hopper's own kernels."""
    real = lookup.pick

    def pick(op, arch, dtype, **sizes):
        sizes["portable"] = portable or sizes.get("portable", False)
        row = real(op, arch, dtype, **sizes)
        if row.backend == "torch" and dtype is torch.float32:
            return real(op, arch, torch.bfloat16, **sizes | {"portable": True})
        return row

    monkeypatch.setattr(lookup, "architecture", lambda device: 90)
    monkeypatch.setattr(lookup, "pick", pick)
