"""Linear layers with GELU by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import pytest
import torch
from compare import assert_as_exact_as_torch, outputs_and_gradients
from samples import normal
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]


def mlp_inputs(x, hidden):
    dim = x.shape[-1]
    weights = {"fc1_weight": normal(hidden, dim, seed=2) / dim**0.5, "fc1_bias": normal(hidden, seed=3)}
    return {"x": x} | weights | {"fc2_weight": normal(dim, hidden, seed=4) / hidden**0.5, "fc2_bias": normal(dim, seed=5)}


def mlp_forms(gelu, view):
    approximate = {"tanh": "tanh", "erf": "none"}[gelu]

    def plain(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        hidden = functional.gelu(x @ fc1_weight.T + fc1_bias, approximate=approximate)
        return hidden @ fc2_weight.T + fc2_bias

    def seen(form, *more):
        return lambda x, **weights: form(view(x), *weights.values(), *more)

    return seen(ops.mlp, gelu), seen(plain), seen(reference.mlp, gelu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("tokens", [1, 63, 197, 257])
def test_mlp_at_every_length(tokens, gelu, dtype):
    assert_as_exact_as_torch(*mlp_forms(gelu, lambda x: x), mlp_inputs(normal(2, tokens, 48) * 2, 80), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [((48, 65, 2), lambda x: x.permute(2, 1, 0)), ((2, 70, 96), lambda x: x[:, 5:, ::2]), ((1, 48), lambda x: x.expand(9, -1))],
    ids=["transposed", "sliced", "repeated"],
)
def test_mlp_in_every_layout(shape, view, dtype):
    inputs = mlp_inputs(normal(2, 3, 48), 80) | {"x": normal(*shape)}
    assert_as_exact_as_torch(*mlp_forms("tanh", view), inputs, dtype)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_linear_gelu_is_the_first_half_of_mlp(gelu):
    inputs = mlp_inputs(normal(2, 65, 48), 80)
    hidden = ops.linear_gelu(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], gelu)
    assert torch.equal(functional.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"]), ops.mlp(**inputs, gelu=gelu))


def test_gradients_are_the_same_in_every_run():
    call = (lambda **inputs: ops.mlp(**inputs, gelu="tanh"), mlp_inputs(normal(4, 65, 64), 128))
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
