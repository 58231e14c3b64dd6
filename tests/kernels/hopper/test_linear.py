"""Hopper's linear layers: executed on the CPU where there is no GPU; truth is `reference.py` in fp64."""

import pytest
import torch
from compare import DEVICE, assert_within_rule, one_thread
from gluon_executor import executing
from long_forms import every
from samples import PLAIN_GELU, factors, normal, plain_slope
from torch.nn import functional

from polyvit_kernels import reference
from polyvit_kernels.hopper import linear
from polyvit_kernels.tiles import pick
from polyvit_kernels.triton_kernels import linear as portable

HALF = [torch.bfloat16, torch.float16]
GELU, ADD, DGELU = "linear_gelu_forward", "linear_add_forward", "dgelu_backward"
TILES = {op: pick(op, 90, torch.bfloat16, tokens=2048, features=768) for op in (GELU, ADD, DGELU)}


def layer(rows, depth, columns, dtype):
    """x, weight and bias of a linear layer whose output has a std of about 3."""
    tensors = 2 * normal(rows, depth), normal(columns, depth, seed=1) / depth**0.5, 2 * normal(columns, seed=2)
    return [tensor.to(dtype) for tensor in tensors]


def doubles(*tensors):
    return [tensor.double() for tensor in tensors]


def check_gelu(tensors, gelu, dtype):
    y, slope = linear.linear_gelu_forward(*tensors, gelu, True, TILES[GELU])
    plain, pre = functional.linear(*tensors), reference.linear(*doubles(*tensors))
    plain_results = {"y": PLAIN_GELU[gelu](plain), "slope": plain_slope(plain, gelu)}
    true = {"y": reference.gelu(pre, gelu), "slope": reference.gelu_backward(pre, gelu, torch.ones_like(pre))}
    assert_within_rule({"y": y, "slope": slope}, plain_results, true, dtype)
    alone, nothing = linear.linear_gelu_forward(*tensors, gelu, False, TILES[GELU])
    assert torch.equal(alone, y)
    assert nothing.numel() == 0


def check_add(tensors, residual, dtype):
    """Without factors, and with those of as few examples, but one, as there can be, and of as many."""
    plain = functional.linear(*tensors)
    y = linear.linear_add_forward(*tensors, residual, None, TILES[ADD])
    assert_within_rule({"y": y}, {"y": residual + plain}, {"y": reference.linear_add(*doubles(*tensors, residual))}, dtype)
    num_rows = len(plain)
    for examples in {next(count for count in range(min(2, num_rows), num_rows + 1) if num_rows % count == 0), num_rows}:
        some = factors(examples)
        y = linear.linear_add_forward(*tensors, residual, some, TILES[ADD])
        rows = some.repeat_interleave(num_rows // examples)[:, None]
        true = {"y": residual.double() + rows.double() * reference.linear(*doubles(*tensors))}
        assert_within_rule({"y": y}, {"y": residual + (rows * plain).to(residual.dtype)}, true, dtype)
        assert torch.equal(y[rows[:, 0] == 0], residual[rows[:, 0] == 0])


def check_dgelu(grad, weight, slope, dtype):
    d_pre, sums = linear.dgelu_backward(grad, weight, slope, TILES[DGELU])

    def expected(grad, weight, slope):
        d_pre = (grad @ weight) * slope
        return {"d_pre": d_pre, "sums": d_pre.sum(0)}

    with one_thread():
        plain_results = expected(grad, weight, slope)
    assert_within_rule({"d_pre": d_pre, "sums": sums}, plain_results, expected(*doubles(grad, weight, slope)), dtype)


# rows, depth, columns, programs at once: tiles of 128 and of 256 columns, whole and ragged, one program for all and several
EXECUTED = [
    *((1, 64, 256, 3), (129, 200, 264, 2)),
    *(
        pytest.param(sizes, marks=pytest.mark.long)
        for sizes in ((127, 192, 512, 1), (129, 64, 512, 2), (333, 200, 264, 2), (333, 192, 512, 3))
    ),
]


@pytest.fixture
def programs(monkeypatch):
    """Sets how many run at once."""
    return lambda count: monkeypatch.setattr(linear, "num_sms", lambda _: count)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the executor is for machines without a GPU")
@pytest.mark.parametrize("seed", every(2, range(2)))
@pytest.mark.parametrize("sizes", EXECUTED)
def test_executed(sizes, seed, programs, monkeypatch):
    rows, depth, columns, count = sizes
    programs(count)
    # The last sums are a portable kernel's, and Triton's interpreter truncates to bf16 instead of rounding.
    monkeypatch.setattr(portable, "sum_partials", lambda partials, dtype: partials.sum(0).to(dtype))
    dtype = HALF[seed]
    tensors = layer(rows, depth, columns, dtype)
    with executing(seed=seed):
        check_gelu(tensors, ("erf", "tanh")[seed], dtype)
        if rows == 1:
            check_gelu(tensors, "quick", dtype)
        check_add(tensors, 10 * normal(rows, columns, seed=3).to((torch.float32, dtype)[seed]), dtype)
        grad, weight, slope = normal(rows, depth), normal(depth, columns, seed=1) / depth**0.5, normal(rows, columns, seed=4)
        check_dgelu(*(tensor.to(dtype) for tensor in (grad, weight, slope)), dtype)


# rows, depth, columns: where blocks end, one row, ragged columns and depth, several tiles for a program
ON_A_GPU = [(1, 64, 256), (127, 192, 512), (129, 200, 264), (1000, 768, 3072), (3333, 3072, 768), (20_000, 384, 1536)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
@pytest.mark.parametrize("sizes", ON_A_GPU, ids=str)
def test_linear_gelu(sizes, gelu, dtype):
    check_gelu(layer(*sizes, dtype), gelu, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("wider", [False, True], ids=["residual as x", "residual in fp32"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", ON_A_GPU, ids=str)
def test_linear_add(sizes, dtype, wider):
    check_add(layer(*sizes, dtype), 10 * normal(sizes[0], sizes[2], seed=3).to(torch.float32 if wider else dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", ON_A_GPU, ids=str)
def test_dgelu(sizes, dtype):
    rows, depth, columns = sizes
    tensors = normal(rows, depth), normal(depth, columns, seed=1) / depth**0.5, normal(rows, columns, seed=4)
    check_dgelu(*(tensor.to(dtype) for tensor in tensors), dtype)


@pytest.mark.gpu
def test_layouts_that_tma_cannot_address():
    dtype = torch.bfloat16
    x, weight, bias = layer(300, 64, 128, dtype)
    shifted = torch.empty(300 * 64 + 1, device=DEVICE, dtype=dtype)[1:].view(300, 64).copy_(x)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :64], shifted):
        residual = normal(128, 300, seed=3).to(dtype).t()
        expected = linear.linear_add_forward(x, weight, bias, residual.contiguous(), None, TILES[ADD])
        assert torch.equal(linear.linear_add_forward(other, weight, bias, residual, None, TILES[ADD]), expected)
    x, weight, bias = layer(2000, 60, 90, dtype)
    check_gelu((x, weight, bias), "erf", dtype)
    check_add((x, weight, bias), normal(2000, 90), dtype)
    check_dgelu(normal(2000, 90).to(dtype), weight, normal(2000, 60).to(dtype), dtype)


@pytest.mark.gpu
def test_runs_repeat_on_any_number_of_programs(programs):
    x, weight, bias = layer(5000, 256, 1024, torch.bfloat16)
    residual, slope = normal(5000, 1024), normal(5000, 256).to(torch.bfloat16)

    def results():
        y, kept = linear.linear_gelu_forward(x, weight, bias, "erf", True, TILES[GELU])
        d_gelu = linear.dgelu_backward(y, weight, slope, TILES[DGELU])
        return y, kept, linear.linear_add_forward(x, weight, bias, residual, None, TILES[ADD]), *d_gelu

    expected = results()
    for count in (132, 132, 7):
        programs(count)
        for found, tensor in zip(results(), expected, strict=True):
            assert torch.equal(found, tensor)


def test_no_rows():
    x, weight, bias = torch.empty(0, 64, device=DEVICE, dtype=torch.bfloat16), *layer(1, 64, 256, torch.bfloat16)[1:]
    assert [tensor.shape for tensor in linear.linear_gelu_forward(x, weight, bias, "erf", True, TILES[GELU])] == [(0, 256), (0, 256)]
    assert linear.linear_add_forward(x, weight, bias, torch.empty(0, 256, device=DEVICE), None, TILES[ADD]).shape == (0, 256)
    d_pre, sums = linear.dgelu_backward(torch.empty(0, 256, device=DEVICE).bfloat16(), weight, x, TILES[DGELU])
    assert d_pre.shape == (0, 64)
    assert torch.equal(sums, torch.zeros_like(sums))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_many_rows_are_hoppers_and_portable_kernels_stay_for_others(dtype):
    for op in TILES:
        for features in (384, 768, 3072):
            assert pick(op, 90, dtype, tokens=1025, features=features).backend == "hopper"
            for other in (pick(op, 90, dtype, tokens=1024, features=features), pick(op, 100, dtype, tokens=1025, features=features)):
                assert other.backend == "triton"
            portable = pick(op, 90, dtype, tokens=1025, features=features, portable=True)
            assert portable.backend == "triton"
    assert pick(GELU, 90, torch.float32, tokens=1025, features=768).backend == "torch"


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(50_432, 3072, 256), (50_432, 768, 256), (25_216, 768, 256), (50_432, 384, 128), (2_000, 3072, 128), (2_000, 128, 128)],
)
def test_tiles_are_narrow_where_that_takes_less_time(rows, columns, expected):
    assert linear.block_n(rows, columns, 132, TILES[ADD]) == expected


def test_variants_name_every_argument_of_their_kernels():
    for row in TILES.values():
        variants = list(linear.variants(row, "bf16"))
        assert {variant.constants["STAGES"] for variant in variants if "STAGES" in variant.constants} == {3, 4}
        for variant in variants:
            assert {*variant.signature, *variant.constants} == set(variant.kernel.arg_names)
