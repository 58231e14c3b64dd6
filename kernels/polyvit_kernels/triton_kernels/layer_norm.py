"""Layer normalisation in one pass over memory each way; adding a residual first costs no pass of its own.

Forward: a program normalises ROWS vectors, which stay in its registers between the mean, the variance and the output. Backward: persistent
programs walk over the vectors and keep the sums for the weight and the bias in registers; a second, small kernel adds up the programs'
partial sums. Their number does not depend on the GPU, so the sums have one order everywhere.

- WIDTH, BLOCK: the length of a vector and the power of two that holds it
- ROWS: vectors of a program (forward) or of an iteration (backward)
- PROGRAMS: persistent programs of the backward; SUMS: partial sums that each of them has of every column; STAGES: loads in flight
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
def layer_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_sum,
    p_out,
    p_mean,
    p_rstd,
    rows,
    stride_x,
    stride_residual,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum with the residual, that normalised, its mean and reciprocal std. Without a residual, its pointers are None."""
    # [ROWS], [BLOCK]
    i_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_columns = tl.arange(0, BLOCK)
    m_rows = i_rows < rows
    m_columns = i_columns < WIDTH
    # Where the vectors fill their blocks, one column of the mask is enough.
    mask = m_rows[:, None] if WIDTH == BLOCK else m_rows[:, None] & m_columns[None, :]
    # [BLOCK]
    b_weight = tl.load(p_weight + i_columns, m_columns, 0.0).to(tl.float32)
    b_bias = tl.load(p_bias + i_columns, m_columns, 0.0).to(tl.float32)
    # [ROWS, BLOCK]
    o_out = i_rows[:, None] * WIDTH + i_columns[None, :]
    b_x = tl.load(p_x + i_rows[:, None] * stride_x + i_columns[None, :], mask, 0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + i_rows[:, None] * stride_residual + i_columns[None, :], mask, 0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_out, b_sum, mask)
        # The backward sees only the rounded sum, so that is what must be normalised.
        b_x = b_sum.to(tl.float32)
    # [ROWS]
    b_mean = tl.sum(b_x, 1) / WIDTH
    # [ROWS, BLOCK]
    b_centred = b_x - b_mean[:, None]
    if WIDTH != BLOCK:
        b_centred = tl.where(m_columns[None, :], b_centred, 0.0)
    # [ROWS]
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / WIDTH + eps)
    # [ROWS, BLOCK]
    b_out = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask)
    tl.store(p_mean + i_rows, b_mean, m_rows)
    tl.store(p_rstd + i_rows, b_rstd, m_rows)


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_bwd_kernel(
    p_grad,
    p_grad_sum,
    p_x,
    p_weight,
    p_mean,
    p_rstd,
    p_factors,
    p_dx,
    p_low,
    p_partials,
    rows,
    tokens,
    stride_grad,
    stride_grad_sum,
    stride_x,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dX, once more in another form, and the partial sums of this program.

    `p_low` takes dX in a lower precision; it may be None. Where there are `p_factors`, fp32, one for each example of `tokens` vectors, it
    is multiplied by them. `p_grad_sum`, the gradient of the sum with the residual, is added to dX; it may be None.
    `p_partials` `[programs, SUMS, WIDTH]` takes the sums for the weight, for the bias and, where SUMS is 3, of what `p_low` takes.
    """
    i_program = tl.program_id(0)
    # [BLOCK]
    i_columns = tl.arange(0, BLOCK)
    m_columns = i_columns < WIDTH
    b_weight = tl.load(p_weight + i_columns, m_columns, 0.0).to(tl.float32)
    # [ROWS, BLOCK]; summed over the rows at the end, since a reduction across warps in every iteration would cost more
    b_d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    b_d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    b_low_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_block in tl.range(i_program, tl.cdiv(rows, ROWS), PROGRAMS, num_stages=STAGES):
        # [ROWS]
        i_rows = i_block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_rows = i_rows < rows
        # [ROWS, 1] or [ROWS, BLOCK]
        mask = m_rows[:, None] if WIDTH == BLOCK else m_rows[:, None] & m_columns[None, :]
        # [ROWS, BLOCK]; beyond the vectors both are 0, so b_normal, which is not, adds nothing there
        b_x = tl.load(p_x + i_rows[:, None] * stride_x + i_columns[None, :], mask, 0.0).to(tl.float32)
        b_grad = tl.load(p_grad + i_rows[:, None] * stride_grad + i_columns[None, :], mask, 0.0).to(tl.float32)
        # [ROWS]
        b_mean = tl.load(p_mean + i_rows, m_rows, 0.0)
        b_rstd = tl.load(p_rstd + i_rows, m_rows, 0.0)
        # [ROWS, BLOCK]
        b_normal = (b_x - b_mean[:, None]) * b_rstd[:, None]
        b_d_weight += b_grad * b_normal
        b_d_bias += b_grad
        b_g = b_grad * b_weight[None, :]
        # [ROWS]
        b_along = tl.sum(b_g * b_normal, 1) / WIDTH
        # [ROWS, BLOCK]
        b_dx = b_rstd[:, None] * (b_g - (tl.sum(b_g, 1) / WIDTH)[:, None] - b_normal * b_along[:, None])
        if p_grad_sum is not None:
            b_dx += tl.load(p_grad_sum + i_rows[:, None] * stride_grad_sum + i_columns[None, :], mask, 0.0).to(tl.float32)
        o_dx = i_rows[:, None] * WIDTH + i_columns[None, :]
        tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask)
        if p_factors is not None:
            # [ROWS]; the index is divided in 32 bits, which takes a fraction of the instructions of 64
            b_factors = tl.load(p_factors + (i_block * ROWS + tl.arange(0, ROWS)) // tokens, m_rows, 0.0)
            # [ROWS, BLOCK]
            b_dx *= b_factors[:, None]
        if p_low is not None:
            tl.store(p_low + o_dx, b_dx.to(p_low.dtype.element_ty), mask)
        if SUMS == 3:
            b_low_sum += b_dx
    # [BLOCK]
    o_partial = i_program * SUMS * WIDTH + i_columns
    tl.store(p_partials + o_partial, tl.sum(b_d_weight, 0), m_columns)
    tl.store(p_partials + WIDTH + o_partial, tl.sum(b_d_bias, 0), m_columns)
    if SUMS == 3:
        tl.store(p_partials + 2 * WIDTH + o_partial, tl.sum(b_low_sum, 0), m_columns)


@triton.jit
def layer_norm_bwd_kernel_parameters(
    p_partials,
    p_d_weight,
    p_d_bias,
    p_dx_sum,
    programs,
    WIDTH: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The sums of `p_partials` over the programs, for a few columns. Without a third sum `p_dx_sum` is None."""
    # [BLOCK_PROGRAMS], [BLOCK_COLUMNS]
    i_programs = tl.arange(0, BLOCK_PROGRAMS)
    i_columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_columns = i_columns < WIDTH
    # [BLOCK_COLUMNS, BLOCK_PROGRAMS]
    mask = m_columns[:, None] & (i_programs < programs)[None, :]
    o_partials = i_columns[:, None] + i_programs[None, :] * SUMS * WIDTH
    # [BLOCK_COLUMNS]
    b_d_weight = tl.sum(tl.load(p_partials + o_partials, mask, 0.0), 1)
    b_d_bias = tl.sum(tl.load(p_partials + WIDTH + o_partials, mask, 0.0), 1)
    tl.store(p_d_weight + i_columns, b_d_weight.to(p_d_weight.dtype.element_ty), m_columns)
    tl.store(p_d_bias + i_columns, b_d_bias.to(p_d_bias.dtype.element_ty), m_columns)
    if p_dx_sum is not None:
        # [BLOCK_COLUMNS]
        b_dx_sum = tl.sum(tl.load(p_partials + 2 * WIDTH + o_partials, mask, 0.0), 1)
        tl.store(p_dx_sum + i_columns, b_dx_sum.to(p_dx_sum.dtype.element_ty), m_columns)


_COLUMNS = 8
_PARAMETER_WARPS = 8


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, tile: Tile
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(x + residual, that normalised, its means, its reciprocal stds); the first is None without a residual."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    total = None if residual is None else torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    if not x.numel():
        return total, out, mean, rstd
    x = _as_rows(x)
    residual = None if residual is None else _as_rows(residual)
    launch: Any = layer_norm_fwd_kernel[(triton.cdiv(len(x), tile.blocks["ROWS"]),)]
    launch(
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        total,
        out,
        mean,
        rstd,
        len(x),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **tile.launch(),
    )
    return total, out, mean, rstd


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    tile: Tile,
    low_dtype: torch.dtype | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """(dX, dX in `low_dtype`, the sums of that over all vectors, the gradient of the weight, of the bias).

    `grad_sum`, if there is one, is added to dX. The second one is multiplied by the `factors` of the examples; it is None without a
    `low_dtype`, and where it would equal the first. The sums are rounded last; they are None without a `low_dtype`.
    """
    width = x.shape[-1]
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_same = low_dtype is x.dtype and factors is None
    low = None if low_dtype is None or is_same else torch.empty(x.shape, dtype=low_dtype, device=x.device)
    sums = None if low_dtype is None else torch.empty(width, dtype=low_dtype, device=x.device)
    if not x.numel():
        return d_x, low, sums if sums is None else sums.zero_(), weight.new_zeros(width), weight.new_zeros(width)
    x, grad = _as_rows(x), _as_rows(grad)
    grad_sum = None if grad_sum is None else _as_rows(grad_sum)
    programs = min(tile.blocks["PROGRAMS"], -(-len(x) // tile.blocks["ROWS"]))
    partials = torch.empty(programs, _num_sums(sums), width, dtype=torch.float32, device=x.device)
    launch: Any = layer_norm_bwd_kernel[(programs,)]
    launch(
        grad,
        grad_sum,
        x,
        weight.contiguous(),
        mean,
        rstd,
        None if factors is None else factors.contiguous(),
        d_x,
        low,
        partials,
        len(x),
        1 if factors is None else len(x) // len(factors),
        grad.stride(0),
        0 if grad_sum is None else grad_sum.stride(0),
        x.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        SUMS=_num_sums(sums),
        **tile.launch(),
    )
    return d_x, low, sums, *_sum_partials(partials, weight.dtype, sums, tile)


def _sum_partials(partials: Tensor, dtype: torch.dtype, sums: Tensor | None, tile: Tile) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and of the bias; writes `sums` unless they are None."""
    programs, _, width = partials.shape
    d_weight, d_bias = (torch.empty(width, dtype=dtype, device=partials.device) for _ in range(2))
    launch: Any = layer_norm_bwd_kernel_parameters[(triton.cdiv(width, _COLUMNS),)]
    launch(
        partials,
        d_weight,
        d_bias,
        sums,
        programs,
        WIDTH=width,
        SUMS=_num_sums(sums),
        BLOCK_PROGRAMS=triton.next_power_of_2(tile.blocks["PROGRAMS"]),
        BLOCK_COLUMNS=_COLUMNS,
        num_warps=_PARAMETER_WARPS,
        num_stages=1,
    )
    return d_weight, d_bias


def _num_sums(sums: object) -> int:
    """How many vectors a program sums up: for the weight, for the bias, and of the gradient of x where that is wanted."""
    return 2 if sums is None else 3


def _as_rows(x: Tensor) -> Tensor:
    """`[rows, width]` with adjacent elements in each row; a copy only where they are not adjacent."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a tile for vectors of `dtype` as long as in the usual ViTs, with fp32 weights, with a residual and without.

    An fp32 stream also has branches in bf16, as under autocast. The backward with a residual also gives the rounded gradient and its sums,
    with factors and without.
    """
    usual = [width for width in (192, 384, 768, 1024, 1280) if triton.next_power_of_2(width) == tile.features]
    outs = ("fp32", "bf16") if dtype == "fp32" else (dtype,)
    for width in usual or [tile.features]:
        if tile.op == "layer_norm_forward":
            for out in outs:
                types = {"p_x": f"*{dtype}", "p_residual": f"*{out}", "p_sum": f"*{dtype}", "p_out": f"*{out}"}
                yield _variant(layer_norm_fwd_kernel, types, {}, width, tile)
                yield _variant(layer_norm_fwd_kernel, types, {"p_residual": None, "p_sum": None}, width, tile)
        else:
            for out in outs:
                types = {"p_x": f"*{dtype}", "p_grad": f"*{out}", "p_grad_sum": f"*{dtype}", "p_dx": f"*{dtype}", "p_low": f"*{out}"}
                low = {"p_low": None} if out == dtype else {}
                yield _variant(layer_norm_bwd_kernel, types, {"SUMS": 3, "p_factors": None} | low, width, tile)
                yield _variant(layer_norm_bwd_kernel, types, {"SUMS": 3}, width, tile)
                alone = {"SUMS": 2, "p_grad_sum": None, "p_factors": None, "p_low": None}
                yield _variant(layer_norm_bwd_kernel, types, alone, width, tile)
            for out in outs:
                yield _parameters_variant(width, {"SUMS": 3}, out, tile)
            yield _parameters_variant(width, {"SUMS": 2, "p_dx_sum": None}, dtype, tile)


def _variant(kernel: Any, types: dict[str, str], more: dict[str, int | None], width: int, tile: Tile) -> Variant:
    """`more` are further constants; None is a pointer that is absent."""
    constants = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), **tile.blocks, **more}
    names = [name for name in kernel.arg_names if name not in constants]
    usual = {name: "*fp32" if name.startswith("p_") else "fp32" if name == "eps" else "i32" for name in names}
    return Variant(
        kernel=kernel,
        signature={name: types.get(name, kind) for name, kind in usual.items()},
        constants=constants,
        divisible=tuple(name for name in names if name.startswith(("p_", "stride"))),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )


def _parameters_variant(width: int, more: dict[str, int | None], low: str, tile: Tile) -> Variant:
    """With sums in `low`, unless `more` leaves them out."""
    kernel: Any = layer_norm_bwd_kernel_parameters
    block_programs = triton.next_power_of_2(tile.blocks["PROGRAMS"])
    constants = {"WIDTH": width, "BLOCK_PROGRAMS": block_programs, "BLOCK_COLUMNS": _COLUMNS, **more}
    pointers = {name: f"*{low}" if name == "p_dx_sum" else "*fp32" for name in kernel.arg_names if name[:2] == "p_" and name not in more}
    return Variant(
        kernel=kernel,
        signature=pointers | {"programs": "i32"},
        constants=constants,
        divisible=tuple(pointers),
        num_warps=_PARAMETER_WARPS,
        num_stages=1,
    )
