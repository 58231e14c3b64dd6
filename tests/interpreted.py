"""The public operations as on a GPU where there is none."""

import pytest
import torch
from compare import DEVICE
from torch._library.custom_ops import OPDEFS

from polyvit_kernels import tiles
from polyvit_kernels.ops import dtypes


@pytest.fixture
def registered(monkeypatch):
    """The public operations call what is registered with torch.library, on a CPU too."""
    monkeypatch.setattr(dtypes, "runs_registered", lambda x: True)


@pytest.fixture
def on_kernels(monkeypatch, registered):
    """The public operations as on a GPU: what is registered for CUDA runs, here in Triton's interpreter with an H100's portable rows.

    The interpreter multiplies no bf16, so tensors are fp32 and take the rows of bf16. It does not run Gluon.
    """
    if DEVICE.type == "cuda":
        return
    choose_an_h100s_rows(monkeypatch, portable=True)
    for name, operation in OPDEFS.items():
        if name.startswith("polyvit::"):
            monkeypatch.setitem(operation._backend_fns, "cpu", operation._backend_fns["cuda"])


def choose_an_h100s_rows(monkeypatch, *, portable: bool) -> None:
    """For fp32, where there are none, bf16's portable ones; with `portable`, Hopper's own kernels are passed over for every dtype."""
    real = tiles.pick

    def pick(op, arch, dtype, **sizes):
        sizes["portable"] = portable or sizes.get("portable", False)
        row = real(op, arch, dtype, **sizes)
        if row.backend == "torch" and dtype is torch.float32:
            return real(op, arch, torch.bfloat16, **sizes | {"portable": True})
        return row

    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(tiles, "pick", pick)
