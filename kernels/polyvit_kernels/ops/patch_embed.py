"""The patch embedding: grids of pixels to tokens."""

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from polyvit_kernels.ops import weights
from polyvit_kernels.ops.dtypes import FLOATING, check_floating, check_one_device, matmul_dtype
from polyvit_kernels.ops.gradients import cast_gradient
from polyvit_kernels.ops.registration import Pick, register


def patch_embed(
    grid: UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"],
    weight: Float[Tensor, "dim tubelet_frames tubelet_rows tubelet_columns channels"],
    bias: Float[Tensor, " dim"],
    cls_token: Float[Tensor, "1 1 dim"],
    pos_embed: Float[Tensor, "1 tokens dim"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """The grid normalised, cut into tubelets and projected, with the class token in front and the position embeddings added.

    Tubelets are in the order (frames, rows, columns). `mean` and `std` are constants, in the grid's units. The grid may have any strides.
    It is normalised in fp32 and rounded to the weight's dtype, which autocast changes; `out_dtype` is the common dtype of weight, class
    token and positions unless given. Raises ValueError when sizes or devices differ, and when a dtype is no floating-point one (the grid
    may be uint8).
    """
    _check_sizes(grid, weight, pos_embed)
    _check_dtypes(grid, weight=weight, bias=bias, cls_token=cls_token, pos_embed=pos_embed, mean=mean, std=std)
    _check_parameters(weight, bias, cls_token, pos_embed, mean, std)
    check_one_device(grid=grid, weight=weight, bias=bias, cls_token=cls_token, pos_embed=pos_embed, mean=mean, std=std)
    weight = weights.cast_weight(weight, matmul_dtype(weight))
    out_dtype = out_dtype or torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), pos_embed.dtype)
    check_floating(out_dtype=out_dtype)
    return _patch_embed_op(grid, weight, bias, cls_token, pos_embed, mean, std, out_dtype)


def _check_sizes(grid: Tensor, weight: Tensor, pos_embed: Tensor) -> None:
    if grid.ndim != 5:
        raise ValueError(f"the grid has the shape {list(grid.shape)}, but [batch, frames, rows, columns, channels] is needed")
    if weight.ndim != 5:
        raise ValueError(f"the weight has the shape {list(weight.shape)}, but [dim, frames, rows, columns, channels] is needed")
    sizes, tubelet = list(grid.shape[1:4]), list(weight.shape[1:4])
    if 0 in weight.shape:
        raise ValueError(f"the weight has the shape {list(weight.shape)}, but sizes of at least 1 are needed")
    if grid.shape[4] != weight.shape[4]:
        raise ValueError(f"the grid has {grid.shape[4]} channels and the weight {weight.shape[4]}")
    if any(size % step for size, step in zip(sizes, tubelet, strict=True)):
        raise ValueError(f"a grid of (frames, rows, columns) = {sizes} does not divide into tubelets of {tubelet}")
    num_tokens = 1 + math.prod(sizes) // math.prod(tubelet)
    if pos_embed.ndim != 3 or pos_embed.shape[1] != num_tokens:
        found = f"{pos_embed.shape[1]} positions" if pos_embed.ndim == 3 else f"positions of the shape {list(pos_embed.shape)}"
        raise ValueError(f"a grid of {sizes} in tubelets of {tubelet} makes {num_tokens} tokens, but there are {found}")


def _check_dtypes(grid: Tensor, **parameters: Tensor) -> None:
    if grid.dtype not in (torch.uint8, *FLOATING):
        raise ValueError(f"the grid is {grid.dtype}, but torch.uint8 or a floating-point dtype is needed")
    check_floating(**parameters)


def _check_parameters(weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor, mean: Tensor, std: Tensor) -> None:
    dim, channels = len(weight), weight.shape[4]
    wanted = {
        "bias": (bias, [dim]),
        "cls_token": (cls_token, [1, 1, dim]),
        "pos_embed": (pos_embed, [1, pos_embed.shape[1], dim]),
        "mean": (mean, [channels]),
        "std": (std, [channels]),
    }
    for name, (tensor, shape) in wanted.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, but {shape} is needed")
    if mean.requires_grad or std.requires_grad:
        raise ValueError("mean and std are constants here: they get no gradient")


def _patch_embed(
    grid: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    mean: Tensor,
    std: Tensor,
    out_dtype: torch.dtype,
    pick: Pick,
) -> Tensor:
    tile = pick("patch_embed_forward", weight, features=weight[0].numel())
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import patch_embed as patches

        return patches.forward(grid, weight, bias, cls_token, pos_embed, mean, std, out_dtype, tile)
    # Channels are the last axis of weight and grid: whole runs of elements are gathered, and the weight needs no copy to be a matrix.
    embedded = functional.linear(_gather_tubelets(grid, weight, mean, std), weight.flatten(1), bias.to(weight.dtype))
    return (torch.cat([cls_token.expand(len(grid), -1, -1), embedded], 1) + pos_embed).to(out_dtype)


def _fake_patch_embed(
    grid: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor, mean: Tensor, std: Tensor, out_dtype: torch.dtype
) -> Tensor:
    shape = (grid.shape[0], pos_embed.shape[1], len(weight))  # len(grid) would fix the batch in a compiled graph
    return weight.new_empty(shape, dtype=out_dtype)


def _gather_tubelets(grid: Tensor, weight: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The normalised tubelets in the weight's dtype `[batch, tubelets, elements of a tubelet]`."""
    # Normalised in fp32 at least: bf16 knows a mean such as 123.7 only to within 0.25.
    precise = torch.promote_types(weight.dtype, torch.float32)
    split = grid.unflatten(3, (-1, weight.shape[3])).unflatten(2, (-1, weight.shape[2])).unflatten(1, (-1, weight.shape[1]))
    tubelets = split.permute(0, 1, 3, 5, 2, 4, 6, 7)
    count = math.prod(tubelets.shape[1:4])
    patches = tubelets.to(precise, memory_format=torch.contiguous_format, copy=True).view(len(grid), count, weight[0].numel())
    repeats = weight[0].numel() // len(mean)
    return patches.sub_(mean.to(precise).repeat(repeats)).div_(std.to(precise).repeat(repeats)).to(weight.dtype)


def _patch_embed_backward(
    grad: Tensor, grid: Tensor, weight: Tensor, mean: Tensor, std: Tensor, output_mask: list[bool], pick: Pick
) -> tuple[Tensor, Tensor]:
    """(gradient of the weight, gradient of the positions `[tokens, dim]` in fp32 at least), empty where `output_mask` is False."""
    precise = torch.promote_types(grad.dtype, torch.float32)
    d_pos = grad.sum(0, dtype=precise) if output_mask[1] else grad.new_empty(0, dtype=precise)
    if not output_mask[0]:
        return weight.new_empty(0), d_pos
    tile = pick("patch_embed_backward", weight, features=weight[0].numel())
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import patch_embed as patches

        tubelets = patches.tubelets(grid, weight, mean, std, grad.shape[1], tile)
        # Class tokens have a row of zeros there, so that their gradients need not be cut out.
        return (cast_gradient(grad, weight.dtype).reshape(-1, len(weight)).T @ tubelets).view(weight.shape), d_pos
    rows = grad[:, 1:].reshape(-1, len(weight)).to(weight.dtype)
    return (rows.T @ _gather_tubelets(grid, weight, mean, std).flatten(0, 1)).view(weight.shape), d_pos


def _fake_patch_embed_backward(
    grad: Tensor, grid: Tensor, weight: Tensor, mean: Tensor, std: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(grad.dtype, torch.float32)
    d_pos = grad.new_empty(grad.shape[1:] if output_mask[1] else 0, dtype=precise)
    return weight.new_empty(weight.shape if output_mask[0] else 0), d_pos


_patch_embed_backward_op = register("patch_embed_backward", _patch_embed_backward, _fake_patch_embed_backward)


def _save_patch_embed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grid, weight, bias, cls_token, pos_embed, mean, std, _ = inputs
    ctx.save_for_backward(grid, weight, mean, std)
    ctx.dtypes = (bias.dtype, cls_token.dtype, pos_embed.dtype)


def _differentiate_patch_embed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grid, weight, mean, std = ctx.saved_tensors
    bias_dtype, cls_dtype, pos_dtype = ctx.dtypes
    wants_grid, wants_weight, wants_bias, wants_cls, wants_pos, *_ = ctx.needs_input_grad
    mask = [wants_weight, wants_bias or wants_cls or wants_pos]
    d_weight, d_pos = _patch_embed_backward_op(grad, grid, weight, mean, std, mask)
    d_grid = _differentiate_grid(grad, grid, weight, std) if wants_grid else None
    d_bias = d_pos[1:].sum(0).to(bias_dtype) if wants_bias else None
    # A copy: autograd may add to a gradient, and the positions' must not change with the class token's.
    d_cls = d_pos[None, :1].to(cls_dtype, copy=True) if wants_cls else None
    return d_grid, d_weight if wants_weight else None, d_bias, d_cls, d_pos[None].to(pos_dtype) if wants_pos else None, None, None, None


def _differentiate_grid(grad: Tensor, grid: Tensor, weight: Tensor, std: Tensor) -> Tensor:
    precise = torch.promote_types(weight.dtype, torch.float32)
    d_tubelets = grad[:, 1:].to(weight.dtype) @ weight.flatten(1)
    counts = [size // step for size, step in zip(grid.shape[1:4], weight.shape[1:4], strict=True)]
    folded = d_tubelets.view(len(grid), *counts, *weight.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(grid.shape)
    return (folded.to(precise) / std.to(precise)).to(grid.dtype)


_patch_embed_op = register("patch_embed", _patch_embed, _fake_patch_embed, save=_save_patch_embed, differentiate=_differentiate_patch_embed)
