"""Attention of the class token alone, by torch's operators and with the backward of its own that a GPU takes."""

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch
from interpreted import registered as registered  # a fixture
from torch.utils.flop_counter import FlopCounterMode

from polyvit_fast.model.class_token import attend_first
from polyvit_kernels import reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_all_tokens(x, weight, bias, num_heads):
    """The same by attention of every token."""
    qkv = (x @ weight.T + bias).unflatten(-1, (3, num_heads, -1))
    return reference.attention(qkv)[:, 0].flatten(1)


def by_torch(x, weight, bias, num_heads):
    q, k, v = ((x @ weight.T + bias).unflatten(-1, (3, num_heads, -1))).permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, 0].flatten(1)


def inputs(tokens, dim):
    return {"x": normal(3, tokens, dim), "weight": normal(3 * dim, dim, seed=1) / dim**0.5, "bias": normal(3 * dim, seed=2)}


@pytest.mark.parametrize("path", ["torch's", "own backward"])
@pytest.mark.parametrize(("tokens", "dim", "num_heads"), [(1, 16, 1), (17, 32, 4), (65, 96, 3)])
def test_it_is_the_first_of_all_tokens(tokens, dim, num_heads, path, request):
    if path == "own backward":
        request.getfixturevalue("registered")
    forms = (lambda f=f, **tensors: f(**tensors, num_heads=num_heads) for f in (attend_first, by_torch, of_all_tokens))
    assert_as_exact_as_torch(*forms, inputs(tokens, dim), torch.float32)


def gradients(wanted=("x", "weight", "bias")):
    leaves = {name: tensor.double().to(DEVICE).requires_grad_(name in wanted) for name, tensor in inputs(17, 32).items()}
    out = attend_first(**leaves, num_heads=4)
    out.square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)])
def test_both_backwards_agree_to_many_digits(wanted, request):
    expected = gradients(wanted)
    request.getfixturevalue("registered")
    for name, gradient in gradients(wanted).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("registered")
def test_a_second_derivative_is_refused():
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(5, 16).items()}
    (gradient,) = torch.autograd.grad(attend_first(**leaves, num_heads=2).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("registered")
def test_the_backward_multiplies_no_more_than_torch(monkeypatch):
    counts = []
    for own in (True, False):
        monkeypatch.setattr("polyvit_kernels.ops.dtypes.runs_registered", lambda x, own=own: own)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs(65, 32).items()}
        with FlopCounterMode(display=False) as counter:
            attend_first(**leaves, num_heads=4).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]
