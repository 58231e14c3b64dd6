"""The MLP of a block with the exact GELU, each way, without and with the residual, against compilers and cuBLASLt's fused GELU.

Run: pytest benchmarks/bench_mlp.py. The forward is a training step's: it keeps what the backward needs.
"""

from collections.abc import Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, OURS, Candidate, Inputs, Problem, group_params
from machine import DEVICE, DTYPE, HAS_GPU
from torch import Tensor
from torch.nn import functional

import polyvit_kernels
from polyvit_kernels import reference

# (rows, dim, hidden): ViT-B/16 on 128 images; ViT-S/16 on 256.
SHAPES = [(25_216, 768, 3072), (50_432, 384, 1536)] if HAS_GPU else [(394, 64, 256)]
SAMPLE = 2_000  # rows that are held to the truth: as many as take the same row of the tile table, the last tile in part


def eager_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = functional.linear(functional.gelu(functional.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return y if residual is None else residual + y


def our_mlp(**inputs: Tensor) -> Tensor:
    return polyvit_kernels.mlp(gelu="erf", **inputs)


def true_mlp(**inputs: Tensor) -> Tensor:
    return reference.mlp(kind="erf", **inputs)


def mlp_of(shape: Sequence[int]) -> Problem:
    return _problem(shape, {})


def mlp_with_residual_of(shape: Sequence[int]) -> Problem:
    rows, dim, _ = shape
    return _problem(shape, {"residual": torch.randn(rows, dim, device=DEVICE, dtype=DTYPE)})


def _problem(shape: Sequence[int], residual: Inputs) -> Problem:
    rows, dim, hidden = shape
    sizes = {"x": (rows, dim), "fc1_weight": (hidden, dim), "fc1_bias": (hidden,), "fc2_weight": (dim, hidden), "fc2_bias": (dim,)}
    inputs = {name: torch.randn(size, device=DEVICE, dtype=DTYPE) / size[-1] ** 0.5 for name, size in sizes.items()}
    inputs["x"] *= dim**0.5
    inputs |= residual
    sample = {name: tensor[:SAMPLE] if name in ("x", "residual") else tensor for name, tensor in inputs.items()}
    size, more, weights = DTYPE.itemsize, len(residual), 2 * dim * hidden
    return Problem(
        title=f"MLP{' + residual' * more} {rows}×{dim}→{hidden}→{dim}",
        inputs=inputs,
        check=partial(compare.assert_as_exact_as_torch, our_mlp, eager_mlp, true_mlp, sample, DTYPE),
        candidates={
            OURS: Candidate(operation=our_mlp),
            EAGER: Candidate(operation=eager_mlp),
            **peers.compile_operation(eager_mlp),
            **peers.find_cublaslt(),
        },
        # In: x, the residual, the weights; out: y, the activation, GELU's slope. Backward in: dy, x, those two, the weights; out: dx, dw.
        num_bytes={
            FORWARD: size * ((2 + more) * rows * dim + 2 * rows * hidden + weights),
            BACKWARD: size * (3 * rows * dim + 2 * rows * hidden + 2 * weights),
        },
        amount=rows,
        unit="rows",
    )


@pytest.mark.parametrize("candidate", [OURS, EAGER, *peers.COMPILERS, *peers.CUBLASLT])
@pytest.mark.parametrize("group", [*group_params(mlp_with_residual_of, SHAPES[:1]), *group_params(mlp_of, SHAPES)], indirect=True)
def test_mlp(group, candidate, benchmark):
    group.enter(candidate, benchmark)
