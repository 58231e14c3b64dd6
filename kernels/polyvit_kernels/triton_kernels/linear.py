# A launch is not the call that its signature says, to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Matrix products with fused epilogues: bias and GELU, bias and residual, and GELU's backward.

A program computes one tile of the output with a loop over the depth and applies the epilogue to the accumulators, so that the product
itself never reaches memory. All tensors are contiguous matrices; a weight is `[out, in]`. No atomics: every element has one writer, and
runs repeat bit for bit.

- BLOCK_M, BLOCK_N: rows and columns of a program's tile of the output; BLOCK_K: columns of A that one iteration takes
- GROUP_M: tiles of rows whose programs are adjacent for a tile of columns, so that what they read in common comes from L2
- EPILOGUE_SUBTILES: 1, 2 or 4 column slices of the tile that the epilogue treats one after the other, in fewer registers
- EVEN_N, EVEN_K: the size is a multiple of its block, so nothing is masked
- B_KN: B is stored `[depth, columns]`, not `[columns, depth]`
- GELU, PRECISE: as in `gelu`; KEEP: GELU's slope is stored
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyvit_kernels.tiles import Tile, Variant
from polyvit_kernels.triton_kernels.gelu import gelu, gelu_and_slope


@triton.jit
def _tile_origin(num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and column of this program's tile, in groups of GROUP_M tiles of rows."""
    i_tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    i_first = i_tile // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - i_first, GROUP_M)
    i_within = i_tile % (GROUP_M * tiles_n)
    return (i_first + i_within % group) * BLOCK_M, i_within // group * BLOCK_N


@triton.jit
def _matmul(
    p_a,
    p_b,
    i_row,
    i_column,
    num_rows,
    num_columns,
    depth,
    B_KN: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of A Bᵀ, or of A B with `B_KN`, `[BLOCK_M, BLOCK_N]` in fp32; A is `[num_rows, depth]`.

    Beyond the end of an axis that is not contiguous the last row is read again: cheaper than a mask, and never stored.
    """
    # [BLOCK_K], [BLOCK_M]
    o_k = tl.arange(0, BLOCK_K)
    o_m = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1 - i_row)
    # [BLOCK_M, BLOCK_K]
    p_a += i_row.to(tl.int64) * depth + (o_m[:, None] * depth + o_k[None, :])
    # [BLOCK_N], [BLOCK_K, BLOCK_N]
    if B_KN:
        o_n = tl.arange(0, BLOCK_N)
        p_b += i_column + (o_k[:, None] * num_columns + o_n[None, :])
        step = BLOCK_K * num_columns
    else:
        o_n = tl.minimum(tl.arange(0, BLOCK_N), num_columns - 1 - i_column)
        p_b += i_column.to(tl.int64) * depth + (o_n[None, :] * depth + o_k[:, None])
        step = BLOCK_K
    # [1, BLOCK_N]
    m_n = (o_n < num_columns - i_column)[None, :]
    # [BLOCK_M, BLOCK_N]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in tl.range(0, depth, BLOCK_K):
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        if EVEN_K:
            b_a = tl.load(p_a)
            if B_KN and not EVEN_N:
                b_b = tl.load(p_b, mask=m_n, other=0.0)
            else:
                b_b = tl.load(p_b)
        else:
            b_a = tl.load(p_a, mask=(o_k < depth - i_k)[None, :], other=0.0)
            b_b = tl.load(p_b, mask=(o_k < depth - i_k)[:, None] & m_n, other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision="ieee")
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        p_a += BLOCK_K
        p_b += step
    return b_sum


@triton.jit
def _split_columns(b_tile):
    """The left and the right half of a tile's columns."""
    return b_tile.reshape(b_tile.shape[0], 2, b_tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _output_offsets(i_row, i_column, num_rows, num_columns, EVEN_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a `[ROWS, COLUMNS]` subtile of the output, which of them exist, and which columns do."""
    # [ROWS], [COLUMNS]
    o_m, o_n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # [ROWS, COLUMNS], [ROWS, 1] or [ROWS, COLUMNS]
    o_out = i_row.to(tl.int64) * num_columns + i_column + (o_m[:, None] * num_columns + o_n[None, :])
    m_out = (o_m < num_rows - i_row)[:, None]
    # [COLUMNS]
    if EVEN_N:
        m_n = tl.full([COLUMNS], 1, tl.int1)
    else:
        m_n = o_n < num_columns - i_column
        # [ROWS, COLUMNS]
        m_out &= m_n[None, :]
    return o_out, m_out, m_n


@triton.jit
def _epilogue_gelu(
    b_h,
    p_bias,
    p_y,
    p_slope,
    i_row,
    i_column,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
    PRECISE: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
):
    if EPILOGUE_SUBTILES > 1:
        b_left, b_right = _split_columns(b_h)
        i_right = i_column + b_left.shape[1]
        _epilogue_gelu(
            b_left, p_bias, p_y, p_slope, i_row, i_column, num_rows, num_columns, GELU, PRECISE, KEEP, EVEN_N, EPILOGUE_SUBTILES // 2
        )
        _epilogue_gelu(
            b_right, p_bias, p_y, p_slope, i_row, i_right, num_rows, num_columns, GELU, PRECISE, KEEP, EVEN_N, EPILOGUE_SUBTILES // 2
        )
    else:
        o_out, m_out, m_n = _output_offsets(i_row, i_column, num_rows, num_columns, EVEN_N, b_h.shape[0], b_h.shape[1])
        # [COLUMNS]
        b_bias = tl.load(p_bias + i_column + tl.arange(0, b_h.shape[1]), mask=m_n, other=0.0)
        # [ROWS, COLUMNS]
        b_h += b_bias.to(tl.float32)[None, :]
        if KEEP:
            b_y, b_slope = gelu_and_slope(b_h, GELU, PRECISE)
            tl.store(p_slope + o_out, b_slope.to(p_slope.dtype.element_ty), mask=m_out)
        else:
            b_y = gelu(b_h, GELU, PRECISE)
        tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_out)


@triton.jit
def _epilogue_add(
    b_y,
    p_bias,
    p_residual,
    p_factors,
    p_y,
    i_row,
    i_column,
    num_rows,
    num_columns,
    tokens,
    EVEN_N: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
):
    if EPILOGUE_SUBTILES > 1:
        b_left, b_right = _split_columns(b_y)
        i_right = i_column + b_left.shape[1]
        _epilogue_add(
            b_left, p_bias, p_residual, p_factors, p_y, i_row, i_column, num_rows, num_columns, tokens, EVEN_N, EPILOGUE_SUBTILES // 2
        )
        _epilogue_add(
            b_right, p_bias, p_residual, p_factors, p_y, i_row, i_right, num_rows, num_columns, tokens, EVEN_N, EPILOGUE_SUBTILES // 2
        )
    else:
        o_out, m_out, m_n = _output_offsets(i_row, i_column, num_rows, num_columns, EVEN_N, b_y.shape[0], b_y.shape[1])
        # [COLUMNS]
        b_bias = tl.load(p_bias + i_column + tl.arange(0, b_y.shape[1]), mask=m_n, other=0.0)
        # [ROWS, COLUMNS]
        b_residual = tl.load(p_residual + o_out, mask=m_out, other=0.0)
        if p_factors is None:
            b_y += b_bias.to(tl.float32)[None, :] + b_residual.to(tl.float32)
        else:
            # [ROWS]
            o_row = i_row + tl.arange(0, b_y.shape[0])
            b_factors = tl.load(p_factors + o_row // tokens, mask=o_row < num_rows, other=0.0)
            # [ROWS, COLUMNS]
            b_y = (b_y + b_bias.to(tl.float32)[None, :]) * b_factors[:, None] + b_residual.to(tl.float32)
        tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_out)


@triton.jit
def _epilogue_dgelu(
    b_da, p_slope, p_dpre, p_sums, i_row, i_column, num_rows, num_columns, EVEN_N: tl.constexpr, EPILOGUE_SUBTILES: tl.constexpr
):
    if EPILOGUE_SUBTILES > 1:
        b_left, b_right = _split_columns(b_da)
        i_right = i_column + b_left.shape[1]
        _epilogue_dgelu(b_left, p_slope, p_dpre, p_sums, i_row, i_column, num_rows, num_columns, EVEN_N, EPILOGUE_SUBTILES // 2)
        _epilogue_dgelu(b_right, p_slope, p_dpre, p_sums, i_row, i_right, num_rows, num_columns, EVEN_N, EPILOGUE_SUBTILES // 2)
    else:
        o_out, m_out, m_n = _output_offsets(i_row, i_column, num_rows, num_columns, EVEN_N, b_da.shape[0], b_da.shape[1])
        # [ROWS, COLUMNS]; rows beyond the end are zeros, and add nothing to the sums
        b_dh = b_da * tl.load(p_slope + o_out, mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_dpre + o_out, b_dh.to(p_dpre.dtype.element_ty), mask=m_out)
        tl.store(p_sums + i_column + tl.arange(0, b_da.shape[1]), tl.sum(b_dh, 0), mask=m_n)


@triton.jit(do_not_specialize=["num_rows"])
def linear_gelu_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_slope,
    num_rows,
    num_columns,
    depth,
    GELU: tl.constexpr,
    PRECISE: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
):
    """A tile of Y = gelu(H) and of gelu'(H), H = X Wᵀ + b; H stays in fp32."""
    i_row, i_column = _tile_origin(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    # [BLOCK_M, BLOCK_N]
    b_h = _matmul(p_x, p_weight, i_row, i_column, num_rows, num_columns, depth, False, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    _epilogue_gelu(b_h, p_bias, p_y, p_slope, i_row, i_column, num_rows, num_columns, GELU, PRECISE, KEEP, EVEN_N, EPILOGUE_SUBTILES)


@triton.jit(do_not_specialize=["num_rows", "tokens"])
def linear_add_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_residual,
    p_factors,
    p_y,
    num_rows,
    num_columns,
    depth,
    tokens,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
):
    """A tile of Y = R + f (X Wᵀ + b), where R and Y may have another dtype than X.

    f is an fp32 factor for each example, which has `tokens` rows; `p_factors` may be None.
    """
    i_row, i_column = _tile_origin(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    # [BLOCK_M, BLOCK_N]
    b_y = _matmul(p_x, p_weight, i_row, i_column, num_rows, num_columns, depth, False, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    _epilogue_add(b_y, p_bias, p_residual, p_factors, p_y, i_row, i_column, num_rows, num_columns, tokens, EVEN_N, EPILOGUE_SUBTILES)


@triton.jit(do_not_specialize=["num_rows"])
def dgelu_bwd_kernel(
    p_grad,
    p_weight,
    p_slope,
    p_dpre,
    p_sums,
    num_rows,
    num_columns,
    depth,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
):
    """A tile of dH = (dY W) · slope, and the sums of its columns, one row of `p_sums` for each row of tiles."""
    i_row, i_column = _tile_origin(num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    # [BLOCK_M, BLOCK_N]
    b_da = _matmul(p_grad, p_weight, i_row, i_column, num_rows, num_columns, depth, True, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    p_sums += (i_row // BLOCK_M).to(tl.int64) * num_columns
    _epilogue_dgelu(b_da, p_slope, p_dpre, p_sums, i_row, i_column, num_rows, num_columns, EVEN_N, EPILOGUE_SUBTILES)


@triton.jit(do_not_specialize=["num_rows"])
def dgelu_bwd_kernel_sums(p_partials, p_sums, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of BLOCK_N columns over all rows of tiles."""
    # [BLOCK_M], [BLOCK_N]
    o_m, o_n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_columns
    # [BLOCK_M, BLOCK_N]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in tl.range(0, num_rows, BLOCK_M):
        # [BLOCK_M, BLOCK_N]
        o_out = (i_row + o_m)[:, None] * num_columns + o_n[None, :]
        b_sum += tl.load(p_partials + o_out, mask=(i_row + o_m < num_rows)[:, None] & m_n[None, :], other=0.0)
    tl.store(p_sums + o_n, tl.sum(b_sum, 0).to(p_sums.dtype.element_ty), mask=m_n)


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool, tile: Tile) -> tuple[Tensor, Tensor]:
    """(gelu(H), gelu'(H)), H = x weightᵀ + bias; without `keep` the second one is empty."""
    y = x.new_empty(len(x), len(weight))
    slope = torch.empty_like(y) if keep else x.new_empty(0)
    constants = {"GELU": gelu, "PRECISE": x.dtype is torch.float32, "KEEP": keep}
    _launch(linear_gelu_fwd_kernel, (x, weight, bias), (y, slope), constants, tile)
    return y, slope


def linear_add_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factors: Tensor | None, tile: Tile) -> Tensor:
    """residual + factors · (x weightᵀ + bias), in the dtype of torch's sum; one factor for each example, 1 without `factors`."""
    y = x.new_empty(len(x), len(weight), dtype=torch.promote_types(x.dtype, residual.dtype))
    _launch(linear_add_fwd_kernel, (x, weight, bias, residual, factors), (y,), {"tokens": num_tokens(x, factors)}, tile)
    return y


def num_tokens(rows: Tensor, factors: Tensor | None) -> int:
    """How many rows have one factor."""
    return 1 if factors is None else len(rows) // max(len(factors), 1)


def dgelu_backward(grad: Tensor, weight: Tensor, slope: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(dH, sums of dH's columns), dH = (grad weight) · slope."""
    d_pre = slope.new_empty(slope.shape)
    partials = slope.new_empty(triton.cdiv(len(slope), tile.blocks["BLOCK_M"]), slope.shape[1], dtype=torch.float32)
    _launch(dgelu_bwd_kernel, (grad, weight, slope), (d_pre, partials), {}, tile)
    return d_pre, sum_partials(partials, slope.dtype)


_SUMS = {"BLOCK_M": 128, "BLOCK_N": 16}


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the columns, rounded last: torch takes 36 µs for the 394 × 3072 of a ViT-B, where reading them takes 2."""
    rows, columns = partials.shape
    sums = torch.empty(columns, dtype=dtype, device=partials.device)
    if columns:
        dgelu_bwd_kernel_sums[(triton.cdiv(columns, _SUMS["BLOCK_N"]),)](partials, sums, rows, columns, **_SUMS)
    return sums


def _launch(
    kernel: Any, inputs: tuple[Tensor, *tuple[Tensor | None, ...]], outputs: tuple[Tensor, ...], more: dict[str, Any], tile: Tile
) -> None:
    """One program for each tile of the first output; the first input is A."""
    rows, columns = outputs[0].shape
    depth, blocks = inputs[0].shape[1], tile.blocks
    if not outputs[0].numel():
        return
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_N"]),)
    even = {"EVEN_N": columns % blocks["BLOCK_N"] == 0, "EVEN_K": depth % blocks["BLOCK_K"] == 0}
    tensors = (*(None if tensor is None else tensor.contiguous() for tensor in inputs), *outputs)
    kernel[grid](*tensors, rows, columns, depth, **more, **even, **tile.launch())


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a tile: both GELUs, both dtypes of a residual, with factors and without.

    Blocks divide the sizes of all usual ViTs but one: 128 does not divide ViT-Ti's 192.
    """
    tensor = f"*{dtype}"
    if tile.op == "linear_add_forward":
        evens = (True, False) if tile.blocks["BLOCK_N"] == 128 else (True,)
        for residual, even, factors in itertools.product(dict.fromkeys((tensor, "*fp32")), evens, ("*fp32", None)):
            inputs = {"p_x": tensor, "p_weight": tensor, "p_bias": tensor, "p_residual": residual, "p_factors": factors}
            yield _variant(linear_add_fwd_kernel, inputs | {"p_y": residual}, {"EVEN_N": even}, tile)
        return
    if tile.op == "dgelu_backward":
        pointers = dict.fromkeys(("p_grad", "p_weight", "p_slope", "p_dpre"), tensor) | {"p_sums": "*fp32"}
        yield _variant(dgelu_bwd_kernel, pointers, {"EVEN_N": True}, tile)
        yield sums_variant(dtype)
        return
    pointers = dict.fromkeys(("p_x", "p_weight", "p_bias", "p_y", "p_slope"), tensor)
    for kind, keep in itertools.product(("erf", "tanh", "quick"), (True, False)):
        constants = {"GELU": kind, "PRECISE": dtype == "fp32", "KEEP": keep, "EVEN_N": True}
        yield _variant(linear_gelu_fwd_kernel, pointers, constants, tile)


def _variant(kernel: Any, types: dict[str, str | None], constants: dict[str, Any], tile: Tile) -> Variant:
    """Pointers of the type None are compile-time constants."""
    pointers = {name: kind for name, kind in types.items() if kind}
    numbers = [name for name in ("num_rows", "num_columns", "depth", "tokens") if name in kernel.arg_names]
    return Variant(
        kernel=kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constants=constants | dict.fromkeys(types.keys() - pointers.keys()) | {"EVEN_K": True} | dict(tile.blocks),
        divisible=(*pointers, "num_columns", "depth"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def sums_variant(dtype: str) -> Variant:
    """The kernel that adds up partial sums, for gradients of this dtype."""
    return Variant(
        kernel=dgelu_bwd_kernel_sums,
        signature={"p_partials": "*fp32", "p_sums": f"*{dtype}", "num_rows": "i32", "num_columns": "i32"},
        constants=_SUMS,
        divisible=("p_partials", "p_sums", "num_columns"),
        num_warps=4,
        num_stages=3,
    )
