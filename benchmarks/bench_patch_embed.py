"""Grids of bytes to tokens, each way, against torch's gathering, its convolution, and compilers.

Run: pytest benchmarks/bench_patch_embed.py. The backward gives the gradients of the parameters; bytes have none.
"""

from collections.abc import Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, OURS, Candidate, Operation, Problem, group_params
from machine import DEVICE, DTYPE, HAS_GPU
from torch import Tensor
from torch.nn import functional

import polyvit_kernels
from polyvit_kernels import reference

CONVOLUTION = "convolution"
TUBELET = (16, 16)
# (batch, frames, size, frames of a tubelet, dim): ViT-B/16 on images, ViViT-B/16x2 on clips.
SHAPES = [(256, 1, 224, 1, 768), (16, 32, 224, 2, 768)] if HAS_GPU else [(4, 1, 64, 1, 96)]
SAMPLE = 2
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's


def eager_patch_embed(
    grid: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    _, frames, height, width, _ = weight.shape
    normal = ((grid - mean) / std).to(weight.dtype)
    split = normal.unflatten(3, (-1, width)).unflatten(2, (-1, height)).unflatten(1, (-1, frames))
    rows = split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(grid), -1, weight[0].numel())
    embedded = functional.linear(rows, weight.flatten(1), bias)
    return torch.cat([cls_token.expand(len(grid), -1, -1), embedded], 1) + pos_embed


def convolution(grid: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    normal = ((grid - mean) / std).to(weight.dtype)
    kernel = weight.permute(0, 4, 1, 2, 3)
    embedded = functional.conv3d(normal.permute(0, 4, 1, 2, 3), kernel, bias, stride=weight.shape[1:4]).flatten(2).transpose(1, 2)
    return torch.cat([cls_token.expand(len(grid), -1, -1), embedded], 1) + pos_embed


def patch_embed_of(shape: Sequence[int]) -> Problem:
    batch, frames, size, tubelet_frames, dim = shape
    tokens = frames // tubelet_frames * (size // TUBELET[0]) * (size // TUBELET[1]) + 1
    grid = torch.randint(256, (batch, frames, size, size, 3), device=DEVICE, dtype=torch.uint8)
    sizes = {"weight": (dim, tubelet_frames, *TUBELET, 3), "bias": (dim,), "cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    parameters = {name: torch.randn(sizes[name], device=DEVICE, dtype=DTYPE) for name in sizes}
    depth = parameters["weight"][0].numel()
    parameters["weight"] /= depth**0.5
    inputs = {"grid": grid} | parameters
    small = sum(tensor.nbytes for tensor in parameters.values())
    forms = (_normalise(form) for form in (polyvit_kernels.patch_embed, eager_patch_embed, reference.patch_embed))
    return Problem(
        title=f"patch embed {batch}×{frames}×{size}×{size}×3→{tokens}×{dim}",
        inputs=inputs,
        check=partial(compare.assert_as_exact_as_torch, *forms, inputs | {"grid": grid[:SAMPLE]}, DTYPE),
        candidates={
            OURS: Candidate(operation=_normalise(polyvit_kernels.patch_embed)),
            EAGER: Candidate(operation=_normalise(eager_patch_embed)),
            CONVOLUTION: Candidate(operation=_normalise(convolution)),
            **peers.compile_operation(_normalise(eager_patch_embed)),
        },
        # In: the grid and the parameters; out: the tokens, or the parameters' gradients from those of the tokens.
        num_bytes=dict.fromkeys((FORWARD, BACKWARD), grid.nbytes + batch * tokens * dim * DTYPE.itemsize + small),
        amount=batch,
        unit="examples",
    )


def _normalise(operation: Operation) -> Operation:
    """With ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=DEVICE) for values in (MEAN, STD))

    def run(grid: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
        return operation(grid, weight, bias, cls_token, pos_embed, mean, std)

    return run


@pytest.mark.parametrize("candidate", [OURS, EAGER, CONVOLUTION, *peers.COMPILERS])
@pytest.mark.parametrize("group", group_params(patch_embed_of, SHAPES), indirect=True)
def test_patch_embed(group, candidate, benchmark):
    group.enter(candidate, benchmark)
