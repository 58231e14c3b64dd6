"""Layer normalisation by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import pytest
import torch
from compare import assert_as_exact_as_torch, outputs_and_gradients
from samples import activations, normal
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]


LAYER_NORM_VIEWS = {
    "as it lies": ((2, 65, 96), lambda x: x),
    "transposed": ((96, 65, 2), lambda x: x.permute(2, 1, 0)),
    "first token": ((4, 65, 96), lambda x: x[:, 0]),
    "every second channel": ((3, 192), lambda x: x[:, ::2]),
    "repeated": ((1, 96), lambda x: x.expand(7, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER_NORM_VIEWS)
def test_layer_norm(name, dtype):
    shape, view = LAYER_NORM_VIEWS[name]
    forms = (lambda x, weight, bias, f=f: f(view(x), weight, bias, 1e-6) for f in (ops.layer_norm, plain_layer_norm, reference.layer_norm))
    inputs = {"x": activations(*shape), "weight": normal(96, seed=2), "bias": normal(96, seed=3)}
    assert_as_exact_as_torch(*forms, inputs, dtype)


def plain_layer_norm(x, weight, bias, eps):
    return functional.layer_norm(x, (len(weight),), weight, bias, eps)


def test_gradients_are_the_same_in_every_run():
    call = (ops.layer_norm, {"x": normal(4, 65, 64), "weight": normal(64), "bias": normal(64)})
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
