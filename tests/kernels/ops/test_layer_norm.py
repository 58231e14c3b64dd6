"""Layer normalisation by the comparison rule: truth is `reference.py` in fp64, the baseline plain PyTorch at the same dtype."""

from itertools import product

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from long_forms import every, mark_long
from partial_gradients import assert_only_the_wanted
from samples import activations, factors, normal
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
    "one vector": ((96,), lambda x: x),
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


def plain_add_layer_norm(x, residual, weight, bias, eps):
    return x + residual, plain_layer_norm(x + residual, weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER_NORM_VIEWS)
def test_add_layer_norm(name, dtype):
    shape, view = LAYER_NORM_VIEWS[name]

    def by(add_layer_norm):
        return lambda x, residual, weight, bias: torch.stack(add_layer_norm(view(x), view(residual), weight, bias, 1e-6))

    inputs = {"x": activations(*shape), "residual": normal(*shape, seed=5), "weight": normal(96, seed=2), "bias": normal(96, seed=3)}
    assert_as_exact_as_torch(by(ops.add_layer_norm), by(plain_add_layer_norm), by(reference.add_layer_norm), inputs, dtype)


GRADIENTS = {
    "transposed": lambda: normal(96, 5, 3).permute(2, 1, 0),
    "sliced": lambda: normal(3, 6, 192)[:, 1:, ::2],
    "one number": lambda: normal(1, 1, 1).expand(3, 5, 96),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_may_arrive_in_every_layout(name):
    x, residual, weight, bias = (t.requires_grad_() for t in (normal(3, 5, 96), normal(3, 5, 96, seed=1), normal(96), normal(96, seed=2)))
    outputs = ops.add_layer_norm(x, residual, weight, bias)
    grad = GRADIENTS[name]()
    found = torch.autograd.grad(outputs, (x, residual, weight, bias), (grad, grad), retain_graph=True)
    expected = torch.autograd.grad(outputs, (x, residual, weight, bias), (grad.contiguous(), grad.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_of_the_two_outputs_may_go_unused():
    x, residual, weight, bias = (t.requires_grad_() for t in (normal(3, 32), normal(3, 32, seed=1), normal(32), normal(32, seed=2)))
    total, out = ops.add_layer_norm(x, residual, weight, bias)
    grad = normal(3, 32, seed=4)
    d_x, d_residual = torch.autograd.grad(total, (x, residual), grad, retain_graph=True)
    assert torch.equal(d_x, grad)
    assert torch.equal(d_residual, grad)
    expected = torch.autograd.grad(plain_layer_norm(x + residual, weight, bias, 1e-6), (x, residual, weight, bias), grad)
    for a, b in zip(torch.autograd.grad(out, (x, residual, weight, bias), grad), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dtypes_of_sum_output_and_gradients():
    half, single = torch.bfloat16, torch.float32
    x, residual = normal(3, 32).requires_grad_(), normal(3, 32).to(half).requires_grad_()
    weight, bias = normal(32).requires_grad_(), normal(32).requires_grad_()
    total, out = ops.add_layer_norm(x, residual, weight, bias, out_dtype=half)
    assert (total.dtype, out.dtype) == (single, half)
    assert ops.add_layer_norm(residual, residual, weight, bias)[1].dtype == half
    assert ops.layer_norm(residual, weight, bias).dtype == half
    assert ops.layer_norm(residual, weight, bias, out_dtype=single).dtype == single
    (total.sum() + out.sum()).backward()
    assert [t.grad.dtype for t in (x, residual, weight, bias)] == [single, half, single, single]


def test_no_vectors():
    x, weight, bias = normal(0, 5, 32).requires_grad_(), normal(32).requires_grad_(), normal(32).requires_grad_()
    total, out = ops.add_layer_norm(x, x.detach(), weight, bias)
    (total.sum() + out.sum()).backward()
    assert total.shape == out.shape == x.grad.shape == (0, 5, 32)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_autocast_gives_fp32_unless_told_otherwise():
    x, residual, weight, bias = normal(3, 32).bfloat16(), normal(3, 32, seed=1).bfloat16(), normal(32), normal(32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert ops.layer_norm(x, weight, bias).dtype == torch.float32
        assert ops.layer_norm(x, weight, bias, out_dtype=torch.bfloat16).dtype == torch.bfloat16
        total, out = ops.add_layer_norm(x, residual, weight, bias)
    assert (total.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, plain_layer_norm(total.float(), weight, bias, 1e-6))


def test_gradients_are_the_same_in_every_run():
    call = (ops.layer_norm, {"x": normal(4, 65, 64), "weight": normal(64), "bias": normal(64)})
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


OPCHECKED = [("transposed", torch.float32), ("as it lies", torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"), mark_long(product(["as it lies", "transposed", "repeated", "none"], DTYPES), OPCHECKED), ids=str
)
def test_ops_are_registered_as_torch_wants_them(name, dtype):
    shape, view = (LAYER_NORM_VIEWS | {"none": ((0, 5, 96), lambda x: x)})[name]
    x, residual = (view(normal(*shape, seed=seed).to(dtype)).detach().requires_grad_() for seed in (0, 1))
    weight, bias = normal(96, seed=2).requires_grad_(), normal(96, seed=3).requires_grad_()
    torch.library.opcheck(torch.ops.polyvit.layer_norm, (x, weight, bias, 1e-6, torch.bfloat16))
    torch.library.opcheck(torch.ops.polyvit.add_layer_norm, (x, residual, weight, bias, 1e-6, dtype))
    saved = (x.detach(), weight.detach(), torch.zeros(x.shape[:-1], device=DEVICE), torch.ones(x.shape[:-1], device=DEVICE))
    for grad_sum, low_dtype in ((None, None), (x.detach(), None), (x.detach(), torch.bfloat16), (None, torch.float32)):
        for some in (None, factors(len(x))) if low_dtype else (None,):
            mask = [True, some is None, grad_sum is None]
            arguments = (residual.detach(), *saved, grad_sum, low_dtype, some, mask)
            torch.library.opcheck(torch.ops.polyvit.layer_norm_backward, arguments)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_as_one_graph_the_values_are_the_same(autocast):
    def both(x, residual, weight, bias):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            total, out = ops.add_layer_norm(x, residual, weight, bias)
            return ops.layer_norm(total.transpose(0, 1), weight, bias, out_dtype=torch.bfloat16).float() + out.transpose(0, 1)

    inputs = {"x": normal(3, 5, 32), "residual": normal(3, 5, 32, seed=1), "weight": normal(32, seed=2), "bias": normal(32, seed=3)}
    compiled = outputs_and_gradients(torch.compile(both, fullgraph=True, backend="aot_eager"), inputs)
    assert all(torch.equal(compiled[name], value) for name, value in outputs_and_gradients(both, inputs).items())


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", every(2, LAYER_NORM_VIEWS))
def test_on_kernels(name):
    test_layer_norm(name, torch.float32)
    test_add_layer_norm(name, torch.float32)


@pytest.mark.usefixtures("on_kernels")
def test_what_no_row_is_for_is_done_by_torch():
    x, weight, bias = normal(3, 32).double().requires_grad_(), normal(32).double(), normal(32).double()
    total, out = ops.add_layer_norm(x, x.detach(), weight, bias)
    torch.testing.assert_close(out, plain_layer_norm(total, weight, bias, 1e-6), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(out.square().sum() + total.sum(), x)
    (expected,) = torch.autograd.grad(plain_layer_norm(2 * x, weight, bias, 1e-6).square().sum() + x.sum(), x)
    torch.testing.assert_close(gradient, (expected - 1) / 2 + 1, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal(3, 16)}, r"shapes \[3, 16\], \[32\] and \[32\], but \[..., dim\], \[dim\] and \[dim\] are needed"),
        ({"x": normal(1)[0]}, r"shapes \[\], \[32\] and \[32\]"),
        ({"bias": normal(1, 32)}, r"shapes \[3, 32\], \[32\] and \[1, 32\]"),
        ({"weight": normal(32).bfloat16()}, "weight and bias must have one dtype, not torch.bfloat16 and torch.float32"),
        ({"weight": torch.empty(32, device="meta")}, "on one device, not x on cpu, weight on meta, bias on cpu"),
        ({"residual": normal(1, 32)}, r"x and residual must have one shape, not \[3, 32\] and \[1, 32\]"),
        ({"x": normal(3, 32).int()}, "x is torch.int32, but a floating-point dtype is needed"),
        ({"weight": normal(32).int()}, "weight is torch.int32, but a floating-point dtype is needed"),
        ({"bias": normal(32).to(torch.float8_e4m3fn)}, "bias is torch.float8_e4m3fn, but a floating-point dtype is needed"),
        ({"residual": normal(3, 32).int()}, "residual is torch.int32, but a floating-point dtype is needed"),
        ({"out_dtype": torch.int8}, "out_dtype is torch.int8, but a floating-point dtype is needed"),
        ({"residual": torch.empty(3, 32, device="meta")}, "on one device, not x on cpu, residual on meta"),
    ],
)
def test_what_does_not_go_together_is_told(change, message):
    inputs = {"x": normal(3, 32), "residual": normal(3, 32), "weight": normal(32), "bias": normal(32)} | change
    with pytest.raises(ValueError, match=message.replace("cpu", "(cpu|cuda:0)")):
        ops.add_layer_norm(**inputs)
    if "residual" not in change:
        del inputs["residual"]
        with pytest.raises(ValueError, match=message.replace("cpu", "(cpu|cuda:0)")):
            ops.layer_norm(**inputs)


@pytest.mark.parametrize("path", ["library", "kernels"])
@pytest.mark.parametrize("used", ["both", "the normalised one", "x"])
def test_a_residual_beside_the_norm_has_the_gradient_of_both(used, path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")

    def use(x, normal):
        return {"both": torch.cat([x.square(), normal], -1), "the normalised one": normal * 1, "x": x.square()}[used]

    def plain(x, weight, bias):
        return use(x, functional.layer_norm(x, weight.shape, weight, bias, 1e-6)) + 0 * (weight.sum() + bias.sum() + x.sum())

    def truth(x, weight, bias):
        return use(x, reference.layer_norm(x, weight, bias)) + 0 * (weight.sum() + bias.sum() + x.sum())

    def ours(x, weight, bias):
        return use(*ops.layer_norm_residual(x, weight, bias)) + 0 * (weight.sum() + bias.sum() + x.sum())

    inputs = {"x": normal(3, 5, 48), "weight": normal(48, seed=2), "bias": normal(48, seed=3)}
    assert_as_exact_as_torch(ours, plain, truth, inputs, torch.float32)


def test_a_residual_beside_the_norm_is_added_in_the_norms_own_pass():
    x, weight, bias = normal(3, 48).requires_grad_(), normal(48), normal(48)
    left, right = ops.layer_norm_residual(x, weight, bias)
    assert left is not right
    total = (left + right).sum()
    with torch.profiler.profile() as profile:
        total.backward()
    names = [event.name for event in profile.events()]
    assert "polyvit::layer_norm_backward" in names
    assert not any(name == "aten::add" for name in names)


@pytest.mark.usefixtures("unchecked_types")
def test_a_residual_beside_the_norm_compiles_whole():
    def loss(x, weight, bias):
        residual, normal = ops.layer_norm_residual(x * 2, weight, bias)
        return (residual + normal.square()).sum()

    inputs = [tensor.requires_grad_() for tensor in (normal(3, 5, 48), normal(48), normal(48))]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("some", [torch.ones(3), torch.ones(4).half(), torch.ones(2, 2), torch.ones(4, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.usefixtures("unchecked_types")
def test_factors_that_do_not_fit_are_refused_forward(some, grad):
    with pytest.raises(ValueError, match=r"factors are .*, but \[4\] torch.float32, one for each example"):
        ops.layer_norm_residual(normal(4, 5, 8).requires_grad_(grad), normal(8), normal(8), factors=some.to(DEVICE))


@pytest.mark.parametrize("path", ["registered", "on_kernels"])
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_residual", "add_layer_norm"])
def test_a_gradient_that_nobody_wants_is_not_returned(name, path, request):
    request.getfixturevalue(path)
    inputs = {"x": normal(3, 5, 48), "weight": normal(48, seed=2), "bias": normal(48, seed=3)}
    if name == "add_layer_norm":
        inputs["residual"] = normal(3, 5, 48, seed=1)

    def form(**given):
        found = getattr(ops, name)(**given)
        return found if name == "layer_norm" else torch.cat(found, -1)

    assert_only_the_wanted(form, inputs, dict.fromkeys(inputs, 0))


@pytest.mark.usefixtures("registered")
def test_on_a_cpu_the_sums_over_all_vectors_are_left_out_where_the_norm_is_frozen():
    x, weight, bias = normal(3, 48).requires_grad_(), normal(48), normal(48)
    loss = sum(part.sum() for part in ops.layer_norm_residual(x, weight, bias))
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    [masks] = [event.concrete_inputs[-1] for event in profile.events() if event.name == "aten::native_layer_norm_backward"]
    assert masks == [True, False, False]
