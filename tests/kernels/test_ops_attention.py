"""Attention by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import pytest
import torch
from compare import assert_as_exact_as_torch, outputs_and_gradients
from samples import activations, normal

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 16, 63, 64, 65, 197, 256, 257, 401, 1569]


def plain_attention(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def assert_attention_obeys(qkv, dtype, view=lambda qkv: qkv):
    """`view` is what the operations see of the leaf `qkv`."""
    forms = (lambda qkv, f=f: f(view(qkv)) for f in (ops.attention, plain_attention, reference.attention))
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_at_every_length(tokens, dtype):
    assert_attention_obeys(normal(1 if tokens > 1000 else 2, tokens, 3, 2, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_at_every_width(head_dim, dtype):
    assert_attention_obeys(normal(2, 65, 3, 2, head_dim), dtype)


VIEWS = {
    "heads before tokens": ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
    "batch last": ((65, 3, 2, 32, 2), lambda leaf: leaf.permute(4, 0, 1, 2, 3)),
    "inside a wider buffer": ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
    "every second token": ((2, 130, 3, 2, 32), lambda leaf: leaf[:, ::2]),
    "one example repeated": ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_attention_in_every_layout(name, dtype):
    shape, view = VIEWS[name]
    assert_attention_obeys(normal(*shape), dtype, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_activations_with_large_scores(dtype):
    assert_attention_obeys(activations(2, 197, 3, 2, 64) / 30, dtype)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 4, 8)])
def test_attention_names_the_shape_it_needs(shape):
    with pytest.raises(ValueError, match=r"attention needs \[batch, tokens, 3, heads, head_dim\]"):
        ops.attention(normal(*shape))


def test_gradients_are_the_same_in_every_run():
    first, second = (outputs_and_gradients(ops.attention, {"qkv": normal(4, 65, 3, 4, 32)}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
