"""The pre-norm block by the comparison rule, made of values that belong to no module."""

from types import SimpleNamespace

import pytest
import torch
from compare import assert_as_exact_as_torch
from samples import factors, normal
from torch.nn import functional

from polyvit_kernels import ops
from polyvit_kernels.block import pre_norm_block
from polyvit_kernels.ops import gradients

DIM, HIDDEN, HEADS = 32, 48, 2
WIDTHS = {"qkv": (3 * DIM, DIM), "proj": (DIM, DIM), "fc1": (HIDDEN, DIM), "fc2": (DIM, HIDDEN)}


def inputs(examples=5, tokens=3):
    tensors = {"x": normal(examples, tokens, DIM)}
    for seed, (name, (out, features)) in enumerate(WIDTHS.items()):
        tensors |= {f"{name}_weight": normal(out, features, seed=seed) / features**0.5, f"{name}_bias": normal(out, seed=seed)}
    for name in ("norm1", "norm2"):
        tensors |= {f"{name}_weight": normal(DIM, seed=3), f"{name}_bias": normal(DIM, seed=4)}
    return tensors


def ours(x, scales, **values):
    norm1, norm2 = (SimpleNamespace(weight=values[f"{name}_weight"], bias=values[f"{name}_bias"], eps=1e-6) for name in ("norm1", "norm2"))

    def attn(y, residual, factors):
        qkv = ops.linear(y, values["qkv_weight"], values["qkv_bias"], (3, HEADS, -1))
        return ops.linear_add(ops.attention(qkv).flatten(2), values["proj_weight"], values["proj_bias"], residual, factors)

    def mlp(y, residual, factors):
        layers = [values[f"{name}_{kind}"] for name in ("fc1", "fc2") for kind in ("weight", "bias")]
        return ops.mlp(y, *layers, "erf", residual, factors)

    return pre_norm_block(x, norm1, attn, norm2, mlp, *scales)


def plain(x, scales, **values):
    def linear(name, y):
        return functional.linear(y, values[f"{name}_weight"], values[f"{name}_bias"])

    def norm(name, y):
        return functional.layer_norm(y, (DIM,), values[f"{name}_weight"], values[f"{name}_bias"], 1e-6)

    first, second = (1 if scale is None else scale.to(x.dtype).view(-1, 1, 1) for scale in scales)
    q, k, v = linear("qkv", norm("norm1", x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    x = x + first * linear("proj", functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + second * linear("fc2", functional.gelu(linear("fc1", norm("norm2", x))))


@pytest.mark.parametrize("scales", [(None, None), (factors(5), None), (factors(5), factors(5).flip(0))], ids=["none", "first", "both"])
def test_output_and_gradients(scales):
    double = [None if scale is None else scale.double() for scale in scales]
    forms = [lambda f=f, s=s, **values: f(scales=s, **values) for f, s in ((ours, scales), (plain, scales), (plain, double))]
    assert_as_exact_as_torch(*forms, inputs(), torch.float32)


def test_the_norm_that_follows_a_branch_multiplies_by_its_factors(monkeypatch):
    products, multiply = [], gradients.multiply
    monkeypatch.setattr(gradients, "multiply", lambda x, factors: products.append(factors is not None) or multiply(x, factors))
    values = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    x, scales = values.pop("x"), (factors(5), factors(5).flip(0))
    y = ours(x, scales, **values)
    assert gradients.find_factors(y) is scales[1]
    ours(y, (None, None), **values).sum().backward()
    # Once in the backward of each norm that a scaled branch ends before, and nowhere else.
    assert products.count(True) == 2
