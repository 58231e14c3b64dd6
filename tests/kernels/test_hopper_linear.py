"""Hopper's linear layers: executed on a CPU where there is no GPU, and there in bf16 and fp16; truth is `reference.py` in fp64."""

import pytest
import torch
from compare import DEVICE, assert_within_rule, one_thread
from gluon_executor import executing
from samples import normal
from torch.nn import functional

from polyvit_kernels import linear as portable
from polyvit_kernels import reference
from polyvit_kernels.hopper import linear
from polyvit_kernels.tile_table import _MLP_HOPPER
from polyvit_kernels.tiles import pick

HALF = [torch.bfloat16, torch.float16]
APPROXIMATE = {"tanh": "tanh", "erf": "none"}
TILES = {row.op: row for row in _MLP_HOPPER}
GELU, ADD, UNDO = "linear_gelu_forward", "linear_add_forward", "dgelu_backward"


def layer(rows, depth, columns, dtype):
    """x, weight and bias of a linear layer whose output has a deviation of about 3."""
    tensors = 2 * normal(rows, depth), normal(columns, depth, seed=1) / depth**0.5, 2 * normal(columns, seed=2)
    return [tensor.to(dtype) for tensor in tensors]


def doubles(*tensors):
    return [tensor.double() for tensor in tensors]


def slope_of(pre, gelu):
    return torch.ops.aten.gelu_backward(torch.ones_like(pre), pre, approximate=APPROXIMATE[gelu])


def check_gelu(tensors, gelu, dtype):
    y, slope = linear.linear_gelu_forward(*tensors, gelu, True, TILES[GELU])
    plain, pre = functional.linear(*tensors), reference.linear(*doubles(*tensors))
    yardstick = {"y": functional.gelu(plain, approximate=APPROXIMATE[gelu]), "slope": slope_of(plain, gelu)}
    true = {"y": reference.gelu(pre, gelu), "slope": reference.gelu_backward(pre, gelu, torch.ones_like(pre))}
    assert_within_rule({"y": y, "slope": slope}, yardstick, true, dtype)
    alone, nothing = linear.linear_gelu_forward(*tensors, gelu, False, TILES[GELU])
    assert torch.equal(alone, y)
    assert nothing.numel() == 0


def check_add(tensors, residual, dtype):
    y = linear.linear_add_forward(*tensors, residual, TILES[ADD])
    true = {"y": reference.linear_add(*doubles(*tensors, residual))}
    assert_within_rule({"y": y}, {"y": residual + functional.linear(*tensors)}, true, dtype)


def check_undo(grad, weight, slope, dtype):
    d_pre, sums = linear.dgelu_backward(grad, weight, slope, TILES[UNDO])
    assert sums.dtype is torch.float32

    def expected(grad, weight, slope):
        d_pre = (grad @ weight) * slope
        return {"d_pre": d_pre, "sums": d_pre.sum(0)}

    with one_thread():
        yardstick = expected(grad, weight, slope)
    assert_within_rule({"d_pre": d_pre, "sums": sums.to(dtype)}, yardstick, expected(*doubles(grad, weight, slope)), dtype)


# rows, depth, columns, programs at once: tiles of 128 and of 256 columns, whole and ragged, one program for all and several
EXECUTED = [(1, 64, 256, 3), (127, 192, 512, 1), (128, 200, 264, 2), (129, 64, 512, 2), (333, 200, 264, 2), (333, 192, 512, 3)]


@pytest.fixture
def programs(monkeypatch):
    """Sets how many run at once."""
    return lambda count: monkeypatch.setattr(linear, "num_processors", lambda _: count)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the executor is for where no GPU is")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sizes", EXECUTED, ids=str)
def test_executed(sizes, seed, programs):
    rows, depth, columns, count = sizes
    programs(count)
    dtype = HALF[seed]
    tensors = layer(rows, depth, columns, dtype)
    with executing(seed=seed):
        check_gelu(tensors, ("erf", "tanh")[seed], dtype)
        for residual_dtype in (torch.float32, dtype):
            check_add(tensors, 10 * normal(rows, columns, seed=3).to(residual_dtype), dtype)
        grad, weight, slope = normal(rows, depth), normal(depth, columns, seed=1) / depth**0.5, normal(rows, columns, seed=4)
        check_undo(*(tensor.to(dtype) for tensor in (grad, weight, slope)), dtype)
