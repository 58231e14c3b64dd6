"""LayerNorm, by itself and after the addition of a residual, each way, against compilers and Liger.

Run: pytest benchmarks/bench_layer_norm.py. After an addition the sum goes on as the residual stream, so that it too has a gradient.
"""

from collections.abc import Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, OURS, Candidate, Inputs, Operation, Problem, group_params
from machine import DEVICE, DTYPE, HAS_GPU
from torch import Tensor
from torch.nn import functional

import polyvit_kernels
from polyvit_kernels import reference

EPS = 1e-6
# (rows, dim): ViT-B/16 and ViT-S/16 on 256 images.
SHAPES = [(50_432, 768), (50_432, 384)] if HAS_GPU else [(1_970, 192)]
SAMPLE = 3_001  # rows that are held to the truth


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def eager_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, eager_norm(total, weight, bias)


def our_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return polyvit_kernels.add_layer_norm(x, residual, weight, bias, EPS)


def true_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return x + residual, reference.layer_norm(x + residual, weight, bias, EPS)


def norm_of(shape: Sequence[int]) -> Problem:
    return _problem("LayerNorm", shape, {}, polyvit_kernels.layer_norm, eager_norm, reference.layer_norm)


def add_norm_of(shape: Sequence[int]) -> Problem:
    residual = {"residual": torch.randn(*shape, device=DEVICE, dtype=DTYPE)}
    return _problem("add + LayerNorm", shape, residual, our_add_norm, eager_add_norm, true_add_norm)


def _problem(title: str, shape: Sequence[int], residual: Inputs, ours: Operation, eager: Operation, true: Operation) -> Problem:
    rows, dim = shape
    inputs = {"x": torch.randn(rows, dim, device=DEVICE, dtype=DTYPE)}
    inputs |= {"weight": torch.randn(dim, device=DEVICE, dtype=DTYPE), "bias": torch.randn(dim, device=DEVICE, dtype=DTYPE)} | residual
    sample = {name: tensor[:SAMPLE] for name, tensor in inputs.items()}
    one, more = inputs["x"].nbytes, len(residual)
    return Problem(
        title=f"{title} {rows}×{dim}",
        inputs=inputs,
        check=partial(compare.assert_as_exact_as_torch, _stack(ours), _stack(eager), _stack(true), sample, DTYPE),
        candidates={
            OURS: Candidate(operation=ours),
            EAGER: Candidate(operation=eager),
            **peers.compile_operation(eager),
            **peers.find_liger(),
        },
        # In: x, the residual; out: the sum, the normalised. Backward in: dy, x (the sum), the sum's gradient; out: dx.
        num_bytes={FORWARD: (2 + 2 * more) * one, BACKWARD: (3 + more) * one},
        amount=rows,
        unit="rows",
    )


def _stack(operation: Operation) -> Operation:
    """All results in one tensor, as the comparison takes one."""

    def run(**inputs: Tensor) -> Tensor:
        results = operation(**inputs)
        return torch.stack(results) if isinstance(results, tuple) else results

    return run


@pytest.mark.parametrize("candidate", [OURS, EAGER, *peers.COMPILERS, *peers.LIGER])
@pytest.mark.parametrize("group", [*group_params(add_norm_of, SHAPES), *group_params(norm_of, SHAPES[:1])], indirect=True)
def test_layer_norm(group, candidate, benchmark):
    group.enter(candidate, benchmark)
