"""The kernels of layer normalisation by the comparison rule: truth is `reference.py` in fp64, compared with plain PyTorch."""

import dataclasses

import pytest
import torch
from compare import DEVICE, assert_within_rule, one_thread
from long_forms import mark_long
from samples import activations, factors, normal

from polyvit_kernels import reference
from polyvit_kernels.tiles import pick
from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.triton_kernels import layer_norm as norm

# Triton's interpreter truncates to bf16 instead of rounding.
HALVES = [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]
EPS = 1e-6


def tile(direction, width, **blocks):
    row = pick(f"layer_norm_{direction}", 90, torch.float32, features=width)
    return dataclasses.replace(row, blocks={**row.blocks, **blocks})


def ours(x, residual, weight, bias, grad, grad_sum, **blocks):
    total, out, mean, rstd = norm.forward(x, residual, weight, bias, EPS, grad.dtype, tile("forward", x.shape[-1]))
    saved = x if total is None else total
    row = tile("backward", x.shape[-1], **blocks)
    d_x, low, sums, *parameters = norm.backward(grad, grad_sum, saved, weight, mean, rstd, row)
    assert low is sums is None
    return named(total, out, mean, rstd, d_x, *parameters)


def plain(x, residual, weight, bias, grad, grad_sum):
    """By torch's own operators; in the dtypes' common one, each result rounded to its own."""
    total = x if residual is None else x + residual
    common = torch.promote_types(torch.promote_types(total.dtype, weight.dtype), grad.dtype)
    leaves = [tensor.to(common).requires_grad_() for tensor in (total, weight, bias)]
    out, mean, rstd = torch.native_layer_norm(leaves[0], total.shape[-1:], *leaves[1:], EPS)
    d_total, d_weight, d_bias = torch.autograd.grad(out, leaves, grad.to(common))
    d_total = d_total if grad_sum is None else d_total + grad_sum
    total_out = None if residual is None else total
    parameters = (d_weight.to(weight.dtype), d_bias.to(bias.dtype))
    return named(total_out, out.to(grad.dtype), mean[..., 0].float(), rstd[..., 0].float(), d_total.to(total.dtype), *parameters)


def true(x, residual, weight, bias, grad, grad_sum):
    x, weight, bias, grad = (tensor.double() for tensor in (x, weight, bias, grad))
    other = torch.zeros_like(x) if residual is None else residual.double()
    total, out = reference.add_layer_norm(x, other, weight, bias, EPS)
    grad_sum = torch.zeros_like(x) if grad_sum is None else grad_sum.double()
    gradients = reference.add_layer_norm_backward(x, other, weight, grad_sum, grad, EPS)
    rstd = (total.var(-1, correction=0) + EPS).rsqrt()
    return named(None if residual is None else total, out, total.mean(-1), rstd, *gradients)


def named(*tensors):
    names = ("sum", "out", "mean", "rstd", "gradient of x", "gradient of weight", "gradient of bias")
    return {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def inputs(*shape, dtype=torch.float32, weight_dtype=None, out_dtype=None, residual_dtype=None, grad_sum_dtype=None):
    """Without a residual and the sum's gradient unless their dtype is given."""
    width = shape[-1]
    weight, bias = (normal(width, seed=seed).to(weight_dtype or dtype) for seed in (2, 3))
    residual = None if residual_dtype is None else normal(*shape, seed=4).to(residual_dtype)
    grad_sum = None if grad_sum_dtype is None else normal(*shape, seed=6).to(grad_sum_dtype)
    return activations(*shape).to(dtype), residual, weight, bias, normal(*shape, seed=5).to(out_dtype or dtype), grad_sum


def assert_kernels_obey(*tensors, dtype=torch.float32, **blocks):
    with one_thread():
        plain_results = plain(*tensors)
    assert_within_rule(ours(*tensors, **blocks), plain_results, true(*tensors), dtype)


@pytest.mark.parametrize("width", [3, 192, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 16, 200, 384, 768, 1024, 1280, 2049))])
def test_every_width(width):
    assert_kernels_obey(*inputs(2, 5, width))
    assert_kernels_obey(*inputs(2, 5, width, residual_dtype=torch.float32, grad_sum_dtype=torch.float32))


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_every_number_of_rows_for_more_and_fewer_programs_than_they_fill(rows):
    assert_kernels_obey(*inputs(rows, 48), ROWS=4, PROGRAMS=3, STAGES=2)
    assert_kernels_obey(*inputs(rows, 48, residual_dtype=torch.float32), ROWS=1, PROGRAMS=100, STAGES=1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_dtype(dtype):
    assert_kernels_obey(*inputs(9, 96, dtype=dtype), dtype=dtype)
    assert_kernels_obey(*inputs(9, 96, dtype=dtype, residual_dtype=dtype, grad_sum_dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_dtypes_may_differ(half):
    single = torch.float32
    assert_kernels_obey(*inputs(9, 96, dtype=half, weight_dtype=single), dtype=half)
    assert_kernels_obey(*inputs(9, 96, dtype=half, weight_dtype=single, out_dtype=single), dtype=half)
    mixed = {"residual_dtype": half, "grad_sum_dtype": single}
    assert_kernels_obey(*inputs(9, 96, dtype=single, out_dtype=half, **mixed), dtype=half)
    assert_kernels_obey(*inputs(9, 96, dtype=half, residual_dtype=single, weight_dtype=single, out_dtype=half), dtype=half)


VIEWS = {
    "transposed": ((96, 5, 2), lambda x: x.permute(2, 1, 0)),
    "first token": ((4, 5, 96), lambda x: x[:, 0]),
    "every second channel": ((3, 192), lambda x: x[:, ::2]),
    "repeated": ((1, 96), lambda x: x.expand(7, -1)),
    "one number": ((1, 1), lambda x: x.expand(7, 96)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_layout(name):
    shape, view = VIEWS[name]
    x, other, grad, grad_sum = (view(normal(*shape, seed=seed)) for seed in range(4))
    flat = [tensor.contiguous() for tensor in (x, other, grad, grad_sum)]
    weight, bias = normal(96, seed=7), normal(96, seed=8)
    found, expected = ours(x, other, weight, bias, grad, grad_sum), ours(*flat[:2], weight, bias, *flat[2:])
    torch.testing.assert_close(found, expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.fixture
def far_apart(tmp_path):
    """A function that copies vectors so that they lie so far from each other that 32 bits do not hold the distance."""

    def spread(x):
        distance, path = 2**30 + 64, tmp_path / f"holes{len(list(tmp_path.iterdir()))}"
        size = distance * (len(x) - 1) + x.shape[1]
        with path.open("wb") as file:
            file.truncate(size * x.element_size())
        return torch.from_file(str(path), shared=True, size=size, dtype=x.dtype).as_strided(x.shape, (distance, 1)).copy_(x)

    return spread


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a file with holes is the CPU's memory")
def test_vectors_may_lie_far_apart(far_apart):
    x, residual, weight, bias, grad, grad_sum = inputs(4, 32, residual_dtype=torch.float32, grad_sum_dtype=torch.float32)
    far = [far_apart(tensor) for tensor in (x, residual, grad, grad_sum)]
    found = ours(*far[:2], weight, bias, *far[2:])
    torch.testing.assert_close(found, ours(x, residual, weight, bias, grad, grad_sum))
    alone = ours(far[0], None, weight, bias, far[2], None)
    torch.testing.assert_close(alone, ours(x, None, weight, bias, grad, None))


def test_parameters_may_be_strided():
    x, grad = normal(4, 32), normal(4, 32, seed=1)
    found = ours(x, None, normal(64)[::2], normal(1).expand(32), grad, None)
    expected = ours(x, None, normal(64)[::2].clone(), normal(1).expand(32).clone(), grad, None)
    torch.testing.assert_close(found, expected)


def test_a_large_mean_does_not_drown_the_variance():
    x, *others = inputs(4, 192)
    assert_kernels_obey(x * 0.1 + 100, *others)


def test_no_rows():
    found = ours(*inputs(0, 5, 32, residual_dtype=torch.float32))
    assert found["sum"].shape == found["out"].shape == found["gradient of x"].shape == (0, 5, 32)
    assert not found["gradient of weight"].any()
    assert not found["gradient of bias"].any()


@pytest.mark.parametrize("low_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [3, 192, *(pytest.param(n, marks=pytest.mark.long) for n in (768, 1280))])
def test_the_gradient_comes_rounded_and_summed_as_well(width, low_dtype):
    x, _, weight, _, grad, grad_sum = inputs(7, 5, width, out_dtype=low_dtype, grad_sum_dtype=torch.float32)
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + EPS).rsqrt()
    row = tile("backward", width, PROGRAMS=3, ROWS=8)
    d_x, low, sums, *parameters = norm.backward(grad, grad_sum, x, weight, mean, rstd, row, low_dtype)
    alone, _, _, *same_parameters = norm.backward(grad, grad_sum, x, weight, mean, rstd, row)
    assert torch.equal(d_x, alone)
    assert all(torch.equal(a, b) for a, b in zip(parameters, same_parameters, strict=True))
    if low_dtype is torch.float32:
        assert low is None
    else:
        assert torch.equal(low, d_x.to(low_dtype))
    assert sums.dtype is low_dtype
    torch.testing.assert_close(sums, d_x.sum((0, 1)).to(low_dtype))


@pytest.mark.parametrize("low_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("examples", mark_long([1, 5, 35], [5]))
def test_the_rounded_gradient_and_its_sums_are_multiplied_by_factors(examples, low_dtype):
    x, _, weight, _, grad, grad_sum = inputs(7, 5, 192, out_dtype=low_dtype, grad_sum_dtype=torch.float32)
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + EPS).rsqrt()
    arguments = (grad, grad_sum, x, weight, mean, rstd, tile("backward", 192, PROGRAMS=3, ROWS=8))
    some = factors(examples)
    d_x, low, sums, *parameters = norm.backward(*arguments, low_dtype, some)
    alone, _, _, *same_parameters = norm.backward(*arguments)
    assert torch.equal(d_x, alone)
    assert all(torch.equal(a, b) for a, b in zip(parameters, same_parameters, strict=True))
    multiplied = d_x * some.repeat_interleave(35 // examples).view(7, 5, 1)
    assert torch.equal(low, multiplied.to(low_dtype))
    torch.testing.assert_close(sums, multiplied.sum((0, 1)).to(low_dtype))


def test_the_sums_of_a_rounded_gradient_are_those_of_the_exact_one():
    half = HALVES[-1]
    x, _, weight, _, grad, grad_sum = inputs(100, 96, dtype=half, grad_sum_dtype=half)
    exact = (x.float(), weight.float(), x.float().mean(-1), (x.float().var(-1, correction=0) + EPS).rsqrt())
    rounded, low, sums, *_ = norm.backward(grad, grad_sum, x, weight, *exact[2:], tile("backward", 96, ROWS=8), half)
    d_x, *_ = norm.backward(grad.float(), grad_sum.float(), *exact, tile("backward", 96, ROWS=8))
    assert low is None
    torch.testing.assert_close(sums, d_x.sum(0).to(half))
    assert not torch.equal(sums, rounded.sum(0))


def test_no_rows_have_sums_of_zero():
    x, _, weight, _, grad, _ = inputs(0, 5, 32, out_dtype=HALVES[0])
    d_x, low, sums, *_ = norm.backward(grad, None, x, weight, x[..., 0], x[..., 0], tile("backward", 32), HALVES[0])
    assert d_x.shape == low.shape == (0, 5, 32)
    assert torch.equal(sums, torch.zeros(32, device=DEVICE, dtype=HALVES[0]))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs programs one after the other")
def test_gradients_are_the_same_in_every_run():
    x, _, weight, bias, grad, grad_sum = inputs(50000, 768, out_dtype=torch.bfloat16, grad_sum_dtype=torch.float32)
    _, _, mean, rstd = norm.forward(x, None, weight, bias, EPS, torch.bfloat16, tile("forward", 768))
    runs = [norm.backward(grad, grad_sum, x, weight, mean, rstd, tile("backward", 768), torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_every_row_of_the_table_has_variants_that_name_all_arguments():
    rows = [row for row in TABLE if row.op.startswith("layer_norm")]
    assert {row.op for row in rows} == {"layer_norm_forward", "layer_norm_backward"}
    for row in rows:
        for dtype in row.dtypes:
            for variant in norm.variants(row, dtype):
                assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
                assert set(variant.divisible) <= variant.signature.keys()
