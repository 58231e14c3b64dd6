"""Linear layers of a block with what follows them in the same kernel, against cuBLAS's product alone and operators one after another.

Run: pytest benchmarks/bench_linear.py. These are the parts of `bench_mlp.py`, called as the operations call them: ours stores GELU and its
slope, and the backward multiplies by that slope; unfused is what torch does, which keeps the first layer's output and asks it again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import compare
import peers
import pytest
import torch
from card import DEVICE, DTYPE, HAS_GPU, Cost
from problem import EAGER, FORWARD, OURS, PORTABLE, Contender, Inputs, Problem, portable
from torch import Tensor
from torch.nn import functional
from trials import TRIALS, Results

from polyvit_kernels import tiles
from polyvit_kernels.tiles import Tile

ROWS, DIM, HIDDEN = (50_432, 768, 3072) if HAS_GPU else (394, 64, 256)  # ViT-B/16 on 256 images
SAMPLE = 1_500  # rows that are held to the truth: as many as take the same row of the table
PRODUCT, UNFUSED = "cuBLAS, product alone", "unfused"
BY_TORCH = Tile(op="", archs=(), backend="torch")

GELU, BACK_THROUGH_GELU, FC2, PROJ = "fc1 + GELU + slope", "back through GELU", "fc2 + {} residual", "proj + {} residual"
LAYERS: dict[str, tuple[str, tuple[int, int, int], torch.dtype]] = {  # (op, (rows, depth, columns), the residual's dtype)
    GELU: ("linear_gelu_forward", (ROWS, DIM, HIDDEN), DTYPE),
    BACK_THROUGH_GELU: ("dgelu_backward", (ROWS, DIM, HIDDEN), DTYPE),
    **{
        name.format(words): ("linear_add_forward", (ROWS, depth, DIM), dtype)
        for name, depth in ((FC2, HIDDEN), (PROJ, DIM))
        for words, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        if HAS_GPU or dtype is DTYPE
    },
}


def product(**inputs: Tensor) -> Tensor:
    return inputs["grad"] @ inputs["weight"] if "grad" in inputs else inputs["x"] @ inputs["weight"].t()


def unfused_gelu(x: Tensor, weight: Tensor, bias: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    pre = torch.addmm(bias, x, weight.t())
    return functional.gelu(pre), pre


def unfused_dgelu(grad: Tensor, weight: Tensor, pre: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    d_pre = torch.ops.aten.gelu_backward(grad @ weight, pre)
    return d_pre, d_pre.sum(0)


def unfused_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **_: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.t()) + residual


def gelu_of_cublaslt(x: Tensor, weight: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


OTHERS: dict[str, dict[str, Contender]] = {
    "linear_gelu_forward": {
        UNFUSED: Contender(operation=torch.no_grad()(unfused_gelu), judged=False),
        peers.LINEAR_GELU: Contender(operation=torch.no_grad()(gelu_of_cublaslt), alike=False, judged=False),
    },
    "dgelu_backward": {UNFUSED: Contender(operation=torch.no_grad()(unfused_dgelu))},
    "linear_add_forward": {UNFUSED: Contender(operation=torch.no_grad()(unfused_add))},
}


def by(op: str, pick: Callable[[], Tile]) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as it runs with the row that `pick` gives at the call."""

    @torch.no_grad()
    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(TRIALS[op].run(inputs, pick()).values())

    return run


def row(op: str, tokens: int, features: int) -> Tile:
    """Of the tile table."""
    return tiles.pick(op, tiles.architecture(DEVICE), DTYPE, tokens=tokens, features=features) if HAS_GPU else BY_TORCH


def check(op: str, sample: Inputs) -> None:
    """Hold ours to the truth."""
    found: Results = TRIALS[op].run(sample, row(op, SAMPLE, sample["grad" if "grad" in sample else "x"].shape[1]))
    compare.assert_within_rule(found, *TRIALS[op].expected(sample), DTYPE)


def problem_of(name: str) -> Problem:
    op, (rows, depth, columns), residual = LAYERS[name]
    inputs = TRIALS[op].inputs((rows, depth, columns), DTYPE)
    if "residual" in inputs:
        inputs["residual"] = inputs["residual"].to(residual)
    ours = by(op, partial(row, op, rows, depth))
    others: dict[str, Any] = OTHERS[op] if HAS_GPU else dict.fromkeys(OTHERS[op], "left out on a CPU")
    sample = {name: tensor[:SAMPLE] if len(tensor) == rows else tensor for name, tensor in inputs.items()}
    # In: x, the weight, what the end reads; out: what it writes, twice as much with GELU's slope.
    ends = {"linear_gelu_forward": 2 * DTYPE.itemsize, "dgelu_backward": 2 * DTYPE.itemsize, "linear_add_forward": 2 * residual.itemsize}
    num_bytes = DTYPE.itemsize * (rows * depth + depth * columns) + ends[op] * rows * columns
    return Problem(
        title=f"{name} {rows}×{depth}→{columns}",
        inputs=inputs,
        check=partial(check, op, sample),
        contenders={
            OURS: Contender(operation=ours),
            PORTABLE: portable(ours),
            EAGER: Contender(operation=by(op, lambda: BY_TORCH), alike=False),
            PRODUCT: Contender(operation=torch.no_grad()(product), alike=False, judged=False) if HAS_GPU else "left out on a CPU",
            **others,
        },
        costs={FORWARD: Cost(num_bytes=num_bytes, flops=2 * rows * depth * columns)},
        amount=rows,
        unit="rows",
        rows={FORWARD: ((op, rows, depth),)},
    )


@pytest.mark.parametrize("contender", [OURS, PORTABLE, EAGER, PRODUCT, UNFUSED, peers.LINEAR_GELU])
@pytest.mark.parametrize("name", LAYERS)
def test_linear(report, name, contender):
    report(FORWARD, contender, problem_of, name)
