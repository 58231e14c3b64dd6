"""Rounded forms of parameters stand in for them as long as they are theirs."""

import copy
import io
import pickle

import pytest
import torch
from compare import DEVICE
from samples import normal

from polyvit_kernels import ops
from polyvit_kernels.ops import weights
from polyvit_kernels.ops.weights import RoundedBuffer


class Layer:
    """Of a weight `[8, 4]` and a bias that lie in one buffer, whose rounded form is made to show: it is twice theirs."""

    def __init__(self):
        self.buffer = RoundedBuffer(normal(40), torch.bfloat16)
        self.weight, self.bias = (torch.nn.Parameter(torch.empty(0)) for _ in range(2))
        self.buffer.refresh()
        self.buffer.rounded.mul_(2)
        for parameter, where, shape in ((self.weight, slice(0, 32), (8, 4)), (self.bias, slice(32, 40), (8,))):
            parameter.data = self.buffer.values[where].view(shape)
            parameter.grad, parameter.grad_dtype = torch.zeros(shape), None
            weights.attach(parameter, self.buffer, self.buffer.rounded[where].view(shape))

    def __call__(self, x, dtype=torch.bfloat16):
        with torch.autocast("cpu", dtype):
            return ops.linear(x, self.weight, self.bias)

    def factor(self, dtype=torch.bfloat16):
        """What the layer's result is in relation to that of its parameters."""
        with torch.no_grad():
            found = self(torch.ones(1, 4), dtype)
            return (found.float() / (self.weight.sum(1) + self.bias)).median().round().item()


pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="what it is about is Python's")


def test_operations_under_autocast_take_the_rounded_form():
    layer = Layer()
    assert layer.factor() == 2
    assert layer.factor(torch.float16) == 1
    # Of ones and zeros, so that there is one sum of two numbers, which every CPU rounds alike.
    assert torch.equal(ops.linear(torch.eye(4), layer.weight, layer.bias), layer.weight.t() + layer.bias)
    assert weights.cast_weight(layer.weight, torch.bfloat16).data_ptr() == layer.buffer.rounded.data_ptr()


CHANGES = {
    "a write to the parameter": lambda layer: layer.weight.mul_(2),
    "the other parameter": lambda layer: layer.bias.zero_(),
    "the buffer": lambda layer: layer.buffer.values.mul_(2),
    "a part of the buffer": lambda layer: layer.buffer.values[:8].add_(1),
    "a parameter through its state": lambda layer: torch.nn.ParameterList([layer.weight]).load_state_dict({"0": normal(8, 4)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_not_taken_after_others_have_written(name):
    layer = Layer()
    with torch.no_grad():
        CHANGES[name](layer)
    touched = [parameter for parameter in (layer.weight, layer.bias) if not weights.is_attached(parameter)]
    assert touched
    for parameter in touched:
        assert torch.equal(weights.cast_weight(parameter, torch.bfloat16), parameter.bfloat16())


def test_who_writes_both_says_so():
    layer = Layer()
    layer.buffer.values.mul_(2)
    assert not weights.is_attached(layer.weight)
    layer.buffer.mark_fresh()
    assert weights.is_attached(layer.weight)
    layer.buffer.values.mul_(2)
    layer.buffer.refresh()
    assert torch.equal(weights.cast_weight(layer.weight, torch.bfloat16), layer.weight.bfloat16())


def test_the_gradient_is_added_to_an_fp32_one_as_it_comes():
    layer, seen = Layer(), []
    before = layer.weight.grad
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.dtype))
    for _ in range(2):
        layer(normal(3, 4)).sum().backward()
    expected = 2 * normal(3, 4).bfloat16().sum(0).float().expand(8, 4)
    assert seen == [torch.float32] * 2
    assert layer.weight.grad is before
    torch.testing.assert_close(before, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(layer.bias.grad, torch.full((8,), 6.0))


def test_a_rounded_form_that_changes_before_the_backward_pass_is_told():
    layer = Layer()
    loss = layer(normal(3, 4).requires_grad_()).sum()
    layer.buffer.rounded.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def saved(parameter):
    file = io.BytesIO()
    torch.save(parameter.detach(), file)
    return torch.load(io.BytesIO(file.getvalue()))


COPIES = {
    "deepcopy": copy.deepcopy,
    "clone": lambda p: p.clone(),
    "saved": saved,
    "pickled state": lambda p: pickle.loads(pickle.dumps(p.detach())),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_have_none(name):
    layer = Layer()
    other = COPIES[name](layer.weight)
    assert not weights.is_attached(other)
    assert torch.equal(weights.cast_weight(other, torch.bfloat16), layer.weight.bfloat16())


@pytest.mark.usefixtures("unchecked_types")
def test_a_compiled_graph_rounds_the_parameters_themselves():
    layer = Layer()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")
    x = normal(3, 4)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(compiled(x), expected)


def test_mlp_and_patch_embed_take_it_too():
    layer = Layer()
    ones, zeros = torch.ones(4, 8), torch.zeros(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        taken = ops.mlp(normal(3, 4), layer.weight, layer.bias, ones, zeros, "erf")
        expected = ops.mlp(normal(3, 4), 2 * layer.weight.bfloat16(), 2 * layer.bias.bfloat16(), ones, zeros, "erf")
        assert torch.equal(taken, expected)
        patches = (
            normal(2, 1, 2, 2, 1),
            layer.weight.view(8, 1, 2, 2, 1),
            *(torch.zeros(size) for size in (8, (1, 1, 8), (1, 2, 8), 1)),
            torch.ones(1),
        )
        weights.attach(patches[1], layer.buffer, layer.buffer.rounded[:32].view(8, 1, 2, 2, 1))
        plain = patches[0], 2 * layer.weight.view(8, 1, 2, 2, 1).bfloat16(), *patches[2:]
        assert torch.equal(ops.patch_embed(*patches), ops.patch_embed(*plain))
