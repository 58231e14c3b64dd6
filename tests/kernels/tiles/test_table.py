"""The rows themselves."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyvit_kernels.tiles import Tile, pick
from polyvit_kernels.tiles import table as tile_table
from polyvit_kernels.tiles.table import MEASURED, TABLE

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"

ARCHS = (80, 86, 89, 90, 100, 120)
TOKENS = (1, 50, 65, 145, 197, 256, 257, 401, 1212, 3137, 8192)
OPS = sorted({tile.op for tile in TABLE})


def test_no_row_is_hidden_by_an_earlier_one():
    for index, tile in enumerate(TABLE):
        for earlier in TABLE[:index]:
            hidden = (
                earlier.op == tile.op
                and (earlier.backend != "hopper" or tile.backend == "hopper")  # a portable row serves where those are passed over
                and set(tile.archs) <= set(earlier.archs)
                and set(tile.dtypes) <= set(earlier.dtypes)
                and earlier.tokens[0] <= tile.tokens[0]
                and earlier.tokens[1] >= tile.tokens[1]
                and earlier.features >= tile.features
            )
            assert not hidden, f"{tile} is never reached: {earlier} comes first"


@pytest.mark.parametrize("op", OPS)
def test_every_gpu_has_rows_of_every_operation(op):
    assert {arch for tile in TABLE if tile.op == op for arch in tile.archs} == set(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_attention_has_kernels_each_way(arch):
    for dtype, tokens, head_dim in itertools.product((torch.bfloat16, torch.float16), TOKENS, (8, 32, 64, 72, 80, 96, 128)):
        for direction in ("forward", "backward"):
            tile = pick(f"attention_long_{direction}", arch, dtype, tokens=tokens, features=head_dim)
            is_portable = arch != 90 or head_dim > 80 or (tokens, head_dim, direction) == (256, 64, "backward")  # as short ones go on there
            assert tile.backend == ("triton" if is_portable else "hopper"), (dtype, tokens, head_dim, direction)


def test_heads_wider_than_128_are_torchs():
    assert pick("attention", 90, torch.bfloat16, tokens=197, features=136).backend == "torch"


def test_counts_are_powers_of_two():
    for tile in TABLE:
        if tile.backend == "triton":
            assert tile.num_warps in (1, 2, 4, 8, 16)
            assert 1 <= tile.num_stages <= 5


def test_every_choice_says_where_it_comes_from():
    files = {tile.source for tile in TABLE} - {"compiled", "published"}
    assert files
    assert not [file for file in files if not (RESULTS / file).is_file()]


def test_measured_rows_are_those_of_the_gpu_that_their_file_names():
    assert {(tile.archs, tile.source.partition("/")[0]) for tile in MEASURED} == {((90,), "nvidia-h100-80gb-hbm3")}


def test_a_measured_row_replaces_the_compiled_one_on_its_own_gpu(monkeypatch):
    compiled = Tile(op="a", archs=(80, 90), features=64)
    monkeypatch.setattr(tile_table, "MEASURED", (Tile(op="a", archs=(90,), features=64, num_warps=8, source="measured"),))
    others = [replace(compiled, **change) for change in ({"op": "b"}, {"tokens": (1, 64)}, {"dtypes": ("fp32",)}, {"backend": "hopper"})]
    assert list(tile_table._exclude_measured([compiled, *others])) == [replace(compiled, archs=(80,)), *others]
    assert list(tile_table._exclude_measured([replace(compiled, archs=(90,))])) == []


@pytest.mark.parametrize("tokens", [129, 197, 256])
def test_hoppers_portable_backward_beyond_128_tokens_is_the_two_phase_kernel_that_was_timed(tokens):
    sizes = {"tokens": tokens, "features": 64, "portable": True}
    assert pick("attention_short_backward", 90, torch.bfloat16, **sizes).backend == "torch"
    tile = pick("attention_long_backward", 90, torch.bfloat16, **sizes)
    assert (set(tile.blocks.values()), tile.num_warps, tile.num_stages) == ({64}, 4, 1)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80])
@pytest.mark.parametrize("tokens", [1, 50, 197, 208])
def test_hopper_has_kernels_of_its_own_for_short_attention(tokens, head_dim, direction):
    sizes = {"tokens": tokens, "features": head_dim}
    assert pick(f"attention_short_{direction}", 90, torch.float16, **sizes).backend == "hopper"
    assert pick(f"attention_short_{direction}", 90, torch.float16, **sizes, portable=True).backend != "hopper"
    assert pick(f"attention_short_{direction}", 100, torch.float16, **sizes).backend != "hopper"


def test_hoppers_backward_of_209_to_256_tokens_is_the_portable_one_that_was_faster():
    for tokens in (209, 256):
        sizes = {"tokens": tokens, "features": 64}
        assert pick("attention_short_backward", 90, torch.bfloat16, **sizes).backend == "torch"
        assert pick("attention_long_backward", 90, torch.bfloat16, **sizes).backend == "triton"


@pytest.mark.parametrize("tokens", [1, 128, 197, 256])
def test_hoppers_kernels_get_no_width_that_they_cannot_do(tokens):
    for head_dim in range(16, 129, 16):
        for direction in ("forward", "backward"):
            tile = pick(f"attention_short_{direction}", 90, torch.bfloat16, tokens=tokens, features=head_dim)
            assert tile.backend != "hopper" or head_dim in (16, 32, 48, 64, 80, 128)
