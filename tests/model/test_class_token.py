"""The last block, which computes the class token alone: against all tokens, and its attention with the backward of its own."""

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch, assert_within_rule, outputs_and_gradients
from interpreted import registered as registered  # a fixture
from low_rank import LowRank
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polyvit_fast.model.class_token import ClassTokenAttention, ClassTokenBlock, attend_first
from polyvit_fast.model.modules import Attention, Block
from polyvit_kernels import reference

MEMBERS = ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2"]
LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(**options):
    """A block that gives all tokens, and one that gives the class token, with the same weights."""
    torch.manual_seed(0)
    whole, last = Block(32, 4, 64, **options), ClassTokenBlock(32, 4, 64, **options)
    last.load_state_dict(whole.state_dict())
    return whole, last


def test_parameters_are_those_of_a_block():
    whole, last = blocks()
    assert isinstance(last, Block)
    assert isinstance(last.attn, ClassTokenAttention)
    assert [(name, p.shape) for name, p in last.named_parameters()] == [(name, p.shape) for name, p in whole.named_parameters()]


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.4])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_class_token_alone_is_that_of_all_tokens_with_all_gradients(precision, gelu, drop_path_rate):
    dtype, autocast = PRECISIONS[precision]
    whole, last = blocks(gelu=gelu)
    inputs = {name.replace(".", "_"): 1.5 * parameter.detach() for name, parameter in whole.named_parameters()} | {"x": normal(6, 9, 32)}

    def run(block, dtype, **values):
        names = {name: values[name.replace(".", "_")] for name, _ in block.named_parameters()}
        torch.manual_seed(7)
        return torch.func.functional_call(block.to(dtype).train(), names, (values["x"], drop_path_rate))[:, :1]

    rounded = {name: value.to(dtype) for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outputs_and_gradients(lambda **values: run(last, dtype, **values), rounded)
        baseline = outputs_and_gradients(lambda **values: run(whole, dtype, **values), rounded)
    exact = {name: value.double() for name, value in rounded.items()}
    true = outputs_and_gradients(lambda **values: run(whole, torch.float64, **values), exact)
    assert_within_rule(found, baseline, true, torch.bfloat16 if precision != "fp32" else torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", MEMBERS)
def test_hooks_on_its_parts_run_and_see_the_class_token_after_attention(path, precision):
    dtype, autocast = PRECISIONS[precision]
    (_, plain), (_, hooked), shapes = blocks(), blocks(), []
    hooked.to(dtype).get_submodule(path).register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))
    x = normal(2, 5, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = hooked(x), plain.to(dtype)(x)
    assert shapes == [(2, 5) if path in ("norm1", "attn.qkv") else (2, 1)]
    assert found.dtype == expected.dtype
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_hooks_registered_for_all_modules_run():
    (_, last), seen = blocks(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    last(normal(2, 5, 32))
    handle.remove()
    assert len(seen) == 1 + len(MEMBERS)
    assert set(seen) == set(last.modules())


def test_a_replaced_part_is_called():
    (whole, replaced), sizes = blocks(), []
    replaced.mlp.forward = lambda x, *more, forward=replaced.mlp.forward: (sizes.append(x.shape), forward(x, *more))[1]
    x = normal(2, 5, 32)
    torch.testing.assert_close(replaced(x), whole(x)[:, :1])
    assert sizes == [(2, 1, 32)]


@pytest.mark.parametrize("path", LINEARS)
def test_adapters_are_used(path):
    (whole, last), (_, plain) = blocks(), blocks()
    for block in (whole, last):
        torch.manual_seed(1)
        block.set_submodule(path, LowRank(block.get_submodule(path)))
    x = normal(2, 5, 32)
    torch.testing.assert_close(last(x), whole(x)[:, :1], rtol=1e-5, atol=1e-6)
    assert (last(x) - plain(x)).abs().max() > 1e-3
    last(x).sum().backward()
    assert last.get_submodule(path).down.weight.grad.abs().max() > 0


def test_without_a_bias_of_queries_keys_and_values():
    whole, last = blocks(qkv_bias=False)
    x = normal(2, 5, 32)
    torch.testing.assert_close(last(x), whole(x)[:, :1])


def test_dropout_has_the_distribution_of_all_tokens():
    torch.manual_seed(0)
    (whole, last), x = blocks(dropout=0.3), normal(1, 4, 32).expand(4000, -1, -1)
    with torch.no_grad():
        alone, among = last.train()(x).double(), whole.train()(x)[:, :1].double()
    for power in (1, 2):
        expected, std = among.pow(power).mean(0), among.pow(power).std(0) / 4000**0.5
        assert ((alone.pow(power).mean(0) - expected).abs() < 6 * std).all()  # 4.2 times the std of a difference
    assert (alone[1:] != alone[:-1]).any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_adds_to_a_residual_or_gives_the_branch(dropout):
    whole, last = Attention(32, 4, dropout=dropout), ClassTokenAttention(32, 4, dropout=dropout)
    last.load_state_dict(whole.state_dict())
    x, residual, factors = normal(3, 5, 32), normal(3, 5, 32, seed=1), torch.tensor([2.0, 0.0, -1.0])
    torch.testing.assert_close(last.eval()(x), whole.eval()(x)[:, :1], rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    branch = last.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(last(x, residual, factors), residual[:, :1] + factors.view(3, 1, 1) * branch, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="factors multiply what is added to a residual, but there is none"):
        last(x, None, factors)


# attend_first


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
def test_both_backwards_are_equal_to_many_digits(wanted, request):
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


@pytest.mark.usefixtures("registered")
def test_a_frozen_projection_costs_no_product():
    def count(wanted):
        leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in inputs(65, 32).items()}
        loss = attend_first(**leaves, num_heads=4).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    examples, tokens, dim = 3, 65, 32
    for_x = 2 * examples * tokens * dim * 2 * 4 + 2 * examples * dim * dim  # values and keys of four heads; the first token's query
    for_weight = 3 * 2 * examples * dim * dim
    assert count(["x", "weight", "bias"]) - count(["weight", "bias"]) == for_x
    assert count(["x", "weight", "bias"]) - count(["x", "bias"]) == for_weight
