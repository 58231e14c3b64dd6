# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
"""Matrix products with fused epilogues on Hopper: persistent programs that finish one tile while they multiply the next.

There is one program an SM, of three warpgroups. Two do wgmma, each on its half of a tile's rows, on operands that TMA brings into a ring of
stages; the first of them also issues the loads. They start their accumulators from the bias and hand them, rounded to the inputs' dtype,
through shared memory to the third warpgroup. That is the epilogue: it takes GELU, adds the residual or multiplies by the slope, ROWS rows
at a time, and stores. No atomics: every element has one writer, and runs repeat bit for bit, on any number of programs.

- d_a, d_b: descriptors of A, half a tile's rows, and of B; what lies beyond the end comes as zeros and is not stored
- ring: stages of A and B, and their mbarriers full and empty; handoff: the halves of a tile, their mbarriers written and read, the bias
- sizes: (number of tiles, tiles along a row, rows, columns); tiles are numbered along rows, so that neighbours read the same rows of A
- groups: columns / 8, so that the compiler knows that rows begin at multiples of 16 bytes
- tokens: rows of an example, which have one factor in common
- BIAS: there is one, and B is stored `[columns, depth]`; without, B is stored `[depth, columns]` (B_KN)
- HALF: which half of a tile's rows; STAGES: of the ring
- ROWS: of an epilogue subtile, a multiple of 8, after which the swizzle of the handoff repeats; SUBTILES: in half a tile
- REGISTERS: a thread's in the warpgroups that multiply, which need 160; the epilogue has what they leave
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.hopper.layouts import ALIGNMENT, mma, tma_aligned, vector_shared
from polyvit_kernels.tiles import Tile, Variant, num_sms, pick_for
from polyvit_kernels.triton_kernels import linear
from polyvit_kernels.triton_kernels.gelu import gelu, gelu_and_slope

_OPERAND_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_BIAS_STAGES = gl.constexpr(3)  # this tile's, the next one's, and the one that is being written


@gluon.constexpr_function
def _subtile_layout(columns, bits):
    """A subtile of the epilogue, 16 bytes a thread, 64 columns a warp."""
    width = 128 // bits
    return gl.BlockedLayout([1, width], [width // 2, 64 // width], [256 // columns, columns // 64], [1, 0])


@gluon.constexpr_function
def _bias_layout(columns):
    """A tile's part of the bias, over the four warps."""
    return gl.BlockedLayout([columns // 128], [32], [4], [0])


@gluon.jit
def _tile_origin(i_tile, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first row and the first column of a tile."""
    return i_tile // tiles_n * BLOCK_M, i_tile % tiles_n * BLOCK_N


@gluon.jit
def _load_stage(d_a, d_b, ring, i_stage, i_row, i_column, i_k, pred, B_KN: gl.constexpr):
    """Issue the TMA loads of a stage: both halves of A's rows, and B."""
    s_a, s_b, bar_full, _ = ring
    bar = bar_full.index(i_stage)
    mbarrier.expect(bar, 2 * d_a.block_type.nbytes + d_b.block_type.nbytes, pred=pred)
    # [BLOCK_M / 2, BLOCK_K], twice
    tma.async_copy_global_to_shared(d_a, [i_row, i_k], bar, s_a.index(2 * i_stage), pred=pred)
    tma.async_copy_global_to_shared(d_a, [i_row + s_a.shape[1], i_k], bar, s_a.index(2 * i_stage + 1), pred=pred)
    # [BLOCK_K, BLOCK_N] or [BLOCK_N, BLOCK_K]
    if B_KN:
        tma.async_copy_global_to_shared(d_b, [i_k, i_column], bar, s_b.index(i_stage), pred=pred)
    else:
        tma.async_copy_global_to_shared(d_b, [i_column, i_k], bar, s_b.index(i_stage), pred=pred)


@gluon.jit
def _multiply(d_a, d_b, ring, handoff, num_tiles, tiles_n, depth, BIAS: gl.constexpr, HALF: gl.constexpr):
    """A warpgroup that multiplies: A Bᵀ plus the bias, or A B without one, for its half of each tile's rows. HALF 0 loads for both."""
    s_a, s_b, bar_full, bar_empty = ring
    s_out, bar_written, bar_read, s_bias = handoff
    STAGES: gl.constexpr = s_b.shape[0]
    BLOCK_K: gl.constexpr = s_a.shape[2]
    BLOCK_M: gl.constexpr = 2 * s_out.shape[1]
    BLOCK_N: gl.constexpr = s_out.shape[2]
    L: gl.constexpr = mma(BLOCK_N)
    i_first, programs = gl.program_id(0), gl.num_programs(0)
    i_load, i_load_k = i_first, 0
    i_row, i_column = _tile_origin(i_load, tiles_n, BLOCK_M, BLOCK_N)
    # Fill the ring; loads run ahead of the products by STAGES steps, across the ends of tiles.
    if HALF == 0:
        for j in gl.static_range(STAGES):
            _load_stage(d_a, d_b, ring, j, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
            i_load_k += BLOCK_K
            if i_load_k >= depth:
                i_load_k = 0
                i_load += programs
                i_row, i_column = _tile_origin(i_load, tiles_n, BLOCK_M, BLOCK_N)
    i_step = 0
    # [BLOCK_M / 2, BLOCK_N]
    b_sum = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, L)
    # The epilogue has stored the bias of the first tiles.
    mbarrier.wait(bar_read.index(HALF), 0)
    for i_round in range(gl.cdiv(num_tiles - i_first, programs)):
        if BIAS:
            # [BLOCK_N]
            b_bias = s_bias.index(i_round % _BIAS_STAGES).load(gl.SliceLayout(0, L))
            # [BLOCK_M / 2, BLOCK_N]; accumulators that start from the bias need no registers for it later
            b_sum = b_bias[None, :].broadcast_to([BLOCK_M // 2, BLOCK_N])
        for i_k in range(0, depth, BLOCK_K):
            i_stage = i_step % STAGES
            mbarrier.wait(bar_full.index(i_stage), i_step // STAGES & 1)
            s_right = s_b.index(i_stage)
            if BIAS:
                # [BLOCK_K, BLOCK_N], as it is stored without a bias
                s_right = s_right.permute((1, 0))
            # [BLOCK_M / 2, BLOCK_N]
            b_sum = warpgroup_mma(s_a.index(2 * i_stage + HALF), s_right, b_sum, is_async=True, use_acc=BIAS or i_k > 0)
            b_sum = warpgroup_mma_wait(1, deps=[b_sum])
            # One product stays in flight; the one before it is complete, so its stage is free.
            i_free = (i_step + STAGES - 1) % STAGES
            if HALF == 1:
                mbarrier.arrive(bar_empty.index(i_free), count=1, pred=i_k > 0)
            elif i_step > 0:
                mbarrier.wait(bar_empty.index(i_free), (i_step - 1) // STAGES & 1)
                _load_stage(d_a, d_b, ring, i_free, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
                i_load_k += BLOCK_K
                if i_load_k >= depth:
                    i_load_k = 0
                    i_load += programs
                    i_row, i_column = _tile_origin(i_load, tiles_n, BLOCK_M, BLOCK_N)
            i_step += 1
        b_sum = warpgroup_mma_wait(0, deps=[b_sum])
        if HALF == 1:
            mbarrier.arrive(bar_empty.index((i_step + STAGES - 1) % STAGES), count=1)
        # The epilogue has read the tile before: hand this one over.
        mbarrier.wait(bar_read.index(HALF), i_round & 1)
        s_out.index(HALF).store(b_sum.to(s_out.dtype))
        mbarrier.arrive(bar_written.index(HALF), count=1)


@gluon.jit
def _load_bias(p_bias, i_tile, tiles_n, num_columns, BLOCK_N: gl.constexpr):
    """A tile's part of the bias."""
    # [BLOCK_N]
    o_n = i_tile % tiles_n * BLOCK_N + gl.arange(0, BLOCK_N, _bias_layout(BLOCK_N))
    return gl.load(p_bias + o_n, mask=o_n < num_columns, other=0.0).to(gl.float32)


@gluon.jit
def _output_offsets(i_row, i_column, num_rows, num_columns, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr):
    """Offsets of a subtile's elements, and which of them exist."""
    # [ROWS], [BLOCK_N]
    o_m, o_n = gl.arange(0, ROWS, gl.SliceLayout(1, L)), gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    # [ROWS, BLOCK_N]
    o_out = (i_row.to(gl.int64) * num_columns + i_column) + (o_m[:, None] * num_columns + o_n[None, :])
    return o_out, (o_m < num_rows - i_row)[:, None] & (o_n < num_columns - i_column)[None, :]


@gluon.jit
def _load_subtile(p_in, i_subtile, sizes, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr):
    """What the epilogue reads from memory for a subtile, counted over all tiles of this program; zeros beyond the last tile."""
    _, tiles_n, num_rows, num_columns = sizes
    SUBTILES: gl.constexpr = BLOCK_M // ROWS
    i_row, i_column = _tile_origin(gl.program_id(0) + i_subtile // SUBTILES * gl.num_programs(0), tiles_n, BLOCK_M, BLOCK_N)
    # [ROWS, BLOCK_N]
    o_out, m_out = _output_offsets(i_row + i_subtile % SUBTILES * ROWS, i_column, num_rows, num_columns, ROWS, BLOCK_N, L)
    return gl.load(p_in + o_out, mask=m_out, other=0.0)


@gluon.jit
def _load_factors(p_factors, i_row, num_rows, tokens, ROWS: gl.constexpr, L: gl.constexpr):
    """The factors of a subtile's rows."""
    # [ROWS]
    o_m = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    return gl.load(p_factors + o_m // tokens, mask=o_m < num_rows, other=0.0)


@gluon.jit
def _epilogue(handoff, p_bias, p_in, p_factors, p_out, p_slope, p_sums, sizes, tokens, GELU: gl.constexpr, ROWS: gl.constexpr):
    """The epilogue warpgroup: all tiles, one subtile after the other; what a subtile reads from memory is loaded two subtiles ahead.

    Without `p_in` it is GELU, with its slope where there is a `p_slope`. With `p_in` and `p_sums` the product is multiplied by `p_in`, and
    its columns are summed; with `p_in` alone that is added to the product, which `p_factors` have multiplied where they exist.
    """
    s_out, bar_written, bar_read, s_bias = handoff
    num_tiles, tiles_n, num_rows, num_columns = sizes
    BLOCK_M: gl.constexpr = 2 * s_out.shape[1]
    BLOCK_N: gl.constexpr = s_out.shape[2]
    SUBTILES: gl.constexpr = BLOCK_M // 2 // ROWS
    L: gl.constexpr = _subtile_layout(BLOCK_N, p_out.dtype.element_ty.primitive_bitwidth)
    i_first, programs = gl.program_id(0), gl.num_programs(0)
    # [2 * SUBTILES, ROWS, BLOCK_N]
    s_subtiles = s_out._reinterpret(s_out.dtype, [2 * SUBTILES, ROWS, BLOCK_N], s_out.layout)
    if p_bias is not None:
        for j in gl.static_range(2):
            s_bias.index(j).store(_load_bias(p_bias, i_first + j * programs, tiles_n, num_columns, BLOCK_N))
    # Both halves of the handoff begin empty.
    for j in gl.static_range(2):
        mbarrier.arrive(bar_read.index(j), count=1)
    i_subtile = 2
    if p_in is not None:
        # [ROWS, BLOCK_N]
        b_next = _load_subtile(p_in, 0, sizes, ROWS, BLOCK_M, BLOCK_N, L)
        b_after = _load_subtile(p_in, 1, sizes, ROWS, BLOCK_M, BLOCK_N, L)
    i_round = 0
    for i_tile in range(i_first, num_tiles, programs):
        i_row, i_column = _tile_origin(i_tile, tiles_n, BLOCK_M, BLOCK_N)
        if p_bias is not None:
            # [BLOCK_N]
            b_bias = _load_bias(p_bias, i_tile + 2 * programs, tiles_n, num_columns, BLOCK_N)
        if p_sums is not None:
            # [ROWS, BLOCK_N]
            b_sums = gl.zeros([ROWS, BLOCK_N], gl.float32, L)
        for i_half in range(2):
            mbarrier.wait(bar_written.index(i_half), i_round & 1)
            for i_in_half in range(SUBTILES):
                i = i_half * SUBTILES + i_in_half
                o_out, m_out = _output_offsets(i_row + i * ROWS, i_column, num_rows, num_columns, ROWS, BLOCK_N, L)
                # [ROWS, BLOCK_N]; all that follows has this shape
                b_out = s_subtiles.index(i).load(L).to(gl.float32)
                if p_in is not None:
                    b_in = b_next.to(gl.float32)
                    b_next = b_after
                    b_after = _load_subtile(p_in, i_subtile, sizes, ROWS, BLOCK_M, BLOCK_N, L)
                    i_subtile += 1
                    if p_factors is not None:
                        b_out *= _load_factors(p_factors, i_row + i * ROWS, num_rows, tokens, ROWS, L)[:, None]
                    if p_sums is None:
                        b_out += b_in
                    else:
                        b_out *= b_in
                        b_sums += b_out
                elif p_slope is not None:
                    b_out, b_slope = gelu_and_slope(b_out, GELU, False)
                    gl.store(p_slope + o_out, b_slope.to(p_slope.dtype.element_ty), mask=m_out)
                else:
                    b_out = gelu(b_out, GELU, False)
                gl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
            if p_bias is not None and i_half == 0:
                s_bias.index((i_round + 2) % _BIAS_STAGES).store(b_bias)
            mbarrier.arrive(bar_read.index(i_half), count=1)
        if p_sums is not None:
            o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
            # [BLOCK_N]
            gl.store(p_sums + i_tile // tiles_n * num_columns + i_column + o_n, gl.sum(b_sums, 0), mask=o_n < num_columns - i_column)
        i_round += 1  # noqa: SIM113 - Gluon knows no enumerate


@gluon.jit
def _init_barriers(COUNT: gl.constexpr):
    """mbarriers whose phases each take one arrival."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _run(
    d_a, d_b, p_bias, p_in, p_factors, p_out, p_slope, p_sums, shape,
    GELU: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Split the program into the epilogue and the two warpgroups that multiply."""
    num_rows, groups, depth, tokens = shape
    BIAS: gl.constexpr = p_bias is not None
    HALF_M: gl.constexpr = d_a.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_b.block_type.shape[0 if BIAS else 1]
    tiles_n = gl.cdiv(groups * 8, BLOCK_N)
    sizes = (gl.cdiv(num_rows, 2 * HALF_M) * tiles_n, tiles_n, num_rows, groups * 8)
    # [2 * STAGES, HALF_M, BLOCK_K]
    s_a = gl.allocate_shared_memory(d_a.dtype, [STAGES * 2] + d_a.block_type.shape, d_a.layout)
    # [STAGES, BLOCK_N, BLOCK_K] or [STAGES, BLOCK_K, BLOCK_N]
    s_b = gl.allocate_shared_memory(d_b.dtype, [STAGES] + d_b.block_type.shape, d_b.layout)
    # [2, HALF_M, BLOCK_N]
    s_out = gl.allocate_shared_memory(d_a.dtype, [2, HALF_M, BLOCK_N], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    # [_BIAS_STAGES, BLOCK_N]
    s_bias = gl.allocate_shared_memory(gl.float32, [_BIAS_STAGES, BLOCK_N], vector_shared())

    ring = (s_a, s_b, _init_barriers(STAGES), _init_barriers(STAGES))
    handoff = (s_out, _init_barriers(2), _init_barriers(2), s_bias)
    gl.warp_specialize(
        [
            (_epilogue, (handoff, p_bias, p_in, p_factors, p_out, p_slope, p_sums, sizes, tokens, GELU, ROWS)),
            (_multiply, (d_a, d_b, ring, handoff, sizes[0], tiles_n, depth, BIAS, 0)),
            (_multiply, (d_a, d_b, ring, handoff, sizes[0], tiles_n, depth, BIAS, 1)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def linear_gelu_fwd_kernel(
    d_x, d_weight, p_bias, p_y, p_slope, num_rows, groups, depth,
    GELU: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Y = gelu(H) and, unless `p_slope` is None, gelu'(H); H = X Wᵀ + b is rounded as autocast rounds it."""
    _run(d_x, d_weight, p_bias, None, None, p_y, p_slope, None, (num_rows, groups, depth, 1), GELU, STAGES, ROWS, REGISTERS)


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth", "tokens"])
def linear_add_fwd_kernel(
    d_x, d_weight, p_bias, p_residual, p_factors, p_y, num_rows, groups, depth, tokens,
    STAGES: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Y = R + f (X Wᵀ + b), without f where `p_factors` is None; X Wᵀ + b is rounded as autocast rounds it."""
    _run(d_x, d_weight, p_bias, p_residual, p_factors, p_y, None, None, (num_rows, groups, depth, tokens), "", STAGES, ROWS, REGISTERS)


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def dgelu_bwd_kernel(
    d_grad, d_weight, p_slope, p_dpre, p_sums, num_rows, groups, depth, STAGES: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr
):
    """dH = (dY W) · slope, and the sums of each tile's columns; dY W is rounded as autocast rounds it."""
    _run(d_grad, d_weight, None, p_slope, None, p_dpre, None, p_sums, (num_rows, groups, depth, 1), "", STAGES, ROWS, REGISTERS)


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool, tile: Tile) -> tuple[Tensor, Tensor]:
    """(gelu(H), gelu'(H)), H = x weightᵀ + bias; without `keep` the second one is empty."""
    if not _can_describe(weight):
        return linear.linear_gelu_forward(x, weight, bias, gelu, keep, _portable("linear_gelu_forward", x))
    y = x.new_empty(len(x), len(weight))
    slope = torch.empty_like(y) if keep else None
    _launch(linear_gelu_fwd_kernel, x, weight, (bias.contiguous(), y, slope), y, {"GELU": gelu}, tile)
    return y, x.new_empty(0) if slope is None else slope


def linear_add_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factors: Tensor | None, tile: Tile) -> Tensor:
    """residual + factors · (x weightᵀ + bias), in the dtype of torch's sum; one factor for each example, 1 without `factors`."""
    if not _can_describe(weight):
        return linear.linear_add_forward(x, weight, bias, residual, factors, _portable("linear_add_forward", x))
    y = x.new_empty(len(x), len(weight), dtype=torch.promote_types(x.dtype, residual.dtype))
    inputs = [None if tensor is None else tensor.contiguous() for tensor in (bias, residual, factors)]
    _launch(linear_add_fwd_kernel, x, weight, (*inputs, y), y, {"tokens": linear.num_tokens(x, factors)}, tile)
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
    """Whether TMA can address all matrices: a row of each is as long as one of the weight's two sides."""
    return all(size * weight.element_size() % ALIGNMENT == 0 for size in weight.shape)


def _portable(op: str, x: Tensor) -> Tile:
    return pick_for(op, x, tokens=len(x), features=x.shape[1], portable=True)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def block_n(rows: int, columns: int, programs: int, tile: Tile) -> int:
    """BLOCK_N: the tile's, or half of it where that takes less time.

    Half the columns take 0.56 of the time (0.53 to 0.58 on an H100), since A's rows are read all the same. But more and narrower tiles fill
    the last wave of programs better, and reach less far beyond the last column.
    """
    wide = tile.blocks["BLOCK_N"]
    tiles_m = _cdiv(rows, tile.blocks["BLOCK_M"])
    waves, narrow_waves = (_cdiv(tiles_m * _cdiv(columns, width), programs) for width in (wide, wide // 2))
    return wide if waves <= 0.56 * narrow_waves else wide // 2


def _launch(kernel: Any, a: Tensor, b: Tensor, tensors: tuple[Tensor | None, ...], out: Tensor, more: dict[str, Any], tile: Tile) -> None:
    if not out.numel():
        return
    rows, columns = out.shape
    num_programs = num_sms(out.device)
    width = block_n(rows, columns, num_programs, tile)
    shapes = _block_shapes(tile, width, kernel is dgelu_bwd_kernel)
    d_a, d_b = (TensorDescriptor.from_tensor(tma_aligned(x), shape, _OPERAND_LAYOUT) for x, shape in zip((a, b), shapes, strict=True))
    grid = (min(num_programs, _cdiv(rows, tile.blocks["BLOCK_M"]) * _cdiv(columns, width)),)
    options = {**more, **_constants(tile, width), "num_warps": tile.num_warps, "maxnreg": tile.max_registers}
    kernel[grid](d_a, d_b, *tensors, rows, columns // 8, a.shape[1], **options)


def _block_shapes(tile: Tile, width: int, b_kn: bool) -> tuple[list[int], list[int]]:
    """What a TMA load brings of A and of B; B is stored `[columns, depth]`, or `[depth, columns]` with `b_kn`."""
    blocks = tile.blocks
    b = [width, blocks["BLOCK_K"]]
    return [blocks["BLOCK_M"] // 2, blocks["BLOCK_K"]], b[::-1] if b_kn else b


def _constants(tile: Tile, width: int) -> dict[str, int]:
    """A narrow tile's stages are smaller, so there is one more, and its epilogue subtiles have twice the rows."""
    constants = {name: tile.blocks[name] for name in ("STAGES", "ROWS", "REGISTERS")}
    if width < tile.blocks["BLOCK_N"]:
        constants |= {"STAGES": constants["STAGES"] + 1, "ROWS": 2 * constants["ROWS"]}
    return constants


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a tile: both widths, GELUs with and without their slope, dtypes of a residual with and without factors."""
    tensor = f"*{dtype}"
    for width in (tile.blocks["BLOCK_N"], tile.blocks["BLOCK_N"] // 2):
        if tile.op == "linear_add_forward":
            for residual in dict.fromkeys((tensor, "*fp32")):
                for factors, more in (({"p_factors": "*fp32"}, {}), ({}, {"p_factors": None})):
                    pointers = {"p_bias": tensor, "p_residual": residual, "p_y": residual} | factors
                    yield _variant(linear_add_fwd_kernel, dtype, pointers, more, tile, width)
        elif tile.op == "dgelu_backward":
            yield _variant(dgelu_bwd_kernel, dtype, {"p_slope": tensor, "p_dpre": tensor, "p_sums": "*fp32"}, {}, tile, width)
        else:
            for gelu in ("erf", "tanh", "quick"):
                for slope, more in (({"p_slope": tensor}, {}), ({}, {"p_slope": None})):
                    pointers = {"p_bias": tensor, "p_y": tensor} | slope
                    yield _variant(linear_gelu_fwd_kernel, dtype, pointers, {"GELU": gelu} | more, tile, width)
    if tile.op == "dgelu_backward":
        yield linear.sums_variant(dtype)


def _variant(kernel: Any, dtype: str, pointers: dict[str, str], constants: dict[str, Any], tile: Tile, width: int) -> Variant:
    shapes = _block_shapes(tile, width, kernel is dgelu_bwd_kernel)
    descriptors = (f"tensordesc<{dtype}{shape},{_OPERAND_LAYOUT!r}>" for shape in shapes)
    signature = dict(zip(kernel.arg_names[:2], descriptors, strict=True)) | pointers
    return Variant(
        kernel=kernel,
        signature=signature | {name: "i32" for name in ("num_rows", "groups", "depth", "tokens") if name in kernel.arg_names},
        constants=constants | _constants(tile, width),
        divisible=tuple(pointers),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )
