"""Matrix products with their epilogues, as kernels: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE, assert_within_rule, largest_difference, one_thread
from samples import factors, normal
from torch.nn import functional

from polyvit_kernels import reference
from polyvit_kernels.tiles import Tile
from polyvit_kernels.tiles.table import _MLP
from polyvit_kernels.triton_kernels import linear
from polyvit_kernels.triton_kernels.linear import gelu as kernel_gelu
from polyvit_kernels.triton_kernels.linear import gelu_and_slope as kernel_gelu_and_slope

# In Triton's interpreter bf16 products are garbage.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
APPROXIMATE = {"tanh": "tanh", "erf": "none"}
# rows, depth, columns: one row, sizes that blocks divide, sizes beside them, odd ones
SIZES = [(1, 16, 32), (64, 32, 64), (63, 48, 40), (65, 40, 96), (90, 31, 33), (70, 17, 1)]


def tile(parts=2, **blocks):
    sizes = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 4, "PARTS": parts} | blocks
    return Tile(op="linear", archs=(), blocks=sizes)


def before_nan(tensor):
    """The same values with NaN behind them in memory: a kernel that reads beyond the end shows it."""
    memory = tensor.new_full((tensor.numel() + 10_000,), torch.nan)
    return memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def layer(rows, depth, columns, dtype):
    """x, weight and bias of a linear layer whose output has a deviation of about 3."""
    tensors = 2 * normal(rows, depth), normal(columns, depth, seed=1) / depth**0.5, 2 * normal(columns, seed=2)
    return [before_nan(tensor.to(dtype)) for tensor in tensors]


def doubles(*tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_gelu(sizes, gelu, dtype):
    tensors = layer(*sizes, dtype)
    y, slope = linear.linear_gelu_forward(*tensors, gelu, True, tile())
    plain = functional.linear(*tensors)
    plain_slope = torch.ops.aten.gelu_backward(torch.ones_like(plain), plain, approximate=APPROXIMATE[gelu])
    yardstick = {"y": functional.gelu(plain, approximate=APPROXIMATE[gelu]), "slope": plain_slope}
    pre = reference.linear(*doubles(*tensors))
    true = {"y": reference.gelu(pre, gelu), "slope": reference.gelu_backward(pre, gelu, torch.ones_like(pre))}
    assert_within_rule({"y": y, "slope": slope}, yardstick, true, dtype)
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
@pytest.mark.parametrize("examples", [1, 2, 9, 90])
def test_linear_add_with_factors(examples, dtype, residual_dtype):
    tensors = layer(90, 31, 33, dtype)
    residual, some = before_nan(10 * normal(90, 33, seed=3).to(residual_dtype)), before_nan(factors(examples))
    y = linear.linear_add_forward(*tensors, residual, some, tile())
    rows = some.repeat_interleave(90 // examples)
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
        yardstick = expected(grad, weight, slope)
    assert_within_rule({"d_pre": d_pre, "sums": sums}, yardstick, expected(*doubles(grad, weight, slope)), dtype)


@pytest.mark.parametrize("blocks", [{"parts": 1}, {"parts": 4, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_K": 64}, {"GROUP_M": 1}], ids=str)
def test_every_tile_gives_the_same(blocks):
    x, weight, bias = layer(70, 32, 40, torch.float32)
    residual, slope = normal(70, 40), normal(70, 40, seed=4)
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


@triton.jit
def gelu_kernel(p_x, p_y, p_slope, p_gelu, GELU: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr):
    i_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_x)
    b_y, b_slope = kernel_gelu_and_slope(b_x, GELU, PRECISE)
    tl.store(p_y + i_x, b_y)
    tl.store(p_slope + i_x, b_slope)
    tl.store(p_gelu + i_x, kernel_gelu(b_x, GELU, PRECISE))


def gelu_and_slope(x, gelu, precise):
    y, slope, again = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, slope, again, GELU=gelu, PRECISE=precise, BLOCK=4096)
    assert torch.equal(again, y)
    return y, slope


@pytest.mark.parametrize(("gelu", "error", "relative"), [("erf", 7e-7, 6e-6), ("tanh", 1.6e-5, 1e-4)])
def test_the_fits_are_as_exact_as_said(gelu, error, relative):
    x = torch.linspace(-14, 14, 32 * 4096, device=DEVICE)
    y, slope = gelu_and_slope(x, gelu, precise=False)
    true = reference.gelu(x.double(), gelu)
    assert largest_difference(y, true) < error
    tail = (x < 0) & (true < -1e-6)
    assert ((y - true) / true)[tail].abs().max() < relative
    # The slope is the share, and x times its slope: two errors of the fit, the second one scaled up.
    assert largest_difference(slope, reference.gelu_backward(x.double(), gelu, torch.ones_like(true))) < 4 * error


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("precise", [False, True])
def test_far_away_gelu_is_the_identity_or_zero(precise, gelu):
    far = torch.cat([torch.linspace(15, 200, 4096, device=DEVICE), torch.logspace(2, 4.5, 4096, device=DEVICE)])
    for x, slope in ((far, 1.0), (-far, 0.0)):
        y, slopes = gelu_and_slope(x, gelu, precise)
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(slopes, torch.full_like(x, slope))


@pytest.mark.parametrize("row", _MLP, ids=lambda row: f"{row.op}-{row.archs[0]}-{row.tokens[0]}-{row.features}")
def test_variants_name_every_argument_of_their_kernels(row):
    variants = list(linear.variants(row, "bf16"))
    assert variants
    for variant in variants:
        assert list(variant.signature) == [name for name in variant.kernel.arg_names if name in variant.signature]
        assert {*variant.signature, *variant.constants} == set(variant.kernel.arg_names)
