# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
"""Matrix products with what follows them in the same pass, on Hopper: a program finishes one tile while it multiplies the next.

There is a program an SM, and each has three warpgroups. Two multiply, each its half of a tile's rows, what TMA brings into a ring of
slots; they begin with the bias, and hand their sums on in the inputs' dtype through shared memory. The third one takes GELU, adds the
residual or multiplies by the slope, ROWS rows at a time. The first warpgroup also loads: it fills a slot again when the second one is done
with it. No atomics: every element has one writer, and runs repeat bit for bit, on any number of programs.

- d_a, d_b: descriptors of A in boxes of half a tile's rows, and of B; what lies beyond the end comes as zeros and is not stored
- ring: slots of both, and whether they are full or empty; hand: what is handed on, whether that is there or was taken, and the bias
- sizes: all tiles, those along a row, rows and columns of the output; tiles are numbered along rows, whose tiles read the same of A
- groups: eights of columns, so that the compiler knows that rows begin at multiples of 16 bytes
- tokens: rows of an example, which have one factor
- HALF: which half of a tile; STAGES: the ring's slots; ROWS: a part, which is finished at once, a multiple of 8, after which the swizzle of
  what is handed on repeats; REGISTERS: a thread's in the warpgroups that multiply, which need 160; the third one has what they leave
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from polyvit_kernels.hopper.layouts import ALIGNMENT, line_shared, mma, packed
from polyvit_kernels.tiles import Tile, Variant, num_sms, pick_for
from polyvit_kernels.triton_kernels import linear
from polyvit_kernels.triton_kernels.linear import gelu, gelu_and_slope

_BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_BIAS_SLOTS = gl.constexpr(3)  # of this tile, of the next one, and the one that is written


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
def _fill(d_a, d_b, ring, i_slot, i_row, i_column, i_k, pred, B_ROWS: gl.constexpr):
    """Begin to bring a slot's part of A, in two halves, and of B."""
    s_a, s_b, bar_full, _ = ring
    bar = bar_full.index(i_slot)
    mbarrier.expect(bar, 2 * d_a.block_type.nbytes + d_b.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(d_a, [i_row, i_k], bar, s_a.index(2 * i_slot), pred=pred)
    tma.async_copy_global_to_shared(d_a, [i_row + s_a.shape[1], i_k], bar, s_a.index(2 * i_slot + 1), pred=pred)
    if B_ROWS:
        tma.async_copy_global_to_shared(d_b, [i_k, i_column], bar, s_b.index(i_slot), pred=pred)
    else:
        tma.async_copy_global_to_shared(d_b, [i_column, i_k], bar, s_b.index(i_slot), pred=pred)


@gluon.jit
def _multiply(d_a, d_b, ring, hand, num_tiles, tiles_n, depth, BIAS: gl.constexpr, HALF: gl.constexpr):
    """A Bᵀ plus the bias, or A B without one, of one half of each tile's rows; the first half's warps load for both."""
    s_a, s_b, bar_full, bar_empty = ring
    s_h, bar_there, bar_taken, s_bias = hand
    STAGES: gl.constexpr = s_b.shape[0]
    BLOCK_K: gl.constexpr = s_a.shape[2]
    BLOCK_M: gl.constexpr = 2 * s_h.shape[1]
    BLOCK_N: gl.constexpr = s_h.shape[2]
    L: gl.constexpr = mma(BLOCK_N)
    i_first, step = gl.program_id(0), gl.num_programs(0)
    i_load, i_load_k = i_first, 0
    i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
    if HALF == 0:
        for j in gl.static_range(STAGES):
            _fill(d_a, d_b, ring, j, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
            i_load_k += BLOCK_K
            if i_load_k >= depth:
                i_load_k = 0
                i_load += step
                i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
    i_use = 0
    # [BLOCK_M / 2, BLOCK_N]
    b_sum = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, L)
    mbarrier.wait(bar_taken.index(HALF), 0)
    for i_turn in range(gl.cdiv(num_tiles - i_first, step)):
        if BIAS:
            # In the accumulators from the start it takes no further registers.
            b_bias = s_bias.index(i_turn % _BIAS_SLOTS).load(gl.SliceLayout(0, L))
            b_sum = b_bias[None, :].broadcast_to([BLOCK_M // 2, BLOCK_N])
        for i_k in range(0, depth, BLOCK_K):
            i_slot = i_use % STAGES
            mbarrier.wait(bar_full.index(i_slot), i_use // STAGES & 1)
            s_right = s_b.index(i_slot)
            if BIAS:
                s_right = s_right.permute((1, 0))
            b_sum = warpgroup_mma(s_a.index(2 * i_slot + HALF), s_right, b_sum, is_async=True, use_acc=BIAS or i_k > 0)
            b_sum = warpgroup_mma_wait(1, deps=[b_sum])
            # The product before this one is complete.
            i_done = (i_use + STAGES - 1) % STAGES
            if HALF == 1:
                mbarrier.arrive(bar_empty.index(i_done), count=1, pred=i_k > 0)
            elif i_use > 0:
                mbarrier.wait(bar_empty.index(i_done), (i_use - 1) // STAGES & 1)
                _fill(d_a, d_b, ring, i_done, i_row, i_column, i_load_k, i_load < num_tiles, not BIAS)
                i_load_k += BLOCK_K
                if i_load_k >= depth:
                    i_load_k = 0
                    i_load += step
                    i_row, i_column = _corner(i_load, tiles_n, BLOCK_M, BLOCK_N)
            i_use += 1
        b_sum = warpgroup_mma_wait(0, deps=[b_sum])
        if HALF == 1:
            mbarrier.arrive(bar_empty.index((i_use + STAGES - 1) % STAGES), count=1)
        mbarrier.wait(bar_taken.index(HALF), i_turn & 1)
        s_h.index(HALF).store(b_sum.to(s_h.dtype))
        mbarrier.arrive(bar_there.index(HALF), count=1)


@gluon.jit
def _load_bias(p_bias, i_tile, tiles_n, num_columns, BLOCK_N: gl.constexpr):
    """A tile's part of the bias, [BLOCK_N]."""
    o_n = i_tile % tiles_n * BLOCK_N + gl.arange(0, BLOCK_N, _line(BLOCK_N))
    return gl.load(p_bias + o_n, mask=o_n < num_columns, other=0.0).to(gl.float32)


@gluon.jit
def _elements(i_row, i_column, num_rows, num_columns, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr):
    """Offsets of a part's elements, [ROWS, BLOCK_N], and which of them exist."""
    o_m, o_n = gl.arange(0, ROWS, gl.SliceLayout(1, L)), gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    o_part = (i_row.to(gl.int64) * num_columns + i_column) + (o_m[:, None] * num_columns + o_n[None, :])
    return o_part, (o_m < num_rows - i_row)[:, None] & (o_n < num_columns - i_column)[None, :]


@gluon.jit
def _load_part(p_in, i_part, sizes, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, L: gl.constexpr):
    """What a part reads, counted over all tiles of this program; zeros beyond the last tile."""
    _, tiles_n, num_rows, num_columns = sizes
    PARTS: gl.constexpr = BLOCK_M // ROWS
    i_row, i_column = _corner(gl.program_id(0) + i_part // PARTS * gl.num_programs(0), tiles_n, BLOCK_M, BLOCK_N)
    o_part, m_part = _elements(i_row + i_part % PARTS * ROWS, i_column, num_rows, num_columns, ROWS, BLOCK_N, L)
    return gl.load(p_in + o_part, mask=m_part, other=0.0)


@gluon.jit
def _load_factors(p_factors, i_row, num_rows, tokens, ROWS: gl.constexpr, L: gl.constexpr):
    """The factors of a part's rows, [ROWS]."""
    o_m = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    return gl.load(p_factors + o_m // tokens, mask=o_m < num_rows, other=0.0)


@gluon.jit
def _finish(hand, p_bias, p_in, p_factors, p_out, p_slope, p_sums, sizes, tokens, GELU: gl.constexpr, ROWS: gl.constexpr):
    """The end of all tiles, a part after the other; what a part reads is loaded two parts ahead.

    Without `p_in` it is GELU, and its slope where there is a `p_slope`; else what is read is added, where there are `p_factors` after they
    multiplied, or with `p_sums` is what multiplies.
    """
    s_h, bar_there, bar_taken, s_bias = hand
    num_tiles, tiles_n, num_rows, num_columns = sizes
    BLOCK_M: gl.constexpr = 2 * s_h.shape[1]
    BLOCK_N: gl.constexpr = s_h.shape[2]
    PARTS: gl.constexpr = BLOCK_M // 2 // ROWS
    L: gl.constexpr = _pieces(BLOCK_N, p_out.dtype.element_ty.primitive_bitwidth)
    i_first, step = gl.program_id(0), gl.num_programs(0)
    s_parts = s_h._reinterpret(s_h.dtype, [2 * PARTS, ROWS, BLOCK_N], s_h.layout)
    if p_bias is not None:
        for j in gl.static_range(2):
            s_bias.index(j).store(_load_bias(p_bias, i_first + j * step, tiles_n, num_columns, BLOCK_N))
    for j in gl.static_range(2):
        mbarrier.arrive(bar_taken.index(j), count=1)
    i_part = 2
    if p_in is not None:
        b_next = _load_part(p_in, 0, sizes, ROWS, BLOCK_M, BLOCK_N, L)
        b_after = _load_part(p_in, 1, sizes, ROWS, BLOCK_M, BLOCK_N, L)
    i_turn = 0
    for i_tile in range(i_first, num_tiles, step):
        i_row, i_column = _corner(i_tile, tiles_n, BLOCK_M, BLOCK_N)
        if p_bias is not None:
            # [BLOCK_N]
            b_bias = _load_bias(p_bias, i_tile + 2 * step, tiles_n, num_columns, BLOCK_N)
        if p_sums is not None:
            # [ROWS, BLOCK_N]
            b_sums = gl.zeros([ROWS, BLOCK_N], gl.float32, L)
        for i_half in range(2):
            mbarrier.wait(bar_there.index(i_half), i_turn & 1)
            for i_within in range(PARTS):
                i = i_half * PARTS + i_within
                o_part, m_part = _elements(i_row + i * ROWS, i_column, num_rows, num_columns, ROWS, BLOCK_N, L)
                # [ROWS, BLOCK_N]
                b_out = s_parts.index(i).load(L).to(gl.float32)
                if p_in is not None:
                    b_in = b_next.to(gl.float32)
                    b_next = b_after
                    b_after = _load_part(p_in, i_part, sizes, ROWS, BLOCK_M, BLOCK_N, L)
                    i_part += 1
                    if p_factors is not None:
                        b_out *= _load_factors(p_factors, i_row + i * ROWS, num_rows, tokens, ROWS, L)[:, None]
                    if p_sums is None:
                        b_out += b_in
                    else:
                        b_out *= b_in
                        b_sums += b_out
                elif p_slope is not None:
                    b_out, b_slope = gelu_and_slope(b_out, GELU, False)
                    gl.store(p_slope + o_part, b_slope.to(p_slope.dtype.element_ty), mask=m_part)
                else:
                    b_out = gelu(b_out, GELU, False)
                gl.store(p_out + o_part, b_out.to(p_out.dtype.element_ty), mask=m_part)
            if p_bias is not None and i_half == 0:
                s_bias.index((i_turn + 2) % _BIAS_SLOTS).store(b_bias)
            mbarrier.arrive(bar_taken.index(i_half), count=1)
        if p_sums is not None:
            o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
            gl.store(p_sums + i_tile // tiles_n * num_columns + i_column + o_n, gl.sum(b_sums, 0), mask=o_n < num_columns - i_column)
        i_turn += 1  # noqa: SIM113 - Gluon knows no enumerate


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Of one arrival each."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _run(
    d_a,
    d_b,
    p_bias,
    p_in,
    p_factors,
    p_out,
    p_slope,
    p_sums,
    shape,
    GELU: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    num_rows, groups, depth, tokens = shape
    BIAS: gl.constexpr = p_bias is not None
    HALF_M: gl.constexpr = d_a.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_b.block_type.shape[0 if BIAS else 1]
    tiles_n = gl.cdiv(groups * 8, BLOCK_N)
    sizes = (gl.cdiv(num_rows, 2 * HALF_M) * tiles_n, tiles_n, num_rows, groups * 8)
    s_a = gl.allocate_shared_memory(d_a.dtype, [STAGES * 2] + d_a.block_type.shape, d_a.layout)
    s_b = gl.allocate_shared_memory(d_b.dtype, [STAGES] + d_b.block_type.shape, d_b.layout)
    s_h = gl.allocate_shared_memory(d_a.dtype, [2, HALF_M, BLOCK_N], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    s_bias = gl.allocate_shared_memory(gl.float32, [_BIAS_SLOTS, BLOCK_N], line_shared())
    ring = (s_a, s_b, _barriers(STAGES), _barriers(STAGES))
    hand = (s_h, _barriers(2), _barriers(2), s_bias)
    gl.warp_specialize(
        [
            (_finish, (hand, p_bias, p_in, p_factors, p_out, p_slope, p_sums, sizes, tokens, GELU, ROWS)),
            (_multiply, (d_a, d_b, ring, hand, sizes[0], tiles_n, depth, BIAS, 0)),
            (_multiply, (d_a, d_b, ring, hand, sizes[0], tiles_n, depth, BIAS, 1)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


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
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Y = gelu(H) and, if wanted, gelu'(H); H = X Wᵀ + b, rounded as autocast's product is."""
    _run(d_x, d_weight, p_bias, None, None, p_y, p_slope, None, (num_rows, groups, depth, 1), GELU, STAGES, ROWS, REGISTERS)


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth", "tokens"])
def linear_add_fwd_kernel(
    d_x,
    d_weight,
    p_bias,
    p_residual,
    p_factors,
    p_y,
    num_rows,
    groups,
    depth,
    tokens,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Y = R + f (X Wᵀ + b), without f where `p_factors` is None; the product is rounded as autocast's is before f multiplies it."""
    _run(d_x, d_weight, p_bias, p_residual, p_factors, p_y, None, None, (num_rows, groups, depth, tokens), "", STAGES, ROWS, REGISTERS)


@gluon.jit(do_not_specialize=["num_rows", "groups", "depth"])
def dgelu_bwd_kernel(
    d_grad, d_weight, p_slope, p_dpre, p_sums, num_rows, groups, depth, STAGES: gl.constexpr, ROWS: gl.constexpr, REGISTERS: gl.constexpr
):
    """dH = (dY W) · slope, of which the first factor is rounded as autocast's product is, and the sums of a tile's columns."""
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
    """residual + x weightᵀ + bias, in the dtype that torch's sum has; with `factors` the layer's rows are multiplied by their example's."""
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
    """Whether TMA can address all matrices: their rows are as long as one side of the weight, or the other."""
    return all(size * weight.element_size() % ALIGNMENT == 0 for size in weight.shape)


def _portable(op: str, x: Tensor) -> Tile:
    return pick_for(op, x, tokens=len(x), features=x.shape[1], portable=True)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def block_n(rows: int, columns: int, programs: int, tile: Tile) -> int:
    """The columns of a tile: the row's, or half as many where that takes less time.

    A tile of half the columns takes 0.56 of the time (0.53 to 0.58 on an H100), since it reads the same rows of A; but more tiles fill the
    last wave of programs better, and reach less far beyond the last column.
    """
    wide = tile.blocks["BLOCK_N"]
    tiles_m = _cdiv(rows, tile.blocks["BLOCK_M"])
    waves, narrow_waves = (_cdiv(tiles_m * _cdiv(columns, width), programs) for width in (wide, wide // 2))
    return wide if waves <= 0.56 * narrow_waves else wide // 2


def _launch(kernel: Any, a: Tensor, b: Tensor, tensors: tuple[Tensor | None, ...], out: Tensor, more: dict[str, Any], tile: Tile) -> None:
    if not out.numel():
        return
    rows, columns = out.shape
    processors = num_sms(out.device)
    width = block_n(rows, columns, processors, tile)
    boxes = _boxes(tile, width, kernel is dgelu_bwd_kernel)
    d_a, d_b = (TensorDescriptor.from_tensor(packed(x), box, _BOX_LAYOUT) for x, box in zip((a, b), boxes, strict=True))
    grid = (min(processors, _cdiv(rows, tile.blocks["BLOCK_M"]) * _cdiv(columns, width)),)
    options = {**more, **_constants(tile, width), "num_warps": tile.num_warps, "maxnreg": tile.max_registers}
    kernel[grid](d_a, d_b, *tensors, rows, columns // 8, a.shape[1], **options)


def _boxes(tile: Tile, width: int, rows: bool) -> tuple[list[int], list[int]]:
    """What is brought at once of A and of B, whose rows are the product's columns or, with `rows`, its depth."""
    blocks = tile.blocks
    b = [width, blocks["BLOCK_K"]]
    return [blocks["BLOCK_M"] // 2, blocks["BLOCK_K"]], b[::-1] if rows else b


def _constants(tile: Tile, width: int) -> dict[str, int]:
    """A narrow tile's slots are smaller, so there is one more, and its parts have twice the rows."""
    constants = {name: tile.blocks[name] for name in ("STAGES", "ROWS", "REGISTERS")}
    if width < tile.blocks["BLOCK_N"]:
        constants |= {"STAGES": constants["STAGES"] + 1, "ROWS": 2 * constants["ROWS"]}
    return constants


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a row: both widths of a tile, GELUs with their slope and without, dtypes of a residual with factors and without."""
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
            for gelu in ("erf", "tanh"):
                for slope, more in (({"p_slope": tensor}, {}), ({}, {"p_slope": None})):
                    pointers = {"p_bias": tensor, "p_y": tensor} | slope
                    yield _variant(linear_gelu_fwd_kernel, dtype, pointers, {"GELU": gelu} | more, tile, width)
    if tile.op == "dgelu_backward":
        yield linear.sums_variant(dtype)


def _variant(kernel: Any, dtype: str, pointers: dict[str, str], constants: dict[str, Any], tile: Tile, width: int) -> Variant:
    boxes = _boxes(tile, width, kernel is dgelu_bwd_kernel)
    descriptors = (f"tensordesc<{dtype}{box},{_BOX_LAYOUT!r}>" for box in boxes)
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
