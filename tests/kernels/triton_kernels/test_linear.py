"""Matrix products with their epilogues, as kernels: truth is `reference.py` in fp64, compared with plain PyTorch at the same dtype."""

import pytest
import torch
from compare import DEVICE, assert_within_rule, one_thread
from samples import PLAIN_GELU, factors, normal, plain_slope
from torch.nn import functional

from polyvit_kernels import reference
from polyvit_kernels.tiles import Tile
from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.triton_kernels import linear

# In Triton's interpreter bf16 products are garbage.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
# rows, depth, columns: one row, sizes that blocks divide, sizes one off, odd ones
LONG_SIZES = [(64, 32, 64), (65, 40, 96), (90, 31, 33)]
SIZES = [(1, 16, 32), (33, 48, 40), (40, 17, 1), *(pytest.param(sizes, marks=pytest.mark.long) for sizes in LONG_SIZES)]


def tile(subtiles=2, **blocks):
    sizes = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 4, "EPILOGUE_SUBTILES": subtiles} | blocks
    return Tile(op="linear", archs=(), blocks=sizes)


def before_nan(tensor):
    """The same values with NaN behind them in memory: a kernel that reads beyond the end shows it."""
    memory = tensor.new_full((tensor.numel() + 10_000,), torch.nan)
    return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def layer(rows, depth, columns, dtype):
    """x, weight and bias of a linear layer whose output has a std of about 3."""
    tensors = 2 * normal(rows, depth), normal(columns, depth, seed=1) / depth**0.5, 2 * normal(columns, seed=2)
    return [before_nan(tensor.to(dtype)) for tensor in tensors]


def doubles(*tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf", "quick"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_gelu(sizes, gelu, dtype):
    tensors = layer(*sizes, dtype)
    y, slope = linear.linear_gelu_forward(*tensors, gelu, True, tile())
    plain = functional.linear(*tensors)
    plain_results = {"y": PLAIN_GELU[gelu](plain), "slope": plain_slope(plain, gelu)}
    pre = reference.linear(*doubles(*tensors))
    true = {"y": reference.gelu(pre, gelu), "slope": reference.gelu_backward(pre, gelu, torch.ones_like(pre))}
    assert_within_rule({"y": y, "slope": slope}, plain_results, true, dtype)
    alone, nothing = linear.linear_gelu_forward(*tensors, gelu, False, tile())
    assert torch.equal(alone, y)
    assert nothing.numel() == 0


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_add(sizes, dtype, residual_dtype):
    tensors = layer(*sizes, dtype)
    residual = before_nan(10 * normal(sizes[0], sizes[2], seed=3).to(residual_dtype))
    y = linear.linear_add_forward(*tensors, residual, None, tile())
    true = {"y": reference.linear_add(*doubles(*tensors, residual))}
    assert_within_rule({"y": y}, {"y": residual + functional.linear(*tensors)}, true, dtype)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("examples", [2, 36, *(pytest.param(count, marks=pytest.mark.long) for count in (1, 9))])
def test_linear_add_with_factors(examples, dtype, residual_dtype):
    tensors = layer(36, 31, 33, dtype)
    residual, some = before_nan(10 * normal(36, 33, seed=3).to(residual_dtype)), before_nan(factors(examples))
    y = linear.linear_add_forward(*tensors, residual, some, tile())
    rows = some.repeat_interleave(36 // examples)
    plain = residual + (rows[:, None] * functional.linear(*tensors)).to(y.dtype)
    true = residual.double() + rows.double()[:, None] * reference.linear(*doubles(*tensors))
    assert_within_rule({"y": y}, {"y": plain}, {"y": true}, dtype)
    assert torch.equal(y[rows == 0], residual[rows == 0].to(y.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dgelu(sizes, dtype):
    rows, depth, columns = sizes
    grad, weight, slope = normal(rows, depth), normal(depth, columns, seed=1) / depth**0.5, normal(rows, columns, seed=2)
    grad, weight, slope = (before_nan(tensor.to(dtype)) for tensor in (grad, weight, slope))
    d_pre, sums = linear.dgelu_backward(grad, weight, slope, tile())

    def expected(grad, weight, slope):
        d_pre = (grad @ weight) * slope
        return {"d_pre": d_pre, "sums": d_pre.sum(0)}

    with one_thread():
        plain_results = expected(grad, weight, slope)
    assert_within_rule({"d_pre": d_pre, "sums": sums}, plain_results, expected(*doubles(grad, weight, slope)), dtype)


@pytest.mark.parametrize(
    "blocks", [{"subtiles": 1}, {"subtiles": 4, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_K": 64}, {"GROUP_M": 1}], ids=str
)
def test_every_tile_gives_the_same(blocks):
    x, weight, bias = layer(40, 32, 40, torch.float32)
    residual, slope = normal(40, 40), normal(40, 40, seed=4)
    backward = linear.dgelu_backward(x, weight.t(), slope, tile())
    torch.testing.assert_close(linear.dgelu_backward(x, weight.t(), slope, tile(**blocks)), backward)
    for run in (
        lambda tile: linear.linear_gelu_forward(x, weight, bias, "erf", True, tile),
        lambda tile: linear.linear_add_forward(x, weight, bias, residual, None, tile),
    ):
        torch.testing.assert_close(run(tile(**blocks)), run(tile()))


@pytest.mark.parametrize("sizes", [(1, 1), (128, 16), (129, 40), (394, 17)], ids=str)
def test_partial_sums(sizes):
    partials = before_nan(normal(*sizes))
    torch.testing.assert_close(linear.sum_partials(partials, torch.float32), partials.sum(0))
    assert linear.sum_partials(partials, torch.float16).dtype is torch.float16


def test_layouts_and_gradients_that_repeat():
    x, weight, bias = normal(24, 20), normal(36, 24), normal(72)
    x, weight, bias, residual = x.t(), weight, bias[::2], normal(1, 36).expand(20, -1)
    torch.testing.assert_close(linear.linear_add_forward(x, weight, bias, residual, None, tile()), residual + x @ weight.t() + bias)
    grad = normal(1, 24).expand(20, -1)
    slope = normal(36, 20).t()
    expected = (grad @ weight.t()) * slope
    torch.testing.assert_close(linear.dgelu_backward(grad, weight.t(), slope, tile()), (expected, expected.sum(0)))


def test_no_rows():
    x, weight, bias = torch.empty(0, 16, device=DEVICE), normal(32, 16), normal(32)
    assert [tensor.shape for tensor in linear.linear_gelu_forward(x, weight, bias, "erf", True, tile())] == [(0, 32), (0, 32)]
    assert linear.linear_add_forward(x, weight, bias, torch.empty(0, 32, device=DEVICE), None, tile()).shape == (0, 32)
    d_pre, sums = linear.dgelu_backward(x, weight.t(), torch.empty(0, 32, device=DEVICE), tile())
    assert d_pre.shape == (0, 32)
    assert torch.equal(sums, torch.zeros_like(sums))


LINEAR_ROWS = [row for row in TABLE if row.op.startswith(("linear_", "dgelu_")) and row.backend == "triton"]


@pytest.mark.parametrize("row", LINEAR_ROWS, ids=lambda row: f"{row.op}-{row.archs[0]}-{row.tokens[0]}-{row.features}")
def test_variants_name_every_argument_of_their_kernels(row):
    variants = list(linear.variants(row, "bf16"))
    assert variants
    for variant in variants:
        assert list(variant.signature) == [name for name in variant.kernel.arg_names if name in variant.signature]
        assert {*variant.signature, *variant.constants} == set(variant.kernel.arg_names)
