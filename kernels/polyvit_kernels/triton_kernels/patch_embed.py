"""Grids to tokens in one launch: normalise, gather tubelets, multiply by the weight, add bias and positions, put the class token first.

An implicit matrix product of `[tokens, K]` tubelets with the weight `[DIM, K]`: a tubelet is a row of K numbers in the weight's order
(frames, rows, columns, channels), read straight from the grid, whose strides are arbitrary, and normalised in registers. The backward
writes the same tubelets to memory, and the weight's gradient is an ordinary product with them.

- DIM, K: the weight's sizes; CHANNELS: its last axis, on which mean and std depend
- SIZE_1, SIZE_2, SIZE_3, stride_0 … stride_3: a tubelet's axes in the grid, those that one stride can walk being merged
- across, down: tubelets in a row of the grid, and rows of them; stride_front, stride_down, stride_across: from one tubelet to the next
- BLOCK_M, BLOCK_N, BLOCK_K: tokens, columns of DIM and numbers of K at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant


@triton.jit
def _tubelet_offsets(i_rows, tokens, across, down, stride_example, stride_front, stride_down, stride_across):
    """Where the tubelet of each token begins in the grid, `[BLOCK_M]`; of no meaning for class tokens."""
    # [BLOCK_M]; token 0 of every example is the class token
    i_tubelet = i_rows % tokens - 1
    o_rows = (i_rows // tokens).to(tl.int64) * stride_example + (i_tubelet // (across * down)).to(tl.int64) * stride_front
    return o_rows + (i_tubelet // across % down).to(tl.int64) * stride_down + (i_tubelet % across).to(tl.int64) * stride_across


@triton.jit
def _load_normalised(
    p_grid,
    p_mean,
    p_std,
    o_rows,
    m_rows,
    i_k,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The numbers `i_k` of all tubelets, normalised in fp32, `[BLOCK_M, BLOCK_K]`; 0 where there is none."""
    # [BLOCK_K]; an index into K is unravelled over the tubelet's four axes
    o_k = (i_k % SIZE_3).to(tl.int64) * stride_3 + (i_k // SIZE_3 % SIZE_2).to(tl.int64) * stride_2
    o_k += (i_k // (SIZE_3 * SIZE_2) % SIZE_1).to(tl.int64) * stride_1 + (i_k // (SIZE_3 * SIZE_2 * SIZE_1)).to(tl.int64) * stride_0
    # [BLOCK_M, 1] or [BLOCK_M, BLOCK_K]
    mask = m_rows[:, None] if EVEN_K else m_rows[:, None] & (i_k < K)[None, :]
    # [BLOCK_K]
    b_mean = tl.load(p_mean + i_k % CHANNELS)
    b_rstd = 1 / tl.load(p_std + i_k % CHANNELS)
    # [BLOCK_M, BLOCK_K]
    b_grid = tl.load(p_grid + o_rows[:, None] + o_k[None, :], mask, 0).to(tl.float32)
    return tl.where(mask, (b_grid - b_mean[None, :]) * b_rstd[None, :], 0.0)


@triton.jit
def patch_embed_fwd_kernel(
    p_grid,
    p_weight,
    p_bias,
    p_cls,
    p_pos,
    p_mean,
    p_std,
    p_out,
    rows,
    tokens,
    across,
    down,
    stride_example,
    stride_front,
    stride_down,
    stride_across,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    DIM: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the tokens; `rows` counts those of all examples. Programs of the same tubelets are adjacent, so that they come from L2."""
    BLOCKS_N: tl.constexpr = tl.cdiv(DIM, BLOCK_N)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    i_program = tl.program_id(0)
    # [BLOCK_M], [BLOCK_N]
    i_rows = i_program // BLOCKS_N * BLOCK_M + tl.arange(0, BLOCK_M)
    i_columns = i_program % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    m_columns = i_columns < DIM
    # [BLOCK_M]
    o_rows = _tubelet_offsets(i_rows, tokens, across, down, stride_example, stride_front, stride_down, stride_across)
    m_rows = i_rows < rows
    m_tubelets = m_rows & (i_rows % tokens > 0)
    # [BLOCK_M, BLOCK_N]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_start in range(0, K, BLOCK_K):
        # [BLOCK_K]
        i_k = i_start + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        b_tubelets = _load_normalised(
            p_grid,
            p_mean,
            p_std,
            o_rows,
            m_tubelets,
            i_k,
            stride_0,
            stride_1,
            stride_2,
            stride_3,
            K,
            CHANNELS,
            SIZE_1,
            SIZE_2,
            SIZE_3,
            EVEN_K,
        )
        # [1, BLOCK_N] or [BLOCK_K, BLOCK_N]
        m_weight = m_columns[None, :] if EVEN_K else (i_k < K)[:, None] & m_columns[None, :]
        # [BLOCK_K, BLOCK_N]
        b_weight = tl.load(p_weight + i_columns[None, :] * K + i_k[:, None], m_weight, 0.0)
        # [BLOCK_M, BLOCK_N]
        b_out = tl.dot(b_tubelets.to(b_weight.dtype), b_weight, b_out, input_precision="ieee")
    # [BLOCK_M]
    i_token = i_rows % tokens
    # [BLOCK_N]
    b_bias = tl.load(p_bias + i_columns, m_columns, 0.0).to(tl.float32)
    b_cls = tl.load(p_cls + i_columns, m_columns, 0.0).to(tl.float32)
    # [BLOCK_M, BLOCK_N]
    b_pos = tl.load(p_pos + i_token[:, None] * DIM + i_columns[None, :], m_columns[None, :], 0.0).to(tl.float32)
    b_out = tl.where((i_token == 0)[:, None], b_cls[None, :], b_out + b_bias[None, :]) + b_pos
    m_out = m_rows[:, None] & m_columns[None, :]
    tl.store(p_out + i_rows[:, None].to(tl.int64) * DIM + i_columns[None, :], b_out.to(p_out.dtype.element_ty), m_out)


@triton.jit
def patch_embed_bwd_kernel(
    p_grid,
    p_mean,
    p_std,
    p_out,
    rows,
    tokens,
    across,
    down,
    stride_example,
    stride_front,
    stride_down,
    stride_across,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    SIZE_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the normalised tubelets `[rows, K]`, with a row of zeros for each class token."""
    BLOCKS_K: tl.constexpr = tl.cdiv(K, BLOCK_K)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    i_program = tl.program_id(0)
    # [BLOCK_M], [BLOCK_K]
    i_rows = i_program // BLOCKS_K * BLOCK_M + tl.arange(0, BLOCK_M)
    i_k = i_program % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    # [BLOCK_M]
    o_rows = _tubelet_offsets(i_rows, tokens, across, down, stride_example, stride_front, stride_down, stride_across)
    m_rows = i_rows < rows
    m_tubelets = m_rows & (i_rows % tokens > 0)
    # [BLOCK_M, BLOCK_K]
    b_tubelets = _load_normalised(
        p_grid, p_mean, p_std, o_rows, m_tubelets, i_k, stride_0, stride_1, stride_2, stride_3, K, CHANNELS, SIZE_1, SIZE_2, SIZE_3, EVEN_K
    )
    m_out = m_rows[:, None] & (i_k < K)[None, :]
    tl.store(p_out + i_rows[:, None].to(tl.int64) * K + i_k[None, :], b_tubelets.to(p_out.dtype.element_ty), m_out)


def forward(
    grid: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    mean: Tensor,
    std: Tensor,
    out_dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """The tokens `[batch, tokens, dim]`."""
    dim, tokens = len(weight), pos_embed.shape[1]
    out = torch.empty(len(grid), tokens, dim, dtype=out_dtype, device=grid.device)
    rows = len(grid) * tokens
    if not out.numel():
        return out
    blocks = tile.blocks
    launch: Any = patch_embed_fwd_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(dim, blocks["BLOCK_N"]),)]
    parameters = (tensor.contiguous() for tensor in (weight, bias, cls_token, pos_embed, mean.float(), std.float()))
    strides, sizes = _grid_arguments(grid, weight, rows, tokens)
    launch(grid, *parameters, out, *strides, DIM=dim, **sizes, **tile.launch())
    return out


def tubelets(grid: Tensor, weight: Tensor, mean: Tensor, std: Tensor, tokens: int, tile: Tile) -> Tensor:
    """The normalised tubelets in the weight's dtype `[batch * tokens, K]`, zeros where a class token is."""
    k, rows = weight[0].numel(), len(grid) * tokens
    out = torch.empty(rows, k, dtype=weight.dtype, device=grid.device)
    if not out.numel():
        return out
    launch: Any = patch_embed_bwd_kernel[(triton.cdiv(rows, tile.blocks["BLOCK_M"]) * triton.cdiv(k, tile.blocks["BLOCK_K"]),)]
    strides, sizes = _grid_arguments(grid, weight, rows, tokens)
    launch(grid, mean.float().contiguous(), std.float().contiguous(), out, *strides, **sizes, **tile.launch())
    return out


def _grid_arguments(grid: Tensor, weight: Tensor, rows: int, tokens: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The integers that both kernels take from `rows` on, and their constants that describe a tubelet."""
    frames, height, width, channels = weight.shape[1:]
    _, _, down, across, _ = (size // step for size, step in zip(grid.shape, (1, *weight.shape[1:]), strict=True))
    example, frame, row, column, _ = grid.stride()
    axes = merge_axes(list(zip(weight.shape[1:], grid.stride()[1:], strict=True)))
    sizes, strides = zip(*([(1, 0)] * (4 - len(axes)) + axes), strict=True)
    integers = (rows, tokens, across, down, example, frame * frames, row * height, column * width, *strides)
    return integers, {"K": weight[0].numel(), "CHANNELS": channels, "SIZE_1": sizes[1], "SIZE_2": sizes[2], "SIZE_3": sizes[3]}


def merge_axes(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of nested axes, the outermost first: axes that one stride can walk become one, those of size 1 are left out."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


_GRIDS = (
    # dtype, tubelet (frames, rows, columns, channels), the rows' stride
    ("u8", (1, 16, 16, 3), 224 * 3),
    ("u8", (4, 16, 16, 3), 224 * 3),
    ("fp32", (1, 16, 16, 1), 128),
)


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernel of a tile for weights of `dtype` and fp32 positions, for images, clips and spectrograms of the usual sizes."""
    forward = tile.op == "patch_embed_forward"
    kernel: Any = patch_embed_fwd_kernel if forward else patch_embed_bwd_kernel
    for grid_dtype, tubelet, stride in _GRIDS:
        frames, height, width, channels = tubelet
        axes = merge_axes([(frames, 224 * stride), (height, stride), (width, channels), (channels, 1)])
        sizes = [size for size, _ in [(1, 0)] * (4 - len(axes)) + axes]
        constants = {"K": frames * height * width * channels, "CHANNELS": channels, "stride_3": 1}
        constants |= {f"SIZE_{axis}": sizes[axis] for axis in (1, 2, 3)}
        types = {"p_grid": f"*{grid_dtype}", "p_weight": f"*{dtype}", "p_out": "*fp32" if forward else f"*{dtype}"}
        for dim in (192, 384, 768, 1024) if forward else (0,):
            known = constants | dict(tile.blocks) | ({"DIM": dim} if forward else {})
            names = [name for name in kernel.arg_names if name not in known]
            yield Variant(
                kernel=kernel,
                signature={name: types.get(name, "*fp32" if name.startswith("p_") else "i32") for name in names},
                constants=known,
                divisible=tuple(name for name in names if name.startswith(("p_", "stride"))),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
