"""Attention by the comparison rule: truth is `reference.py` in fp64, the baseline plain PyTorch at the same dtype."""

import sys
from itertools import product

import pytest
import torch
from attention_cases import KERNEL_DTYPE, VIEWS, plain
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from long_forms import mark_long, pairs
from samples import activations, normal

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 16, 63, 64, 65, 197, 256, 257, 401, 1569]


def assert_attention_obeys(qkv, dtype, view=lambda qkv: qkv):
    """`view` is what the operations see of the leaf `qkv`."""
    forms = (lambda qkv, f=f: f(view(qkv)) for f in (ops.attention, plain, reference.attention))
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, dtype)


@pytest.mark.parametrize(("tokens", "dtype"), pairs(TOKENS, DTYPES), ids=str)
def test_attention_at_every_length(tokens, dtype):
    assert_attention_obeys(normal(1 if tokens > 1000 else 2, tokens, 3, 2, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_at_every_width(head_dim, dtype):
    assert_attention_obeys(normal(2, 65, 3, 2, head_dim), dtype)


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


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("tokens", [1, 65, 197, 257])
def test_the_kernels_by_the_public_function(tokens):
    assert_attention_obeys(normal(2, tokens, 3, 1, 32), KERNEL_DTYPE)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", VIEWS)
def test_the_kernels_in_every_layout(name):
    shape, view = VIEWS[name]
    assert_attention_obeys(normal(*shape), KERNEL_DTYPE, view)


UPSTREAM = {
    "of a sum": lambda out: out.sum(),
    "of one token": lambda out: out[:, 0].square().sum(),
    "heads before tokens": lambda out: (out.transpose(1, 2).contiguous() * torch.arange(5.0, device=out.device).view(5, 1)).sum(),
    "transposed": lambda out: out.permute(3, 0, 2, 1).square().sum(),
    "behind a cat": lambda out: torch.cat([out, out * 2], 1).square().sum(),
}


@pytest.mark.parametrize("path", ["library", "kernels"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_gradients_of_any_layout(name, path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")
    leaf = normal(2, 5, 3, 2, 16).requires_grad_()
    (found,) = torch.autograd.grad(UPSTREAM[name](ops.attention(leaf)), leaf)
    (expected,) = torch.autograd.grad(UPSTREAM[name](plain(leaf)), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("unchecked_types")
def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"qkv is torch.int32, but a floating-point dtype is needed"):
        ops.attention(torch.zeros(1, 2, 3, 1, 8, dtype=torch.int32, device=DEVICE))


OPCHECKED = {
    "contiguous": lambda: normal(2, 17, 3, 2, 32),
    "permuted": lambda: normal(2, 3, 2, 17, 32).permute(0, 3, 1, 2, 4),
    "repeated": lambda: normal(1, 17, 3, 2, 32).expand(3, -1, -1, -1, -1),
    "bf16": lambda: normal(2, 17, 3, 2, 32).bfloat16(),
    "no examples": lambda: normal(0, 17, 3, 2, 32),
}


@pytest.mark.parametrize(
    ("name", "path"),
    mark_long(product(OPCHECKED, ["library", "kernels"]), [("permuted", "library"), ("bf16", "library"), ("permuted", "kernels")]),
)
def test_opcheck(name, path, request):
    if path == "kernels":
        if name == "bf16" and DEVICE.type == "cpu":
            return
        request.getfixturevalue("on_kernels")
    qkv = OPCHECKED[name]().to(KERNEL_DTYPE if DEVICE.type == "cuda" else OPCHECKED[name]().dtype)
    torch.library.opcheck(torch.ops.polyvit.attention, (qkv.requires_grad_(),))
    out, lse = torch.ops.polyvit.attention(qkv.detach())
    torch.library.opcheck(torch.ops.polyvit.attention_backward, (torch.ones_like(out), qkv.detach(), out, lse))


@pytest.mark.usefixtures("unchecked_types")
def test_compiles_whole():
    def loss(qkv):
        return ops.attention(qkv * 2).square().sum()

    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv), qkv)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_dtype_as_for_torchs_own(dtype):
    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    with torch.autocast(DEVICE.type, dtype):
        out = ops.attention(qkv)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.float32
    assert torch.equal(out, ops.attention(qkv.to(dtype)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    qkv = normal(2, 17, 3, 2, 32)
    with mode():
        assert torch.equal(ops.attention(qkv), ops.attention(qkv.requires_grad_() if mode is torch.no_grad else qkv))


@pytest.mark.usefixtures("on_kernels")
def test_more_examples_than_a_grid_may_have(monkeypatch):
    qkv = normal(5, 6, 3, 1, 16)
    together = outputs_and_gradients(ops.attention, {"qkv": qkv})
    monkeypatch.setattr(sys.modules["polyvit_kernels.ops.attention.dense"], "MOST_SEQUENCES", 2)
    in_pieces = outputs_and_gradients(ops.attention, {"qkv": qkv})
    assert all(torch.equal(together[name], in_pieces[name]) for name in together)
