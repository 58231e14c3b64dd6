"""The table's reader."""

import pytest
import torch

from polyvit_kernels.tiles import Tile, lookup, pick, pick_for

ROWS = (
    Tile(op="a", archs=(80,), tokens=(1, 64), features=64, num_warps=1),
    Tile(op="a", archs=(80,), tokens=(1, 256), features=128, num_warps=2),
    Tile(op="a", archs=(90,), features=64, num_warps=3, dtypes=("fp32",)),
    Tile(op="c", archs=(90,), features=64, num_warps=4, backend="hopper"),
    Tile(op="c", archs=(90,), features=128, num_warps=5),
    Tile(op="d", archs=(90,), backend="hopper"),
)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(lookup, "TABLE", ROWS)
    for cached in (lookup._pick, lookup._rows):
        cached.cache_clear()
    yield
    for cached in (lookup._pick, lookup._rows):
        cached.cache_clear()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("arch", "dtype", "tokens", "features", "warps"),
    [
        (80, torch.bfloat16, 64, 64, 1),
        (80, torch.float16, 65, 64, 2),
        (80, torch.bfloat16, 1, 65, 2),
        (86, torch.bfloat16, 1, 1, 1),
        (90, torch.float32, 10**6, 64, 3),
        (103, torch.float32, 1, 1, 3),
    ],
)
def test_the_first_row_that_fits_wins_and_an_unknown_gpu_takes_those_of_an_older_one(arch, dtype, tokens, features, warps):
    assert pick("a", arch, dtype, tokens=tokens, features=features).num_warps == warps


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("op", "arch", "dtype", "tokens", "features"),
    [
        ("b", 80, torch.bfloat16, 1, 1),
        ("a", 75, torch.bfloat16, 1, 1),
        ("a", 80, torch.float32, 1, 1),
        ("a", 80, torch.bfloat16, 257, 1),
        ("a", 80, torch.bfloat16, 1, 129),
        ("a", 80, torch.float64, 1, 1),
    ],
)
def test_without_a_row_torch_does_it(op, arch, dtype, tokens, features):
    assert pick(op, arch, dtype, tokens=tokens, features=features).backend == "torch"


@pytest.mark.usefixtures("rows")
def test_what_must_be_portable_passes_over_hoppers_own_kernels(monkeypatch):
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)
    like = torch.empty(1, dtype=torch.bfloat16)
    for op, features, portable, expected in (
        ("c", 64, False, ("hopper", 4)),
        ("c", 64, True, ("triton", 5)),
        ("c", 65, False, ("triton", 5)),
        ("d", 64, False, ("hopper", 4)),
        ("d", 64, True, ("torch", 4)),
    ):
        found = pick(op, 90, torch.bfloat16, features=features, portable=portable)
        assert (found.backend, found.num_warps) == expected
        assert pick_for(op, like, features=features, portable=portable) == found
