"""Grids to tokens by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import pytest
import torch
from compare import assert_as_exact_as_torch, outputs_and_gradients
from samples import normal
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]


GRIDS = {
    "image": ((2, 1, 32, 48, 3), (1, 16, 16)),
    "clip": ((2, 6, 16, 24, 3), (2, 8, 8)),
    "spectrogram": ((2, 1, 64, 32, 1), (1, 16, 16)),
}


def patch_embed_inputs(grid, tubelet, channels):
    num_tokens = 1 + grid.shape[1] * grid.shape[2] * grid.shape[3] // (tubelet[0] * tubelet[1] * tubelet[2])
    fan_in = tubelet[0] * tubelet[1] * tubelet[2] * channels
    weights = {"weight": normal(40, *tubelet, channels, seed=2) / fan_in**0.5, "bias": normal(40, seed=3)}
    return {"grid": grid} | weights | {"cls_token": normal(1, 1, 40, seed=4), "pos_embed": normal(1, num_tokens, 40, seed=5)}


def plain_patch_embed(grid, weight, bias, cls_token, pos_embed, mean, std):
    normalised = ((grid.to(torch.promote_types(weight.dtype, torch.float32)) - mean) / std).to(weight.dtype)
    tubelet = weight.shape[1:4]
    embedded = functional.conv3d(normalised.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), bias, stride=tubelet)
    return torch.cat([cls_token.repeat(len(grid), 1, 1), embedded.flatten(2).transpose(1, 2)], 1) + pos_embed


def assert_patch_embed_obeys(inputs, dtype, mean, std, view=lambda grid: grid):
    forms = (
        lambda grid, f=f, **more: f(view(grid), **more, mean=mean, std=std)
        for f in (ops.patch_embed, plain_patch_embed, reference.patch_embed)
    )
    assert_as_exact_as_torch(*forms, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_patch_embed_of_bytes(name, dtype):
    shape, tubelet = GRIDS[name]
    grid = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([123.7, 116.3, 103.5])[: shape[4]], torch.tensor([58.4, 57.1, 57.4])[: shape[4]]
    assert_patch_embed_obeys(patch_embed_inputs(grid, tubelet, shape[4]), dtype, mean, std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((2, 1, 64, 32, 3), lambda grid: grid),
        ((2, 1, 64, 32, 1), lambda grid: grid.expand(-1, -1, -1, -1, 3)),
        ((2, 3, 1, 64, 32), lambda grid: grid.permute(0, 2, 3, 4, 1)),
        ((3, 1, 70, 64, 4), lambda grid: grid[1:, :, 6:, ::2, :3]),
    ],
    ids=["as it lies", "one channel three times", "channels first", "sliced"],
)
def test_patch_embed_of_numbers_in_every_layout(shape, view, dtype):
    inputs = patch_embed_inputs(torch.empty(2, 1, 64, 32, 3), (1, 16, 16), 3) | {"grid": normal(*shape) * 4 - 5}
    assert_patch_embed_obeys(inputs, dtype, torch.tensor([-4.27, -4, 1]), torch.tensor([9.14, 9, 2]), view)


def test_patch_embed_normalises_before_it_rounds_to_bf16():
    even = torch.full((1, 1, 16, 16, 3), 124, dtype=torch.uint8)
    inputs = patch_embed_inputs(even, (1, 16, 16), 3)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("bias", "cls_token", "pos_embed")}
    assert_patch_embed_obeys(inputs, torch.bfloat16, torch.full((3,), 123.7), torch.full((3,), 58.4))


def test_patch_embed_leaves_the_grid_alone():
    grid = normal(2, 1, 16, 16, 3)
    before = grid.clone()
    ops.patch_embed(**patch_embed_inputs(grid, (1, 16, 16), 3), mean=torch.ones(3), std=torch.full((3,), 2.0))
    assert torch.equal(grid, before)


def test_tokens_stand_in_the_order_frames_rows_columns():
    grid = torch.arange(2 * 4 * 6).float().view(1, 2, 4, 6, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    inputs = {"weight": torch.zeros(1, 1, 2, 2, 1), "bias": torch.zeros(1), "cls_token": torch.full((1, 1, 1), -1.0)}
    inputs["weight"][..., 0, 0, :] = 1
    tokens = ops.patch_embed(grid, **inputs, pos_embed=torch.zeros(1, 49, 1), mean=torch.zeros(1), std=torch.ones(1))
    assert tokens.flatten().tolist() == list(range(-1, 48))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": normal(1, 16, 16, 3)}, r"\[1, 16, 16, 3\], but \[batch, frames, rows, columns, channels\] is needed"),
        ({"grid": normal(1, 1, 16, 20, 3)}, r"\(frames, rows, columns\) = \[1, 16, 20\] does not divide into tubelets of \[1, 8, 8\]"),
        ({"grid": normal(1, 1, 16, 16, 1)}, "the grid has 1 channels and the weight 3"),
        ({"grid": normal(1, 1, 32, 16, 3)}, r"\[1, 32, 16\] in tubelets of \[1, 8, 8\] makes 9 tokens, but there are 5 positions"),
    ],
)
def test_patch_embed_names_the_sizes_that_disagree(change, message):
    inputs = patch_embed_inputs(normal(1, 1, 16, 16, 3), (1, 8, 8), 3)
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**(inputs | change), mean=torch.zeros(3), std=torch.ones(3))


def test_gradients_are_the_same_in_every_run():
    inputs = patch_embed_inputs(normal(4, 1, 64, 64, 3), (1, 8, 8), 3)
    call = (lambda **inputs: ops.patch_embed(**inputs, mean=torch.zeros(3), std=torch.ones(3)), inputs)
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
