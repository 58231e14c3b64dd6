"""A linear layer by the comparison rule, and where its bias's gradient comes from."""

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch
from samples import activations, normal
from torch.nn import functional

from polyvit_kernels import ops
from polyvit_kernels.ops import gradients

VIEWS = {
    "as it lies": ((2, 65, 32), lambda x: x),
    "transposed": ((32, 65, 2), lambda x: x.permute(2, 1, 0)),
    "first token": ((4, 65, 32), lambda x: x[:, 0]),
    "repeated": ((1, 32), lambda x: x.expand(7, -1)),
    "one vector": ((32,), lambda x: x),
    "nothing": ((0, 3, 32), lambda x: x),
}
SHAPES = {"features": (-1,), "heads": (3, 2, -1)}


def inputs(*shape):
    return {"x": activations(*shape), "weight": normal(48, 32, seed=2) / 6, "bias": normal(48, seed=3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_linear(name, dtype, shape):
    size, view = VIEWS[name]

    def plain(x, weight, bias):
        return functional.linear(view(x), weight, bias).unflatten(-1, shape)

    assert_as_exact_as_torch(lambda x, weight, bias: ops.linear(view(x), weight, bias, shape), plain, plain, inputs(*size), dtype)


@pytest.mark.parametrize("without", ["x", "weight", "bias"])
def test_what_wants_no_gradient_gets_none(without):
    leaves = {name: tensor.requires_grad_(name != without) for name, tensor in inputs(4, 32).items()}
    ops.linear(**leaves).square().sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [without]


class AttachSums(torch.autograd.Function):
    """Passes its gradient on with column sums of its own attached."""

    @staticmethod
    def forward(ctx, qkv):
        return qkv * 1

    @staticmethod
    def backward(ctx, grad):
        return gradients.attach(grad.clone(), sums=torch.arange(48.0).view(grad.shape[2:]))


def test_the_bias_learns_from_the_sums_that_come_with_its_gradient():
    leaves = {name: tensor.bfloat16().requires_grad_() for name, tensor in inputs(2, 5, 32).items()}
    AttachSums.apply(ops.linear(**leaves, shape=(3, 2, -1))).sum().backward()
    assert torch.equal(leaves["bias"].grad, torch.arange(48.0).bfloat16())


def test_a_view_between_the_two_loses_the_sums():
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(2, 5, 32).items()}
    AttachSums.apply(ops.linear(**leaves).unflatten(-1, (3, 2, -1))).sum().backward()
    assert torch.equal(leaves["bias"].grad, torch.full((48,), 10.0))


def test_under_autocast_it_is_torchs():
    made = inputs(3, 32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(ops.linear(**made), functional.linear(**{"input": made.pop("x"), **made}))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal(3, 16)}, r"weight \[48, 32\] and bias \[48\] meet an input of \[16\] features"),
        ({"bias": normal(32)}, r"weight \[48, 32\] and bias \[32\]"),
        ({"weight": normal(48, 32).bfloat16()}, "one dtype is needed"),
        ({"bias": normal(48).int()}, "bias is torch.int32, but a floating-point dtype is needed"),
        ({"bias": torch.empty(48, device="meta")}, "on one device"),
    ],
)
def test_what_does_not_go_together_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(**(inputs(3, 32) | change))
