"""The kernels for at most 256 tokens, with the blocks of the tile table, against the reference."""

import pytest
import torch
from attention_cases import ARCH, DTYPES, assert_obeys, library, negative_scores, plain, row, upstream
from samples import activations, normal

from polyvit_kernels import tiles
from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.triton_kernels import attention_short


def backward_row(tokens, head_dim):
    """Of the table where it has one; the kernel must be right whatever the table says."""
    backward = row("attention_short_backward", tokens, head_dim)
    if backward.backend == "triton":
        return backward
    blocks = {"BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()), "BLOCK_M": max(16, 1 << (tokens - 1).bit_length()), "BLOCK_N": 32}
    return tiles.Tile(op="attention_short_backward", archs=(ARCH,), blocks=blocks, num_warps=8)


def assert_kernels_obey(qkv, dtype, plain=plain):
    qkv = qkv.to(dtype)
    tokens, head_dim = qkv.shape[1], qkv.shape[4]
    out, lse = attention_short.forward(qkv, row("attention_short_forward", tokens, head_dim))
    grad = upstream(qkv)
    dqkv, sums = attention_short.backward(grad, qkv, out, lse, backward_row(tokens, head_dim))
    assert not sums.numel()
    assert dqkv.is_contiguous()
    assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, dtype, grad, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens",
    [
        *(1, 64, 145),
        *(pytest.param(n, marks=pytest.mark.long) for n in (2, 15, 16, 63, 65, 127, 128, 129, 192, 196, 197, 198, 209, 256)),
    ],
)
def test_every_length(tokens, dtype):
    assert_kernels_obey(normal(2, tokens, 3, 1, 64), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [65, pytest.param(130, marks=pytest.mark.long)])
@pytest.mark.parametrize("head_dim", [8, 80, *(pytest.param(n, marks=pytest.mark.long) for n in (32, 48, 72, 96, 104, 128))])
def test_every_width(head_dim, tokens, dtype):
    assert_kernels_obey(normal(1, tokens, 3, 2, head_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_outlier_channels(dtype):
    # Torch's own fused attention is the baseline: its backward, too, computes the probabilities again from the sums' logarithms, which of
    # large scores are a little less exact than probabilities that were kept.
    assert_kernels_obey(activations(1, 197, 3, 1, 64) / 30, dtype, library)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [50, 197])
def test_scores_far_below_zero(tokens, dtype):
    """The score of a key beyond the end, 0, is then far above all others."""
    assert_kernels_obey(negative_scores(tokens, 32, dtype), dtype, plain if dtype is torch.float32 else library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
        ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
        ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
        ((2, 65, 3, 1, 32), lambda leaf: leaf.expand(-1, -1, -1, 2, -1)),
    ],
    ids=["inside a wider buffer", "heads before tokens", "one example repeated", "one head repeated"],
)
def test_every_layout(shape, view, dtype):
    qkv = view(normal(*shape).to(dtype))
    tile = row("attention_short_forward", qkv.shape[1], 32)
    out, lse = attention_short.forward(qkv, tile)
    grad = upstream(qkv)
    dqkv, _ = attention_short.backward(grad, qkv, out, lse, row("attention_short_backward", qkv.shape[1], 32))
    assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, dtype, grad)


# The interpreter computes with numpy, which warns of what the test is about.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_is_not_finite_spoils_its_own_outputs_only():
    qkv = normal(1, 70, 3, 1, 32)
    whole, _ = attention_short.forward(qkv, row("attention_short_forward", 70, 32))
    qkv[0, 5, 0] = float("inf")
    out, _ = attention_short.forward(qkv, row("attention_short_forward", 70, 32))
    assert out[0, 5].isnan().all()
    others = torch.arange(70) != 5
    assert torch.equal(out[:, others], whole[:, others])


def test_runs_repeat_bit_for_bit():
    qkv = normal(1, 197, 3, 1, 64).to(DTYPES[0])
    forward, backward = row("attention_short_forward", 197, 64), backward_row(197, 64)
    out, lse = attention_short.forward(qkv, forward)
    first, second = (attention_short.backward(out, qkv, out, lse, backward)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 32), (2, 0, 3, 2, 32), (2, 5, 3, 0, 32)])
def test_nothing_gives_nothing(shape):
    qkv = normal(*shape)
    out, lse = attention_short.forward(qkv, row("attention_short_forward", 5, 32))
    dqkv, _ = attention_short.backward(out, qkv, out, lse, row("attention_short_backward", 5, 32))
    assert (out.shape, dqkv.shape) == ((shape[0], shape[1], shape[3], 32), shape)


def test_the_keys_of_every_row_hold_its_tokens_and_only_the_last_chunk_may_exceed_them():
    rows = [tile for tile in TABLE if tile.op == "attention_short_forward" and tile.backend == "triton"]
    for tile in rows:
        low, high = tile.tokens
        chunks = [size for size in (tile.blocks[f"KEYS_{i}"] for i in range(3)) if size]
        assert sum(chunks) >= high
        assert sum(chunks[:-1]) < low
    for tile in (tile for tile in TABLE if tile.op == "attention_short_backward" and tile.backend == "triton"):
        assert tile.blocks["BLOCK_M"] >= tile.tokens[1]


@pytest.mark.parametrize("op", ["attention_short_forward", "attention_short_backward"])
def test_variants_name_every_argument(op):
    (variant,) = attention_short.variants(row(op, 128, 64), "bf16")
    assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
    assert not variant.signature.keys() & variant.constants.keys()
    assert set(variant.divisible) <= variant.signature.keys()
    assert variant.constants["HEAD_DIM"] == 64
