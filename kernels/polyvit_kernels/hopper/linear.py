# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Matrix products with what follows them in the same pass, on Hopper: each of 132 programs finishes a tile while it multiplies the next.

A program has three warpgroups. Two multiply, each its half of a tile's rows, what TMA brings into a ring of STAGES slots; they begin with
the bias, and hand their sums on in the inputs' dtype through shared memory, a matrix H of [2, BLOCK_M / 2, BLOCK_N]. The third one takes
GELU, adds the residual or multiplies by the slope, ROWS rows at a time. The first warpgroup also loads: it fills a slot again when the
second one is done with it. No atomics: every element has one writer, and runs repeat bit for bit, on any number of programs.

- `d_`: a tensor descriptor; `s_`: shared memory; `bar_`: mbarriers; rows and columns beyond the end come as zeros and are not stored
- i_tile: tiles are numbered along a row first, since a row's tiles read the same rows of A; a program takes every 132nd
- groups: eights of columns, so that the compiler knows that rows begin at multiples of 16 bytes
- EPILOGUE: "gelu", "add" (a residual) or "multiply" (by a slope, with the columns' sums); KEEP: the slope of GELU is stored
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels import linear
from polyvit_kernels.linear import gelu, gelu_and_slope
from polyvit_kernels.tiles import Tile, Variant, pick_for

_BIAS_SLOTS = gl.constexpr(3)  # of this tile, of the next one, and the one that is written


@gluon.constexpr_function
def _accumulators(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _pieces(columns, bits):
    """Rows in pieces of 16 bytes, 64 columns a warp."""
    width = 128 // bits
    return gl.BlockedLayout([1, width], [width // 2, 64 // width], [256 // columns, columns // 64], [1, 0])


@gluon.constexpr_function
def _line(columns):
    return gl.BlockedLayout([columns // 128], [32], [4], [0])


@gluon.jit
def _corner(i_tile, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first row and the first column of a tile."""
    return i_tile // tiles_n * BLOCK_M, i_tile % tiles_n * BLOCK_N


@gluon.jit
def _fill(d_a, d_b, s_a, s_b, bar_full, i_slot, i_row, i_column, i_k, pred, B_ROWS: gl.constexpr):
    """Begin to bring a slot's part of A, in two halves, and of B."""
    bar = bar_full.index(i_slot)
    mbarrier.expect(bar, 2 * d_a.block_type.nbytes + d_b.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(d_a, [i_row, i_k], bar, s_a.index(2 * i_slot), pred=pred)
    tma.async_copy_global_to_shared(d_a, [i_row + s_a.shape[1], i_k], bar, s_a.index(2 * i_slot + 1), pred=pred)
    if B_ROWS:
        tma.async_copy_global_to_shared(d_b, [i_k, i_column], bar, s_b.index(i_slot), pred=pred)
    else:
        tma.async_copy_global_to_shared(d_b, [i_column, i_k], bar, s_b.index(i_slot), pred=pred)


@gluon.jit
def _multiply(
    d_a,
    d_b,
    s_a,
    s_b,
    s_h,
    s_bias,
    bar_full,
    bar_empty,
    bar_h_full,
    bar_h_empty,
    num_tiles,
    tiles_n,
    depth,
    HALF: gl.constexpr,
    BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A Bᵀ, or A B without a bias, of the half HALF of each tile's rows; the first half's warps load for both."""
    layout: gl.constexpr = _accumulators(BLOCK_N)
    step = gl.num_programs(0)
    i_load, i_load_k = gl.program_id(0), 0
    i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
    if HALF == 0:
        for j in gl.static_range(STAGES):
            _fill(d_a, d_b, s_a, s_b, bar_full, j, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
            i_load_k += BLOCK_K
            if i_load_k >= depth:
                i_load_k = 0
                i_load += step
                i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
    i_use = 0
    # [BLOCK_M / 2, BLOCK_N]
    b_sum = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, layout)
    mbarrier.wait(bar_h_empty.index(HALF), 0)
    for i_turn in range(gl.cdiv(num_tiles - gl.program_id(0), step)):
        if BIAS:
            b_bias = s_bias.index(i_turn % _BIAS_SLOTS).load(gl.SliceLayout(0, layout))
            b_sum = b_bias[None, :].broadcast_to([BLOCK_M // 2, BLOCK_N])
        for i_k in range(0, depth, BLOCK_K):
            i_slot = i_use % STAGES
            mbarrier.wait(bar_full.index(i_slot), i_use // STAGES & 1)
            s_left, s_right = s_a.index(2 * i_slot + HALF), s_b.index(i_slot)
            if BIAS:
                s_right = s_right.permute((1, 0))
            b_sum = warpgroup_mma(s_left, s_right, b_sum, is_async=True, use_acc=BIAS or i_k > 0)
            b_sum = warpgroup_mma_wait(1, deps=[b_sum])
            # The product before this one is complete.
            i_done = (i_use + STAGES - 1) % STAGES
            if HALF == 1:
                mbarrier.arrive(bar_empty.index(i_done), count=1, pred=i_k > 0)
            elif i_use > 0:
                mbarrier.wait(bar_empty.index(i_done), (i_use - 1) // STAGES & 1)
                _fill(d_a, d_b, s_a, s_b, bar_full, i_done, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
                i_load_k += BLOCK_K
                if i_load_k >= depth:
                    i_load_k = 0
                    i_load += step
                    i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
            i_use += 1
        b_sum = warpgroup_mma_wait(0, deps=[b_sum])
        if HALF == 1:
            mbarrier.arrive(bar_empty.index((i_use + STAGES - 1) % STAGES), count=1)
        mbarrier.wait(bar_h_empty.index(HALF), i_turn & 1)
        s_h.index(HALF).store(b_sum.to(s_h.dtype))
        mbarrier.arrive(bar_h_full.index(HALF), count=1)


@gluon.jit
def _load_bias(p_bias, i_tile, tiles_n, num_columns, BLOCK_N: gl.constexpr):
    """A tile's part of the bias, [BLOCK_N]."""
    o_n = i_tile % tiles_n * BLOCK_N + gl.arange(0, BLOCK_N, _line(BLOCK_N))
    return gl.load(p_bias + o_n, mask=o_n < num_columns, other=0.0).to(gl.float32)


@gluon.jit
def _elements(i_row, i_column, num_rows, num_columns, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr):
    """A part's elements, [ROWS, BLOCK_N]: where the first one is, offsets of all from there, and which of them exist."""
    o_m, o_n = gl.arange(0, ROWS, gl.SliceLayout(1, L)), gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    m_part = (o_m < num_rows - i_row)[:, None] & (o_n < num_columns - i_column)[None, :]
    return i_row.to(gl.int64) * num_columns + i_column, o_m[:, None] * num_columns + o_n[None, :], m_part


@gluon.jit
def _load_part(
    p_in, i_part, num_rows, num_columns, tiles_n, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr
):
    """What a part, counted over all tiles of this program, reads; zeros beyond the last tile."""
    PARTS: gl.constexpr = BLOCK_M // ROWS
    i_row, i_column = _corner(gl.program_id(0) + i_part // PARTS * gl.num_programs(0), tiles_n, BLOCK_M, BLOCK_N)
    i_part_row = i_row + i_part % PARTS * ROWS
    i_corner, o_part, m_part = _elements(i_part_row, i_column, num_rows, num_columns, ROWS, BLOCK_N, L)
    return gl.load(p_in + i_corner + o_part, mask=m_part, other=0.0)


@gluon.jit
def _finish(
    s_h,
    s_bias,
    bar_h_full,
    bar_h_empty,
    p_bias,
    p_in,
    p_out,
    p_slope,
    p_sums,
    num_tiles,
    tiles_n,
    num_rows,
    num_columns,
    EPILOGUE: gl.constexpr,
    GELU: gl.constexpr,
    KEEP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
):
    """The end of all tiles, a part of ROWS rows after the other; what a part reads is loaded two parts ahead."""
    layout: gl.constexpr = _pieces(BLOCK_N, p_out.dtype.element_ty.primitive_bitwidth)
    PARTS: gl.constexpr = BLOCK_M // 2 // ROWS
    i_first, step = gl.program_id(0), gl.num_programs(0)
    s_parts = s_h._reinterpret(s_h.dtype, [2 * PARTS, ROWS, BLOCK_N], s_h.layout)
    if p_bias is not None:
        for j in gl.static_range(2):
            s_bias.index(j).store(_load_bias(p_bias, i_first + j * step, tiles_n, num_columns, BLOCK_N))
    for j in gl.static_range(2):
        mbarrier.arrive(bar_h_empty.index(j), count=1)
    i_part = 2
    if p_in is not None:
        b_next = _load_part(p_in, 0, num_rows, num_columns, tiles_n, ROWS, BLOCK_M, BLOCK_N, layout)
        b_after = _load_part(p_in, 1, num_rows, num_columns, tiles_n, ROWS, BLOCK_M, BLOCK_N, layout)
    for i_turn in range(gl.cdiv(num_tiles - i_first, step)):
        i_tile = i_first + i_turn * step
        i_row, i_column = _corner(i_tile, tiles_n, BLOCK_M, BLOCK_N)
        if p_bias is not None:
            # [BLOCK_N]
            b_bias = _load_bias(p_bias, i_tile + 2 * step, tiles_n, num_columns, BLOCK_N)
        if p_sums is not None:
            # [ROWS, BLOCK_N]
            b_sums = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        for i_half in range(2):
            mbarrier.wait(bar_h_full.index(i_half), i_turn & 1)
            for i_within in range(PARTS):
                i = i_half * PARTS + i_within
                i_corner, o_part, m_part = _elements(i_row + i * ROWS, i_column, num_rows, num_columns, ROWS, BLOCK_N, layout)
                # [ROWS, BLOCK_N]
                b_out = s_parts.index(i).load(layout).to(gl.float32)
                if p_in is not None:
                    b_in = b_next.to(gl.float32)
                    b_next = b_after
                    b_after = _load_part(p_in, i_part, num_rows, num_columns, tiles_n, ROWS, BLOCK_M, BLOCK_N, layout)
                    i_part += 1
                if EPILOGUE == "add":
                    b_out += b_in
                elif EPILOGUE == "multiply":
                    b_out *= b_in
                    b_sums += b_out
                elif KEEP:
                    b_out, b_slope = gelu_and_slope(b_out, GELU, False)
                    gl.store(p_slope + i_corner + o_part, b_slope.to(p_slope.dtype.element_ty), mask=m_part)
                else:
                    b_out = gelu(b_out, GELU, False)
                gl.store(p_out + i_corner + o_part, b_out.to(p_out.dtype.element_ty), mask=m_part)
            if p_bias is not None and i_half == 0:
                s_bias.index((i_turn + 2) % _BIAS_SLOTS).store(b_bias)
            mbarrier.arrive(bar_h_empty.index(i_half), count=1)
        if p_sums is not None:
            o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            gl.store(p_sums + i_tile // tiles_n * num_columns + i_column + o_n, gl.sum(b_sums, 0), mask=o_n < num_columns - i_column)


@gluon.jit
def _run(
    d_a,
    d_b,
    p_bias,
    p_in,
    p_out,
    p_slope,
    p_sums,
    num_rows,
    groups,
    depth,
    EPILOGUE: gl.constexpr,
    GELU: gl.constexpr,
    KEEP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    num_columns = groups * 8
    tiles_n = gl.cdiv(num_columns, BLOCK_N)
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * tiles_n
    BIAS: gl.constexpr = EPILOGUE != "multiply"
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    s_a = gl.allocate_shared_memory(d_a.dtype, [STAGES * 2, BLOCK_M // 2, BLOCK_K], d_a.layout)
    s_b = gl.allocate_shared_memory(d_b.dtype, [STAGES] + d_b.block_type.shape, d_b.layout)
    s_h = gl.allocate_shared_memory(d_a.dtype, [2, BLOCK_M // 2, BLOCK_N], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    s_bias = gl.allocate_shared_memory(gl.float32, [_BIAS_SLOTS, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    bar_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    bar_h_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    bar_h_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(bar_full.index(i), count=1)
        mbarrier.init(bar_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(bar_h_full.index(i), count=1)
        mbarrier.init(bar_h_empty.index(i), count=1)
    # fmt: off
    gl.warp_specialize([
        (_finish, (s_h, s_bias, bar_h_full, bar_h_empty, p_bias, p_in, p_out, p_slope, p_sums, num_tiles, tiles_n, num_rows, num_columns,
                   EPILOGUE, GELU, KEEP, BLOCK_M, BLOCK_N, ROWS)),
        (_multiply, (d_a, d_b, s_a, s_b, s_h, s_bias, bar_full, bar_empty, bar_h_full, bar_h_empty, num_tiles, tiles_n, depth,
                     0, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)),
        (_multiply, (d_a, d_b, s_a, s_b, s_h, s_bias, bar_full, bar_empty, bar_h_full, bar_h_empty, num_tiles, tiles_n, depth,
                     1, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)),
    ], [4, 4], [REGISTERS, REGISTERS])
    # fmt: on


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def linear_gelu_fwd_kernel(
    d_x,
    d_weight,
    p_bias,
    p_y,
    p_slope,
    num_rows,
    groups,
    depth,
    GELU: gl.constexpr,
    KEEP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Y = gelu(H) and gelu'(H), H = X Wᵀ + b, which is rounded as autocast's product is."""
    # fmt: off
    _run(d_x, d_weight, p_bias, None, p_y, p_slope, None, num_rows, groups, depth,
         "gelu", GELU, KEEP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS, REGISTERS)
    # fmt: on


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def linear_add_fwd_kernel(
    d_x,
    d_weight,
    p_bias,
    p_residual,
    p_y,
    num_rows,
    groups,
    depth,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Y = R + (X Wᵀ + b), of which the second term is rounded as autocast's product is; R and Y have a dtype of their own."""
    # fmt: off
    _run(d_x, d_weight, p_bias, p_residual, p_y, None, None, num_rows, groups, depth,
         "add", "", False, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS, REGISTERS)
    # fmt: on


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def dgelu_bwd_kernel(
    d_grad,
    d_weight,
    p_slope,
    p_dpre,
    p_sums,
    num_rows,
    groups,
    depth,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dH = (dY W) · slope, of which the first factor is rounded as autocast's product is, and the sums of a tile's columns."""
    # fmt: off
    _run(d_grad, d_weight, None, p_slope, p_dpre, None, p_sums, num_rows, groups, depth,
         "multiply", "", False, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS, REGISTERS)
    # fmt: on


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool, tile: Tile) -> tuple[Tensor, Tensor]:
    """(gelu(H), gelu'(H)), H = x weightᵀ + bias; without `keep` the second one is empty."""
    if not _can_describe(weight):
        return linear.linear_gelu_forward(x, weight, bias, gelu, keep, _portable("linear_gelu_forward", x))
    y = x.new_empty(len(x), len(weight))
    slope = torch.empty_like(y) if keep else x.new_empty(0)
    _launch(linear_gelu_fwd_kernel, x, weight, (bias.contiguous(), y, slope), y, {"GELU": gelu, "KEEP": keep}, tile)
    return y, slope


def linear_add_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, tile: Tile) -> Tensor:
    """residual + x weightᵀ + bias, in the dtype that torch's sum has."""
    if not _can_describe(weight):
        return linear.linear_add_forward(x, weight, bias, residual, _portable("linear_add_forward", x))
    y = x.new_empty(len(x), len(weight), dtype=torch.promote_types(x.dtype, residual.dtype))
    _launch(linear_add_fwd_kernel, x, weight, (bias.contiguous(), residual.contiguous(), y), y, {}, tile)
    return y


def dgelu_backward(grad: Tensor, weight: Tensor, slope: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(dH, sums of dH's columns), dH = (grad weight) · slope."""
    if not _can_describe(weight):
        return linear.dgelu_backward(grad, weight, slope, _portable("dgelu_backward", grad))
    d_pre = slope.new_empty(slope.shape)
    partials = slope.new_empty(_cdiv(len(slope), tile.blocks["BLOCK_M"]), slope.shape[1], dtype=torch.float32)
    _launch(dgelu_bwd_kernel, grad, weight, (slope.contiguous(), d_pre, partials), d_pre, {}, tile)
    return d_pre, linear.sum_partials(partials, slope.dtype)


def _can_describe(weight: Tensor) -> bool:
    """Whether TMA can address all matrices, whose rows are as long as one side of the weight: multiples of 16 bytes."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape)


def _portable(op: str, x: Tensor) -> Tile:
    return pick_for(op, x, tokens=len(x), features=x.shape[1], portable=True)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def num_processors(device: torch.device) -> int:
    """How many programs run at once: each takes a whole processor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_n(rows: int, columns: int, programs: int, tile: Tile) -> int:
    """The columns of a tile: the row's, or half as many where that takes less time.

    A tile of half the columns takes 0.56 of the time (0.53 to 0.58 on an H100), since it reads the same rows of A; but more tiles fill the
    last wave of programs better, and reach less far beyond the last column.
    """
    wide = tile.blocks["BLOCK_N"]
    tiles_m = _cdiv(rows, tile.blocks["BLOCK_M"])
    waves, narrow_waves = (_cdiv(tiles_m * _cdiv(columns, width), programs) for width in (wide, wide // 2))
    return wide if waves <= 0.56 * narrow_waves else wide // 2


def _constants(tile: Tile, columns: int) -> dict[str, int]:
    """A narrow tile's slots are smaller, so there is one more, and its parts have twice the rows."""
    rows = tile.blocks["ROWS"]
    shape = {"STAGES": 3, "ROWS": rows} if columns == tile.blocks["BLOCK_N"] else {"STAGES": 4, "ROWS": 2 * rows}
    return {**tile.blocks, "BLOCK_N": columns, **shape}


def _launch(kernel: Any, a: Tensor, b: Tensor, tensors: tuple[Tensor, ...], out: Tensor, constants: dict[str, Any], tile: Tile) -> None:
    if not out.numel():
        return
    rows, columns = out.shape
    processors = num_processors(out.device)
    blocks = _constants(tile, block_n(rows, columns, processors, tile))
    d_a, d_b = (_describe(_packed(x), box) for x, box in zip((a, b), _boxes(blocks, kernel is dgelu_bwd_kernel), strict=True))
    grid = (min(processors, _cdiv(rows, blocks["BLOCK_M"]) * _cdiv(columns, blocks["BLOCK_N"])),)
    options = {**constants, **blocks, "num_warps": tile.num_warps, "maxnreg": tile.max_registers}
    kernel[grid](d_a, d_b, *tensors, rows, columns // 8, a.shape[1], **options)


def _packed(x: Tensor) -> Tensor:
    """`x` as TMA can address it: contiguous, at a multiple of 16 bytes."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _describe(x: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, box, _LAYOUT)


def _boxes(blocks: dict[str, int], rows: bool) -> tuple[list[int], list[int]]:
    """What is brought at once of A and of B, whose rows are the product's columns or, with `rows`, its depth."""
    b = [blocks["BLOCK_N"], blocks["BLOCK_K"]]
    return [blocks["BLOCK_M"] // 2, blocks["BLOCK_K"]], b[::-1] if rows else b


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a row: both widths of a tile, both GELUs, both dtypes of a residual."""
    tensor = f"*{dtype}"
    for width in (tile.blocks["BLOCK_N"], tile.blocks["BLOCK_N"] // 2):
        blocks = _constants(tile, width)
        if tile.op == "linear_add_forward":
            for residual in dict.fromkeys((tensor, "*fp32")):
                yield _variant(linear_add_fwd_kernel, dtype, {"p_bias": tensor, "p_residual": residual, "p_y": residual}, blocks, tile)
        elif tile.op == "dgelu_backward":
            yield _variant(dgelu_bwd_kernel, dtype, {"p_slope": tensor, "p_dpre": tensor, "p_sums": "*fp32"}, blocks, tile)
        else:
            pointers = dict.fromkeys(("p_bias", "p_y", "p_slope"), tensor)
            for gelu in ("erf", "tanh"):
                for keep in (True, False):
                    yield _variant(linear_gelu_fwd_kernel, dtype, pointers, {"GELU": gelu, "KEEP": keep, **blocks}, tile)
    if tile.op == "dgelu_backward":
        yield linear.sums_variant(dtype)


def _variant(kernel: Any, dtype: str, pointers: dict[str, str], constants: dict[str, Any], tile: Tile) -> Variant:
    boxes = _boxes(constants, kernel is dgelu_bwd_kernel)
    descriptors = (f"tensordesc<{dtype}{box},{_LAYOUT!r}>" for box in boxes)
    return Variant(
        kernel=kernel,
        signature=dict(zip(kernel.arg_names[:2], descriptors, strict=True))
        | pointers
        | dict.fromkeys(("num_rows", "groups", "depth"), "i32"),
        constants=constants,
        divisible=tuple(pointers),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )
