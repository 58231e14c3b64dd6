# Gluon's functions are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
"""The tail of a sequence in short attention: the at most 16 rows after the last full block of 64, 5 of 197 tokens.

wgmma would multiply 64 rows for them; mma.sync multiplies 16. Each of the four warps takes a quarter of the other operand's 64 rows, so
that the P and dS that it computes are its own left operand of the next product. Nothing is exchanged until the warps' partial results are
added at the end.

- WARPS: of the warpgroup, the first axis of all products; ROWS: of the tail
- s_…_tail: the tail's rows in shared memory, as one stage of panels (`panels`); s_ without it: the full blocks
- width: a panel's columns, or all heads' where it is a stride
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2

from polyvit_kernels.hopper import panels
from polyvit_kernels.hopper.layouts import LN_2, vector

WARPS = gl.constexpr(4)
ROWS = gl.constexpr(16)


@gluon.constexpr_function
def warp_mma():
    """A product [WARPS, 16, columns] of mma.sync, each warp its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def operand(index):
    """The left (0) or right (1) operand of such a product."""
    return gl.DotOperandLayout(operand_index=index, parent=warp_mma(), k_width=2)


@gluon.constexpr_function
def tail_rows():
    """A vector with an element for each row of the tail, the same in all warps."""
    return gl.SliceLayout(0, gl.SliceLayout(2, warp_mma()))


@gluon.constexpr_function
def tail_columns():
    """A vector with an element for each column of a product with the tail, the same in all warps."""
    return gl.SliceLayout(0, gl.SliceLayout(1, warp_mma()))


@gluon.constexpr_function
def warps_in_thread(width):
    """[WARPS, 16, width] with all warps' values of an element in one thread, which adds them."""
    return gl.BlockedLayout([4, 1, 8], [1, 256 // width, width // 8], [1, 4, 1], [2, 1, 0])


@gluon.jit
def _broadcast_warps(b, L: gl.constexpr):
    """The same matrix for every warp."""
    # [1, rows, columns]
    b_one = gl.expand_dims(b, 0)
    # [WARPS, rows, columns]
    b_all, _ = gl.broadcast(b_one, gl.zeros([WARPS, b.shape[0], b.shape[1]], b.dtype, L))
    return b_all


@gluon.jit
def _load_left(s_rows):
    """The tail's rows as left operands."""
    b_panels = ()
    for w in gl.static_range(len(s_rows)):
        # [WARPS, 16, width]
        b_panels = b_panels + (_broadcast_warps(s_rows[w].load(gl.SliceLayout(0, operand(0))), operand(0)),)
    return b_panels


@gluon.jit
def _warp_rows(s_panels, i_stage):
    """The 64 rows of a block, 16 for each warp."""
    s_parts = ()
    for w in gl.static_range(len(s_panels)):
        # [WARPS, 16, width]
        s_parts = s_parts + (s_panels[w].index(i_stage).reshape([WARPS, 16, s_panels[w].shape[3]]),)
    return s_parts


@gluon.jit
def _scores(b_left, s_parts):
    """The product of the tail's rows with those of a block."""
    # [WARPS, 16, 16]
    b_s = gl.zeros([WARPS, ROWS, 16], gl.float32, warp_mma())
    for w in gl.static_range(len(s_parts)):
        b_s = mma_v2(b_left[w], s_parts[w].permute((0, 2, 1)).load(operand(1)), b_s)
    return b_s


@gluon.jit
def _tail_scores(b_left, s_rows):
    """The product of the tail's rows with themselves, the same in all warps."""
    # [WARPS, 16, 16]
    b_s = gl.zeros([WARPS, ROWS, ROWS], gl.float32, warp_mma())
    for w in gl.static_range(len(s_rows)):
        b_s = mma_v2(b_left[w], _broadcast_warps(s_rows[w].permute((1, 0)).load(gl.SliceLayout(0, operand(1))), operand(1)), b_s)
    return b_s


@gluon.jit
def _accumulate(b_p, s_parts, b_acc):
    """Add the product of `b_p` [WARPS, 16, 16] with the rows of a block."""
    # [WARPS, 16, 16]
    b_left = gl.convert_layout(b_p.to(s_parts[0].dtype), operand(0))
    b_new = ()
    for w in gl.static_range(len(s_parts)):
        # [WARPS, 16, width]
        b_new = b_new + (mma_v2(b_left, s_parts[w].load(operand(1)), b_acc[w]),)
    return b_new


@gluon.jit
def _accumulate_tail(b_p, s_rows, b_acc):
    """Add the product with the tail's rows. `b_p` is zero in all warps but one, or their sum would count it four times."""
    # [WARPS, 16, 16]
    b_left = gl.convert_layout(b_p.to(s_rows[0].dtype), operand(0))
    b_new = ()
    for w in gl.static_range(len(s_rows)):
        # [WARPS, 16, width]
        b_new = b_new + (mma_v2(b_left, _broadcast_warps(s_rows[w].load(gl.SliceLayout(0, operand(1))), operand(1)), b_acc[w]),)
    return b_new


@gluon.jit
def _zeros(WIDTH: gl.constexpr):
    return gl.zeros([WARPS, ROWS, WIDTH], gl.float32, warp_mma())


@gluon.jit
def _accumulators(like):
    """Zeros to be added to."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        # [WARPS, 16, width]
        b_panels = b_panels + (_zeros(like[w].shape[1]),)
    return b_panels


@gluon.jit
def _sum_warps(b):
    # [16, columns]
    return gl.sum(gl.convert_layout(b, warps_in_thread(b.shape[2])), 0)


@gluon.jit
def _reduce_warps(b_acc):
    """The sums over the warps, 32 columns at a time: what is exchanged must fit in shared memory next to the rows of two programs."""
    b_chunks = ()
    for w in gl.static_range(len(b_acc)):
        if b_acc[w].shape[2] == 64:
            # [WARPS, 16, 32] each
            b_left, b_right = gl.split(b_acc[w].reshape([WARPS, ROWS, 2, 32]).permute((0, 1, 3, 2)))
            # [16, 32] each
            b_chunks = b_chunks + (_sum_warps(b_left), _sum_warps(b_right))
        else:
            # [16, width]
            b_chunks = b_chunks + (_sum_warps(b_acc[w]),)
    return b_chunks


@gluon.jit
def _sum_rows(b_acc):
    """The sums over all rows and warps."""
    b_sums = ()
    for w in gl.static_range(len(b_acc)):
        # [width]
        b_sums = b_sums + (gl.convert_layout(gl.sum(gl.sum(b_acc[w], 1), 0), vector()),)
    return b_sums


@gluon.jit
def _mask_tail(b_s, i_first, tokens):
    """Scores with the tail's keys: minus infinity in all warps but one, and beyond the end."""
    # [WARPS], [16]
    i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, warp_mma())))
    i_key = i_first + gl.arange(0, b_s.shape[2], layout=tail_columns())
    # [WARPS, 16, 16]
    return gl.where((i_warp[:, None, None] == 0) & (i_key[None, None, :] < tokens), b_s, float("-inf"))


@gluon.jit
def _store_chunk(p, b, i_row, stride, tokens, i_column):
    L: gl.constexpr = gl.SliceLayout(0, warps_in_thread(b.shape[1]))
    # [16], [columns]
    i_rows = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    i_columns = i_column + gl.arange(0, b.shape[1], layout=gl.SliceLayout(0, L))
    gl.store(p + i_rows[:, None] * stride + i_columns[None, :], b.to(p.dtype.element_ty), mask=i_rows[:, None] < tokens)


@gluon.jit
def _store_rows(p, b_chunks, i_row, stride, tokens):
    """Store what `_reduce_warps` gives to the rows from `i_row` on, but not to those beyond the end."""
    for i in gl.static_range(len(b_chunks)):
        # [16, 32], or narrower at the end
        _store_chunk(p, b_chunks[i], i_row, stride, tokens, 32 * i)


@gluon.jit
def _scale_rows(b, b_factor):
    # [16, columns] * [16, 1]
    return b * gl.convert_layout(b_factor, gl.SliceLayout(1, gl.SliceLayout(0, warps_in_thread(b.shape[1]))))[:, None]


@gluon.jit
def attend_tail(
    s_q_tail, s_k, s_v, s_k_tail, s_v_tail, bar_v, p_out, p_lse, stride, tokens, scale, BLOCKS: gl.constexpr
):  # fmt: skip
    """The tail's queries: stores their output and log-sum-exp."""
    # [WARPS, 16, width]
    b_q = _load_left(panels.stage(s_q_tail, 0))
    # [WARPS, 16, 16]
    b_s_tail = _mask_tail(_tail_scores(b_q, panels.stage(s_k_tail, 0)), BLOCKS * 64, tokens)
    # [WARPS, 16]
    b_warp_max = gl.max(b_s_tail, 2)
    b_s = ()
    for c in gl.static_range(BLOCKS):
        # [WARPS, 16, 16] a block
        b_s = b_s + (_scores(b_q, _warp_rows(s_k, c)),)
        # [WARPS, 16]
        b_warp_max = gl.maximum(b_warp_max, gl.max(b_s[c], 2))
    # [16]
    b_max = gl.max(b_warp_max, 0) * scale
    mbarrier.wait(bar_v, 0)
    # [WARPS, 16, 16]
    b_p = gl.exp2(b_s_tail * scale - b_max[None, :, None])
    # [WARPS, 16]
    b_warp_sum = gl.sum(b_p, 2)
    # [WARPS, 16, width]
    b_out = _accumulate_tail(b_p, panels.stage(s_v_tail, 0), _accumulators(panels.stage(s_v_tail, 0)))
    for c in gl.static_range(BLOCKS):
        # [WARPS, 16, 16]
        b_p = gl.exp2(b_s[c] * scale - b_max[None, :, None])
        # [WARPS, 16]
        b_warp_sum = b_warp_sum + gl.sum(b_p, 2)
        # [WARPS, 16, width]
        b_out = _accumulate(b_p, _warp_rows(s_v, c), b_out)
    # [16]
    b_sum = gl.sum(b_warp_sum, 0)
    # [16, 32], or narrower at the end
    b_reduced = _reduce_warps(b_out)
    b_chunks = ()
    for i in gl.static_range(len(b_reduced)):
        # The shape of the chunk.
        b_chunks = b_chunks + (_scale_rows(b_reduced[i], 1.0 / b_sum),)
    _store_rows(p_out, b_chunks, BLOCKS * 64, stride, tokens)
    # [16]
    i_rows = BLOCKS * 64 + gl.arange(0, ROWS, layout=tail_rows())
    gl.store(p_lse + i_rows, b_max + gl.log2(b_sum), mask=i_rows < tokens)


@gluon.jit
def _load_vector(s_vector):
    """Elements for the 64 rows of a block, as columns of each warp's product."""
    # [WARPS, 1, 16]
    return s_vector.reshape([WARPS, 16]).load(gl.SliceLayout(1, warp_mma()))[:, None, :]


@gluon.jit
def differentiate_tail(
    s_q, s_k, s_v, s_do, s_q_tail, s_k_tail, s_v_tail, s_do_tail, s_lse, s_delta, p_dq, width, tokens, scale, BLOCKS: gl.constexpr
):  # fmt: skip
    """The tail's rows, as keys and as queries: stores their dQ, dK and dV, and gives the sums of dQ over them."""
    # [16, width]
    s_k_rows, s_v_rows = panels.stage(s_k_tail, 0), panels.stage(s_v_tail, 0)
    s_q_rows, s_do_rows = panels.stage(s_q_tail, 0), panels.stage(s_do_tail, 0)
    # [WARPS, 16, width]
    b_k = _load_left(s_k_rows)
    b_v = _load_left(s_v_rows)
    # [16]
    s_lse_tail = s_lse.index(BLOCKS).slice(0, ROWS)
    s_delta_tail = s_delta.index(BLOCKS).slice(0, ROWS)
    # As keys: an infinite log-sum-exp makes the probabilities zero in all warps but one.
    # [WARPS]
    i_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, warp_mma())))
    # [WARPS, 1, queries]
    b_lse_tail = gl.where(i_warp[:, None, None] == 0, s_lse_tail.load(tail_columns())[None, None, :], float("inf"))
    # [WARPS, keys, queries]
    b_p = gl.exp2(_tail_scores(b_k, s_q_rows) * scale - b_lse_tail)
    b_ds = b_p * (_tail_scores(b_v, s_do_rows) - s_delta_tail.load(tail_columns())[None, None, :])
    # [WARPS, keys, width]
    b_dv = _accumulate_tail(b_p, s_do_rows, _accumulators(s_v_rows))
    b_dk = _accumulate_tail(b_ds, s_q_rows, _accumulators(s_k_rows))
    for i in range(BLOCKS):
        # [WARPS, keys, queries]
        b_keys_p = gl.exp2(_scores(b_k, _warp_rows(s_q, i)) * scale - _load_vector(s_lse.index(i)))
        b_keys_ds = b_keys_p * (_scores(b_v, _warp_rows(s_do, i)) - _load_vector(s_delta.index(i)))
        # [WARPS, keys, width]
        b_dv = _accumulate(b_keys_p, _warp_rows(s_do, i), b_dv)
        b_dk = _accumulate(b_keys_ds, _warp_rows(s_q, i), b_dk)
    _store_rows(p_dq + 2 * width, _reduce_warps(b_dv), BLOCKS * 64, 3 * width, tokens)
    _store_rows(p_dq + width, panels.scale(_reduce_warps(b_dk), scale * LN_2), BLOCKS * 64, 3 * width, tokens)
    # As queries.
    # [WARPS, queries, width]
    b_q = _load_left(s_q_rows)
    b_do = _load_left(s_do_rows)
    # [1, queries, 1]
    b_lse = s_lse_tail.load(tail_rows())[None, :, None]
    b_delta = s_delta_tail.load(tail_rows())[None, :, None]
    # [WARPS, queries, keys]
    b_p = gl.exp2(_mask_tail(_tail_scores(b_q, s_k_rows) * scale - b_lse, BLOCKS * 64, tokens))
    # [WARPS, queries, width]
    b_dq = _accumulate_tail(b_p * (_tail_scores(b_do, s_v_rows) - b_delta), s_k_rows, _accumulators(s_q_rows))
    for j in range(BLOCKS):
        # [WARPS, queries, keys]
        b_queries_p = gl.exp2(_scores(b_q, _warp_rows(s_k, j)) * scale - b_lse)
        # [WARPS, queries, width]
        b_dq = _accumulate(b_queries_p * (_scores(b_do, _warp_rows(s_v, j)) - b_delta), _warp_rows(s_k, j), b_dq)
    _store_rows(p_dq, panels.scale(_reduce_warps(b_dq), scale * LN_2), BLOCKS * 64, 3 * width, tokens)
    # [width]
    return panels.scale(_sum_rows(b_dq), scale * LN_2)
