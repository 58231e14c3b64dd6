"""The rule for Hopper's attention kernels: on such a GPU as they are, elsewhere run by the executor of Gluon kernels on a CPU."""

from contextlib import nullcontext

import pytest
from attention_cases import assert_obeys, gradient, plain
from compare import DEVICE, assert_within_rule
from gluon_executor import executing

from polyvit_kernels import reference, tiles
from polyvit_kernels.hopper import attention_short

IS_HOPPER = DEVICE.type == "cuda" and tiles.architecture(DEVICE) == 90
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="these kernels run on compute capability 9.0 alone")


def hopper_row(op, qkv):
    """The table's row for a packed projection where it is one of these kernels; they must be right whatever the table says."""
    tile = tiles.pick(op, 90, qkv.dtype, tokens=qkv.shape[1], features=qkv.shape[4])
    return tile if tile.backend == "hopper" else tiles.Tile(op=op, archs=(90,), backend="hopper")


def both_ways(qkv, grad):
    """(out, log-sums, packed gradient, its sums)"""
    with nullcontext() if IS_HOPPER else executing():
        out, lse = attention_short.forward(qkv, hopper_row("attention_short_forward", qkv))
        return out, lse, *attention_short.backward(grad, qkv, out, lse, hopper_row("attention_short_backward", qkv))


def assert_short_attention_obeys(qkv, grad, plain=plain):
    out, lse, dqkv, sums = both_ways(qkv, grad)
    assert dqkv.is_contiguous()
    assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, qkv.dtype, grad, plain)
    baseline = gradient(plain, qkv, grad).float().sum((0, 1))
    true = reference.attention_backward(qkv.double(), grad.double()).sum((0, 1))
    assert_within_rule({"sums": sums}, {"sums": baseline}, {"sums": true}, qkv.dtype)
    assert not sums[1].any()
