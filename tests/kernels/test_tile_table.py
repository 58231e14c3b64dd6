"""The rows themselves."""

import itertools

import pytest
import torch

from polyvit_kernels.tile_table import TABLE
from polyvit_kernels.tiles import pick

ARCHS = (80, 86, 89, 90, 100, 120)
TOKENS = (1, 50, 65, 145, 197, 256, 257, 401, 1212, 3137, 8192)
OPS = sorted({tile.op for tile in TABLE})


def test_no_row_is_hidden_by_an_earlier_one():
    by_hand = [tile for tile in TABLE if not tile.source.endswith(".json")]  # measured rows take their places
    for index, tile in enumerate(by_hand):
        for earlier in by_hand[:index]:
            hidden = (
                earlier.op == tile.op
                and set(tile.archs) <= set(earlier.archs)
                and set(tile.dtypes) <= set(earlier.dtypes)
                and earlier.tokens[0] <= tile.tokens[0]
                and earlier.tokens[1] >= tile.tokens[1]
                and earlier.features >= tile.features
            )
            assert not hidden, f"{tile} is never reached: {earlier} comes first"


@pytest.mark.parametrize("op", OPS)
def test_every_card_has_rows_of_every_operation(op):
    assert {arch for tile in TABLE if tile.op == op for arch in tile.archs} == set(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_attention_has_kernels_each_way(arch):
    for dtype, tokens, head_dim in itertools.product((torch.bfloat16, torch.float16), TOKENS, (8, 32, 64, 72, 80, 96, 128)):
        for direction in ("forward", "backward"):
            tile = pick(f"attention_long_{direction}", arch, dtype, tokens=tokens, features=head_dim)
            assert tile.backend == "triton", (dtype, tokens, head_dim, direction)


def test_heads_wider_than_128_are_torchs():
    assert pick("attention", 90, torch.bfloat16, tokens=197, features=136).backend == "torch"


def test_counts_are_powers_of_two():
    for tile in TABLE:
        if tile.backend == "triton":
            assert tile.num_warps in (1, 2, 4, 8, 16)
            assert 1 <= tile.num_stages <= 5


def test_every_choice_says_where_it_comes_from():
    assert {tile.source for tile in TABLE} <= {"compiled", "published"} | {s for t in TABLE if (s := t.source).endswith(".json")}
