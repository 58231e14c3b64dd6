"""Hopper's attention of any number of tokens: executed on the CPU where there is no GPU; truth is `reference.py` in fp64."""

import pytest
import torch
from attention_cases import assert_obeys, library, negative_scores, plain, upstream
from compare import DEVICE
from gluon_executor import executing
from samples import activations, normal

from polyvit_kernels import tiles
from polyvit_kernels.hopper import attention_long

HALF = [torch.bfloat16, torch.float16]
on_a_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="the executor is for machines without a GPU")
RAGGED = [1, 63, 64, 0, 65, 130, 300]


def tiles_of(tokens, head_dim):
    return [tiles.pick(f"attention_long_{way}", 90, torch.bfloat16, tokens=tokens, features=head_dim) for way in ("forward", "backward")]


def both_ways(qkv, grad, cu_tokens=None, longest=0):
    forward, backward = tiles_of(longest or qkv.shape[1], qkv.shape[-1])
    assert (forward.backend, backward.backend) == ("hopper", "hopper")
    out, lse = attention_long.forward(qkv, forward, cu_tokens, longest)
    dqkv, sums = attention_long.backward(grad, qkv, out, lse, backward, cu_tokens, longest)
    assert dqkv.is_contiguous()
    assert not sums.numel()
    return out, lse, dqkv


def check(qkv, dtype, plain=plain):
    qkv = qkv.to(dtype)
    grad = upstream(qkv)
    out, lse, dqkv = both_ways(qkv, grad)
    assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, dtype, grad, plain)


def check_varlen(lengths, head_dim, dtype, longest=0):
    cu_tokens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv, grad = normal(sum(lengths), 3, 2, head_dim).to(dtype), normal(sum(lengths), 2, head_dim, seed=1).to(dtype)
    out, lse, dqkv = both_ways(qkv, grad, cu_tokens, longest or max(lengths))
    for first, last in zip(cu_tokens[:-1].tolist(), cu_tokens[1:].tolist(), strict=True):
        if first < last:
            rows = slice(first, last)
            found = {"out": out[None, rows], "dqkv": dqkv[None, rows]}
            assert_obeys(qkv[None, rows], found, lse[None, :, rows], dtype, grad[None, rows])


def check_that_infinity_spoils_its_own_row_alone(dtype):
    """As a query: its output and dQ. Keys and values of all rows get a gradient from every query."""
    qkv = normal(1, 300, 3, 1, 64).to(dtype)
    qkv[0, 7, 0] = torch.inf
    out, _, dqkv = both_ways(qkv, normal(1, 300, 1, 64).to(dtype))
    for found in (out[0], dqkv[0, :, 0]):
        assert [row for row in range(300) if not found[row].isfinite().all()] == [7]


def check_that_infinity_stays_in_its_sequence(dtype):
    cu_tokens = torch.tensor([0, 70, 140, 300], dtype=torch.int32, device=DEVICE)
    qkv, grad = normal(300, 3, 1, 64).to(dtype), normal(300, 1, 64, seed=1).to(dtype)
    expected = both_ways(qkv, grad, cu_tokens, 160)
    qkv[70:140], grad[70:140] = torch.inf, torch.nan
    for found, clean in zip(both_ways(qkv, grad, cu_tokens, 160), expected, strict=True):
        found, clean = (x.t() if x.ndim == 2 else x for x in (found, clean))
        assert torch.equal(found[:70], clean[:70])
        assert torch.equal(found[140:], clean[140:])


@pytest.fixture
def programs(monkeypatch):
    """Sets how many run at once."""
    return lambda count: monkeypatch.setattr(attention_long, "num_sms", lambda _: count)


@on_a_cpu
@pytest.mark.parametrize(
    ("tokens", "seed"), [(257, 0), *(pytest.param(*case, marks=pytest.mark.long) for case in ((320, 1), (401, 2), (577, 3)))]
)
def test_executed(tokens, seed, programs):
    programs(3)
    with executing(seed=seed):
        check(normal(1, tokens, 3, 2 if tokens < 400 else 1, 64), HALF[seed % 2])


@on_a_cpu
@pytest.mark.parametrize("head_dim", [16, 80, *(pytest.param(n, marks=pytest.mark.long) for n in (32, 48))])
def test_executed_at_every_width(head_dim, programs):
    programs(2)
    with executing():
        check(normal(2, 130, 3, 1, head_dim), torch.bfloat16)


@on_a_cpu
@pytest.mark.parametrize(("head_dim", "seed"), [(32, 0), *(pytest.param(*case, marks=pytest.mark.long) for case in ((64, 1), (80, 2)))])
def test_executed_varlen(head_dim, seed, programs):
    programs(5)
    with executing(seed=seed):
        check_varlen(RAGGED if head_dim == 64 else RAGGED[:5], head_dim, HALF[seed % 2], longest=400)


@on_a_cpu
def test_executed_with_infinities(programs):
    programs(2)
    with executing():
        check_that_infinity_spoils_its_own_row_alone(torch.bfloat16)
        check_that_infinity_stays_in_its_sequence(torch.bfloat16)


@on_a_cpu
def test_executed_with_scores_far_below_zero(programs):
    """The score of a key beyond the end, 0, is then far above all others."""
    programs(2)
    with executing():
        check(negative_scores(300, 32, torch.bfloat16), torch.bfloat16, library)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 197, 256, 257, 401, 577, 1212, 1569, 3137])
def test_every_length(tokens, dtype):
    check(normal(2 if tokens < 1000 else 1, tokens, 3, 3, 64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80])
def test_every_width(head_dim, dtype):
    check(normal(3, 333, 3, 5, head_dim), dtype)
    check_varlen(RAGGED, head_dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_spoils_and_what_does_not(dtype):
    check(activations(1, 300, 3, 2, 64) / 30, dtype)
    check(negative_scores(300, 32, dtype), dtype, library)
    check_that_infinity_spoils_its_own_row_alone(dtype)
    check_that_infinity_stays_in_its_sequence(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((3, 300, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
        ((2, 3, 2, 285, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
        ((1, 285, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
    ],
    ids=["inside a wider buffer", "heads before tokens", "one example repeated"],
)
def test_every_layout(shape, view):
    check(view(normal(*shape).to(torch.bfloat16)), torch.bfloat16)


@pytest.mark.gpu
def test_runs_repeat_on_any_number_of_programs(programs):
    qkv, grad = normal(4, 577, 3, 6, 64).to(torch.bfloat16), normal(4, 577, 6, 64, seed=1).to(torch.bfloat16)
    expected = both_ways(qkv, grad)
    for count in (132, 132, 7, 1):
        programs(count)
        assert all(torch.equal(one, other) for one, other in zip(both_ways(qkv, grad), expected, strict=True))


@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_variants_name_every_argument(way, head_dim):
    tile = dict(zip(("forward", "backward"), tiles_of(401, head_dim), strict=True))[way]
    variants = list(attention_long.variants(tile, "bf16"))
    assert len(variants) == (2 if way == "forward" else 4)
    for variant in variants:
        assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
        assert not variant.signature.keys() & variant.constants.keys()
        assert set(variant.divisible) <= variant.signature.keys()
