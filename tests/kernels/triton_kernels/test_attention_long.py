"""The kernels for any number of tokens, with the blocks of the tile table, against the reference."""

import pytest
import torch
from attention_cases import DTYPES, assert_obeys, library, negative_scores, plain, row, upstream
from compare import DEVICE
from samples import activations, normal

from polyvit_kernels.triton_kernels import attention_long


def tiles_of(tokens, head_dim):
    return row("attention_long_forward", tokens, head_dim), row("attention_long_backward", tokens, head_dim)


def assert_kernels_obey(qkv, dtype, plain=plain):
    forward, backward = tiles_of(qkv.shape[1], qkv.shape[4])
    out, lse = attention_long.forward(qkv, forward)
    grad = upstream(qkv)
    dqkv, sums = attention_long.backward(grad, qkv, out, lse, backward)
    assert not sums.numel()
    assert dqkv.is_contiguous()
    assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, dtype, grad, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens", [1, 65, 257, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 63, 64, 128, 129, 192, 197, 256, 401, 576, 577))]
)
def test_every_length(tokens, dtype):
    assert_kernels_obey(normal(2 if tokens < 200 else 1, tokens, 3, 1, 64).to(dtype), dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1568, 1569] if DEVICE.type == "cpu" else [1212, 1568, 1569, 3137, 8192])
def test_clips(tokens, dtype):
    assert_kernels_obey(normal(1, tokens, 3, 1, 32).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 80, *(pytest.param(n, marks=pytest.mark.long) for n in (32, 48, 72, 96, 104, 128))])
def test_every_width(head_dim, dtype):
    assert_kernels_obey(normal(1, 130, 3, 2, head_dim).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_outlier_channels(dtype):
    assert_kernels_obey((activations(1, 150, 3, 1, 64) / 30).to(dtype), dtype)


# Keys beyond the end get gradients that are not finite and not stored; numpy warns of them.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_scores_far_below_zero(dtype):
    """The score of a key beyond the end, 0, is then far above all others."""
    assert_kernels_obey(negative_scores(150, 32, dtype), dtype, plain if dtype is torch.float32 else library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((3, 90, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
        ((2, 3, 2, 85, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
        ((1, 85, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
    ],
    ids=["inside a wider buffer", "heads before tokens", "one example repeated"],
)
def test_every_layout(shape, view, dtype):
    assert_kernels_obey(view(normal(*shape).to(dtype)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[5, 130, 1, 0, 64, 65], pytest.param([300], marks=pytest.mark.long), [0, 0, 7]], ids=str)
def test_varlen_sequences_are_what_they_are_alone(lengths, dtype):
    cu_tokens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv, grad = normal(sum(lengths), 3, 2, 64).to(dtype), normal(sum(lengths), 2, 64, seed=1).to(dtype)
    forward, backward = tiles_of(max(lengths), 64)
    out, lse = attention_long.forward(qkv, forward, cu_tokens, max(lengths))
    dqkv, _ = attention_long.backward(grad, qkv, out, lse, backward, cu_tokens, max(lengths))
    for first, last in zip(cu_tokens[:-1].tolist(), cu_tokens[1:].tolist(), strict=True):
        if first < last:
            rows = slice(first, last)
            found = {"out": out[None, rows], "dqkv": dqkv[None, rows]}
            assert_obeys(qkv[None, rows], found, lse[None, :, rows], dtype, grad[None, rows])


def test_max_tokens_may_be_more_than_the_longest_sequence_has():
    cu_tokens = torch.tensor([0, 20, 50], dtype=torch.int32, device=DEVICE)
    qkv = normal(50, 3, 2, 32).to(DTYPES[0])
    forward, _ = tiles_of(300, 32)
    exact, _ = attention_long.forward(qkv, forward, cu_tokens, 30)
    longer, _ = attention_long.forward(qkv, forward, cu_tokens, 300)
    assert torch.equal(exact, longer)


def test_runs_repeat_bit_for_bit():
    qkv = normal(1, 130, 3, 2, 32).to(DTYPES[0])
    forward, backward = tiles_of(260, 32)
    out, lse = attention_long.forward(qkv, forward)
    first, second = (attention_long.backward(out, qkv, out, lse, backward)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("op", ["attention_long_forward", "attention_long_backward"])
def test_variants_name_every_argument(op):
    for variant in attention_long.variants(row(op, 1212, 64), "bf16"):
        assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
        assert not variant.signature.keys() & variant.constants.keys()
        assert set(variant.divisible) <= variant.signature.keys()
