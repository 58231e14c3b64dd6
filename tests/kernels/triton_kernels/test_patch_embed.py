"""The kernels that turn grids into tokens by the comparison rule: truth is `reference.py` in fp64, compared with torch's operators."""

import math

import pytest
import torch
from compare import DEVICE, assert_within_rule, largest_difference
from samples import normal

from polyvit_kernels import reference
from polyvit_kernels.ops.patch_embed import _gather_tubelets, _patch_embed
from polyvit_kernels.ops.registration import pick_torch
from polyvit_kernels.tiles import Tile
from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.triton_kernels import patch_embed as patches

# fp32 has no rows, as cuBLAS multiplies in it; the kernels are right in it all the same.
FORWARD = Tile(op="patch_embed_forward", archs=(90,), blocks={"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64})
BACKWARD = Tile(op="patch_embed_backward", archs=(90,), blocks={"BLOCK_M": 16, "BLOCK_K": 64})
HALVES = [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]


def byte_grid(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def inputs(grid, tubelet, dim=40, dtype=torch.float32, other_dtype=torch.float32):
    """All that a launch needs; parameters but the weight in `other_dtype`."""
    channels = grid.shape[4]
    num_tokens = 1 + math.prod(grid.shape[1:4]) // math.prod(tubelet)
    weight = (normal(dim, *tubelet, channels, seed=2) / math.sqrt(math.prod(tubelet) * channels)).to(dtype)
    others = (normal(dim, seed=3), normal(1, 1, dim, seed=4), normal(1, num_tokens, dim, seed=5))
    middle, width = (123.7, 58.4) if grid.dtype == torch.uint8 else (-0.4, 1.7)
    statistics = (middle + normal(channels, seed=6), width + normal(channels, seed=7).abs())
    return grid, weight, *(tensor.to(other_dtype) for tensor in others), *statistics


def assert_kernels_obey(grid, *parameters, dtype=torch.float32, out_dtype=torch.float32):
    weight, _, _, pos_embed, mean, std = parameters
    found = patches.forward(grid, *parameters, out_dtype, FORWARD)
    exact = [tensor.double() for tensor in parameters]
    expected = {"tokens": reference.patch_embed(grid.double(), *exact)}
    plain_results = _patch_embed(grid, *parameters, out_dtype, pick_torch)
    assert_within_rule({"tokens": found}, {"tokens": plain_results}, expected, dtype)

    rows = patches.tubelets(grid, weight, mean, std, pos_embed.shape[1], BACKWARD).view(len(grid), pos_embed.shape[1], -1)
    assert not rows[:, 0].any()
    assert largest_difference(rows[:, 1:], _gather_tubelets(grid, weight, mean, std)) <= 2 * torch.finfo(dtype).eps * rows.abs().max()


@pytest.mark.parametrize(
    ("shape", "tubelet"),
    [
        ((2, 1, 32, 48, 3), (1, 16, 16)),
        ((2, 4, 16, 16, 3), (2, 8, 8)),
        ((1, 1, 32, 16, 1), (1, 16, 16)),
        ((3, 2, 6, 10, 5), (1, 3, 5)),
        ((2, 3, 4, 5, 2), (1, 1, 1)),
        ((33, 1, 4, 4, 1), (1, 2, 2)),
    ],
    ids=["image", "clip", "spectrogram", "odd sizes", "single elements", "many examples"],
)
def test_grids_of_bytes_and_of_numbers(shape, tubelet):
    assert_kernels_obey(*inputs(byte_grid(*shape), tubelet))
    assert_kernels_obey(*inputs(normal(*shape) * 2, tubelet, dim=33))


VIEWS = {
    "one channel three times": ((2, 1, 16, 24, 1), lambda grid: grid.expand(-1, -1, -1, -1, 3)),
    "channels first": ((2, 3, 2, 16, 24), lambda grid: grid.permute(0, 2, 3, 4, 1)),
    "sliced": ((3, 2, 19, 48, 4), lambda grid: grid[1:, :, 3:, ::2, :3]),
    "one frame again and again": ((2, 1, 16, 24, 3), lambda grid: grid.expand(-1, 4, -1, -1, -1)),
    "one example again and again": ((1, 2, 16, 24, 3), lambda grid: grid.expand(3, -1, -1, -1, -1)),
    "mirrored": ((2, 2, 16, 24, 3), lambda grid: grid.transpose(2, 3)),
}


@pytest.mark.parametrize("make", [byte_grid, pytest.param(normal, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", VIEWS)
def test_every_layout(name, make):
    shape, view = VIEWS[name]
    grid = view(make(*shape))
    assert_kernels_obey(*inputs(grid, (1, 8, 8)))
    grid, *parameters = inputs(grid, (grid.shape[1], 8, 8))
    found = patches.forward(grid, *parameters, torch.float32, FORWARD)
    torch.testing.assert_close(found, patches.forward(grid.contiguous(), *parameters, torch.float32, FORWARD))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a file with holes is the CPU's memory")
def test_examples_may_lie_far_apart(tmp_path):
    near, distance = byte_grid(4, 1, 8, 8, 3), 2**30 + 64
    size = 3 * distance + near[0].numel()
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(size)
    far = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=torch.uint8)
    assert_kernels_obey(*inputs(far.as_strided(near.shape, (distance, *near.stride()[1:])).copy_(near), (1, 4, 4)))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision(half):
    for grid in (byte_grid(2, 1, 32, 32, 3), normal(2, 1, 32, 32, 3).to(half)):
        assert_kernels_obey(*inputs(grid, (1, 16, 16), dtype=half), dtype=half)
        assert_kernels_obey(*inputs(grid, (1, 16, 16), dtype=half, other_dtype=half), dtype=half, out_dtype=half)


def test_parameters_may_be_strided():
    grid, weight, bias, cls_token, pos_embed, mean, std = inputs(byte_grid(2, 1, 8, 8, 3), (1, 4, 4))
    strided = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (weight, bias, cls_token, pos_embed, mean, std)]
    expected = patches.forward(grid, weight, bias, cls_token, pos_embed, mean, std, torch.float32, FORWARD)
    torch.testing.assert_close(patches.forward(grid, *strided, torch.float32, FORWARD), expected)


def test_no_examples():
    grid, *parameters = inputs(byte_grid(0, 1, 8, 8, 3), (1, 4, 4))
    assert patches.forward(grid, *parameters, torch.float32, FORWARD).shape == (0, 5, 40)
    assert patches.tubelets(grid, parameters[0], *parameters[4:], 5, BACKWARD).shape == (0, 48)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ([(1, 9), (16, 672), (16, 3), (3, 1)], [(16, 672), (48, 1)]),
        ([(2, 96), (4, 24), (8, 3), (3, 1)], [(192, 1)]),
        ([(2, 0), (4, 24), (8, 3), (3, 1)], [(2, 0), (96, 1)]),
        ([(1, 9), (16, 64), (16, 1), (3, 0)], [(16, 64), (16, 1), (3, 0)]),
        ([(4, 0), (2, 0), (2, 1)], [(8, 0), (2, 1)]),
        ([(1, 5), (1, 7)], []),
    ],
)
def test_axes_that_one_stride_can_walk_are_merged(axes, expected):
    assert patches.merge_axes(axes) == expected


def test_every_row_of_the_table_has_variants_that_name_all_arguments():
    rows = [row for row in TABLE if row.op.startswith("patch_embed")]
    assert {row.op for row in rows} == {"patch_embed_forward", "patch_embed_backward"}
    for row in rows:
        for dtype in row.dtypes:
            for variant in patches.variants(row, dtype):
                assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
                assert set(variant.divisible) <= variant.signature.keys()
