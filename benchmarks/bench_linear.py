"""Linear layers with what follows them in the same kernel, each way, against cuBLAS's product alone and torch's operators in turn.

Run: pytest benchmarks/bench_linear.py. The forward is a training step's: with GELU it keeps GELU's slope.
"""

from functools import partial

import compare
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, OURS, Candidate, Problem, group_params
from machine import DEVICE, DTYPE, HAS_GPU
from torch import Tensor
from torch.nn import functional

import polyvit_kernels
from polyvit_kernels import reference

ROWS, DIM, HIDDEN = (50_432, 768, 3072) if HAS_GPU else (394, 64, 256)  # ViT-B/16 on 256 images
SAMPLE = 1_500  # rows that are held to the truth: as many as take the same row of the tile table
PRODUCT = "product alone"
# (columns of the input and of the output, dtype of the residual)
ADDITIONS = {
    f"{name} + {words} residual": (depth, DIM, dtype)
    for name, depth in (("fc2", HIDDEN), ("proj", DIM))
    for words, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if HAS_GPU or dtype is DTYPE
}


def our_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return polyvit_kernels.linear_gelu(x, weight, bias, "erf")


def eager_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(functional.linear(x, weight, bias))


def true_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.gelu(reference.linear(x, weight, bias), "erf")


def eager_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return functional.linear(x, weight, bias) + residual


def product(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    return x @ weight.t()


def gelu_of(name: str) -> Problem:
    # In: x, the weight; out: GELU and its slope. Backward in: dy, the slope, x, the weight; out: dx, dw.
    return _problem(name, DIM, HIDDEN, None, (our_gelu, eager_gelu, true_gelu), forward=2 * DTYPE.itemsize, backward=2 * DTYPE.itemsize)


def add_of(name: str) -> Problem:
    depth, columns, residual = ADDITIONS[name]
    # In: x, the weight, the residual; out: the sum. Backward in: dy, x, the weight; out: dx, dw; the residual's gradient is dy.
    forms = (polyvit_kernels.linear_add, eager_add, reference.linear_add)
    return _problem(name, depth, columns, residual, forms, forward=2 * residual.itemsize, backward=residual.itemsize)


def _problem(name: str, depth: int, columns: int, residual: torch.dtype | None, forms, *, forward: int, backward: int) -> Problem:
    """`forward` and `backward` are bytes that are moved for each element of the output."""
    inputs = {
        "x": torch.randn(ROWS, depth, device=DEVICE, dtype=DTYPE),
        "weight": torch.randn(columns, depth, device=DEVICE, dtype=DTYPE) / depth**0.5,
        "bias": torch.randn(columns, device=DEVICE, dtype=DTYPE),
    }
    if residual is not None:
        inputs["residual"] = torch.randn(ROWS, columns, device=DEVICE, dtype=residual)
    sample = {name: tensor[:SAMPLE] if name in ("x", "residual") else tensor for name, tensor in inputs.items()}
    ours, eager, _ = forms
    layer = inputs["x"].nbytes + inputs["weight"].nbytes
    return Problem(
        title=f"{name} {ROWS}×{depth}→{columns}",
        inputs=inputs,
        check=partial(compare.assert_as_exact_as_torch, *forms, sample, DTYPE),
        candidates={
            OURS: Candidate(operation=ours),
            EAGER: Candidate(operation=eager),
            PRODUCT: Candidate(operation=torch.no_grad()(product), directions=(FORWARD,), comparable=False),
        },
        num_bytes={FORWARD: layer + forward * ROWS * columns, BACKWARD: 2 * layer + backward * ROWS * columns},
        amount=ROWS,
        unit="rows",
    )


@pytest.mark.parametrize("candidate", [OURS, EAGER, PRODUCT])
@pytest.mark.parametrize("group", [*group_params(gelu_of, ["fc1 + GELU"]), *group_params(add_of, list(ADDITIONS))], indirect=True)
def test_linear(group, candidate, benchmark):
    group.enter(candidate, benchmark)
