"""Hopper's kernels for at most 256 tokens, as the tile table launches them, against the reference."""

import pytest
import torch
from attention_cases import library, negative_scores, upstream
from hopper_cases import assert_short_attention_obeys, both_ways, needs_hopper
from samples import activations, normal

from polyvit_kernels.hopper import attention_short
from polyvit_kernels.tiles.table import TABLE

ROWS = [tile for tile in TABLE if tile.backend == "hopper" and tile.op.startswith("attention_short")]
HALVES = [torch.bfloat16, torch.float16]


def packed_normal(tokens, head_dim, dtype, *, batch=2, heads=2):
    """(projection, gradient by the output)"""
    return normal(batch, tokens, 3, heads, head_dim).to(dtype), normal(batch, tokens, heads, head_dim, seed=9).to(dtype)


@pytest.mark.parametrize(
    "tokens", [1, 64, 127, *(pytest.param(n, marks=pytest.mark.long) for n in (16, 49, 63, 128, 191, 192, 209, 255, 256))]
)
def test_every_length_of_blocks(tokens):
    assert_short_attention_obeys(*packed_normal(tokens, 64, torch.bfloat16))


LONG_WIDTHS = [(32, 197), (48, 100), (80, 256), (96, 70)]


@pytest.mark.parametrize(
    ("head_dim", "tokens"), [(16, 50), (80, 110), (128, 50), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in LONG_WIDTHS)]
)
def test_every_width(head_dim, tokens):
    assert_short_attention_obeys(*packed_normal(tokens, head_dim, torch.float16, batch=1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [50, 197])
def test_scores_far_below_zero(tokens, dtype):
    """The score of a key beyond the end, 0, is then far above all others."""
    qkv = negative_scores(tokens, 32, dtype)
    assert_short_attention_obeys(qkv, upstream(qkv), library)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
        ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
        ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
        ((2 * 65 * 3 * 2 * 32 + 1,), lambda leaf: leaf[1:].view(2, 65, 3, 2, 32)),
    ],
    ids=["inside a wider buffer", "heads before tokens", "one example repeated", "at an odd address"],
)
def test_every_layout(shape, view):
    qkv = view(normal(*shape).to(torch.bfloat16))
    assert_short_attention_obeys(qkv, upstream(qkv))


# The executor computes with numpy, which warns of what the test is about.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("row", [5, 67])
def test_a_row_that_is_not_finite_spoils_its_own_outputs_only(row):
    qkv, grad = packed_normal(70, 32, torch.bfloat16, batch=1, heads=1)
    whole = both_ways(qkv, grad)[0]
    qkv[0, row, 0] = float("inf")
    out = both_ways(qkv, grad)[0]
    assert out[0, row].isnan().all()
    others = torch.arange(70) != row
    assert torch.equal(out[:, others], whole[:, others])


def test_runs_repeat_bit_for_bit():
    inputs = packed_normal(197, 64, torch.bfloat16, batch=1, heads=1)
    for first, second in zip(both_ways(*inputs), both_ways(*inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 32), (2, 5, 3, 0, 32)])
def test_nothing_gives_nothing(shape):
    qkv = normal(*shape).to(torch.bfloat16)
    out, _, dqkv, sums = both_ways(qkv, qkv[:, :, 0])
    assert (out.shape, dqkv.shape, sums.shape) == ((*shape[:2], *shape[3:]), shape, shape[2:])
    assert not sums.any()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80])
@pytest.mark.parametrize("tokens", [1, 17, 50, 64, 65, 96, 128, 129, 145, 160, 161, 192, 196, 197, 208, 256])
def test_every_length_and_width_on_a_gpu(tokens, head_dim, dtype):
    assert_short_attention_obeys(*packed_normal(tokens, head_dim, dtype, batch=3, heads=5))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [197, 209, 224, 255])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_large_scores_and_outlier_channels(tokens, head_dim, dtype):
    qkv = (activations(2, tokens, 3, 2, head_dim) / 30).to(dtype)
    assert_short_attention_obeys(qkv, upstream(qkv))


@pytest.mark.gpu
@needs_hopper
def test_many_programs_repeat_bit_for_bit():
    """More of them than a GPU holds at once, in another order each time."""
    inputs = packed_normal(197, 64, torch.bfloat16, batch=64, heads=12)
    expected = both_ways(*inputs)
    for _ in range(20):
        assert all(map(torch.equal, both_ways(*inputs), expected))


@pytest.mark.gpu
@needs_hopper
def test_the_registered_operation_gives_the_sums():
    qkv, grad = packed_normal(197, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.polyvit.attention, (qkv.clone().requires_grad_(),))
    out, lse = torch.ops.polyvit.attention(qkv)
    torch.library.opcheck(torch.ops.polyvit.attention_backward, (grad, qkv, out, lse))
    for found, expected in zip(torch.ops.polyvit.attention_backward(grad, qkv, out, lse), both_ways(qkv, grad)[2:], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tile", ROWS, ids=lambda tile: f"{tile.op}-{tile.tokens}-{tile.features}")
def test_variants_name_every_argument(tile):
    variants = list(attention_short.variants(tile, "bf16"))
    assert variants
    for variant in variants:
        assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
        assert not variant.signature.keys() & variant.constants.keys()
        assert set(variant.divisible) <= variant.signature.keys()
        assert (variant.constants["HEAD_DIM"], variant.max_registers) == (tile.features, tile.max_registers)
