# Gluon's functions are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
"""The few rows after whole blocks of 64, 5 of 197, in the attention of at most 256 tokens: wgmma would multiply 64 for them.

mma.sync multiplies 16. Each of the four warps takes a quarter of the other factor's rows, so that what it computes of P and dS is its own
left factor of the next product, and nothing is exchanged before the warps' parts are added at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2

from polyvit_kernels.hopper.layouts import LN_2, box, line, times

PARTS = gl.constexpr(4)  # warps
ROWS = gl.constexpr(16)


@gluon.constexpr_function
def product():
    """Of the warps' parts of a product: [PARTS, 16, columns]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def factor(index):
    """Of its left (0) or right (1) factor."""
    return gl.DotOperandLayout(operand_index=index, parent=product(), k_width=2)


@gluon.constexpr_function
def rows():
    """Of a number a row of the product, the same for all parts."""
    return gl.SliceLayout(0, gl.SliceLayout(2, product()))


@gluon.constexpr_function
def together(width):
    """Of parts to be added: all of an element lie in one thread."""
    return gl.BlockedLayout([4, 1, 8], [1, 256 // width, width // 8], [1, 4, 1], [2, 1, 0])


@gluon.jit
def _for_all(b, L: gl.constexpr):
    """The same matrix for every part."""
    b_one = gl.expand_dims(b, 0)
    b_all, _ = gl.broadcast(b_one, gl.zeros([PARTS, b.shape[0], b.shape[1]], b.dtype, L))
    return b_all


@gluon.jit
def read_left(s_rows):
    """The few rows, a left factor."""
    b_panels = ()
    for w in gl.static_range(len(s_rows)):
        b_panels = b_panels + (_for_all(s_rows[w].load(gl.SliceLayout(0, factor(0))), factor(0)),)
    return b_panels


@gluon.jit
def quarters(s_panels, i_box):
    """The rows of a block, [PARTS, 16, width] a panel."""
    s_parts = ()
    for w in gl.static_range(len(s_panels)):
        s_parts = s_parts + (s_panels[w].index(i_box).reshape([PARTS, 16, s_panels[w].shape[3]]),)
    return s_parts


@gluon.jit
def scores(b_left, s_parts):
    """The product of the few rows with those of a block, [PARTS, 16, 16]."""
    b_s = gl.zeros([PARTS, ROWS, 16], gl.float32, product())
    for w in gl.static_range(len(s_parts)):
        b_s = mma_v2(b_left[w], s_parts[w].permute((0, 2, 1)).load(factor(1)), b_s)
    return b_s


@gluon.jit
def scores_of_few(b_left, s_rows):
    """The product of the few rows with themselves, the same for every part."""
    b_s = gl.zeros([PARTS, ROWS, ROWS], gl.float32, product())
    for w in gl.static_range(len(s_rows)):
        b_s = mma_v2(b_left[w], _for_all(s_rows[w].permute((1, 0)).load(gl.SliceLayout(0, factor(1))), factor(1)), b_s)
    return b_s


@gluon.jit
def sums(b_p, s_parts, b_acc):
    """Add the product with the rows of a block."""
    b_left = gl.convert_layout(b_p.to(s_parts[0].dtype), factor(0))
    b_new = ()
    for w in gl.static_range(len(s_parts)):
        b_new = b_new + (mma_v2(b_left, s_parts[w].load(factor(1)), b_acc[w]),)
    return b_new


@gluon.jit
def sums_of_few(b_p, s_rows, b_acc):
    """Add the product with the few rows. But for one part, P is zero."""
    b_left = gl.convert_layout(b_p.to(s_rows[0].dtype), factor(0))
    b_new = ()
    for w in gl.static_range(len(s_rows)):
        b_new = b_new + (mma_v2(b_left, _for_all(s_rows[w].load(gl.SliceLayout(0, factor(1))), factor(1)), b_acc[w]),)
    return b_new


@gluon.jit
def _zeros(WIDTH: gl.constexpr):
    return gl.zeros([PARTS, ROWS, WIDTH], gl.float32, product())


@gluon.jit
def empty_sums(s_rows):
    """Zeros to be added to, [PARTS, 16, width] a panel."""
    b_panels = ()
    for w in gl.static_range(len(s_rows)):
        b_panels = b_panels + (_zeros(s_rows[w].shape[1]),)
    return b_panels


@gluon.jit
def _add(b):
    return gl.sum(gl.convert_layout(b, together(b.shape[2])), 0)


@gluon.jit
def add_parts(b_acc):
    """[16, 32] a piece of 32 columns, or the last one narrower: what is exchanged at a time must fit beside two programs' rows."""
    b_pieces = ()
    for w in gl.static_range(len(b_acc)):
        if b_acc[w].shape[2] == 64:
            b_left, b_right = gl.split(b_acc[w].reshape([PARTS, ROWS, 2, 32]).permute((0, 1, 3, 2)))
            b_pieces = b_pieces + (_add(b_left), _add(b_right))
        else:
            b_pieces = b_pieces + (_add(b_acc[w]),)
    return b_pieces


@gluon.jit
def add_rows(b_acc):
    """The sums over all rows and parts, [width] a panel."""
    b_sums = ()
    for w in gl.static_range(len(b_acc)):
        b_sums = b_sums + (gl.convert_layout(gl.sum(gl.sum(b_acc[w], 1), 0), line()),)
    return b_sums


@gluon.jit
def mask_few(b_s, i_first, tokens):
    """Scores with the few rows: one part's, and not beyond the end."""
    i_part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product())))
    i_key = i_first + gl.arange(0, b_s.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, product())))
    return gl.where((i_part[:, None, None] == 0) & (i_key[None, None, :] < tokens), b_s, float("-inf"))


@gluon.jit
def _store_piece(p, b, i_row, stride, tokens, first):
    L: gl.constexpr = gl.SliceLayout(0, together(b.shape[1]))
    r = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    c = first + gl.arange(0, b.shape[1], layout=gl.SliceLayout(0, L))
    gl.store(p + r[:, None] * stride + c[None, :], b.to(p.dtype.element_ty), mask=r[:, None] < tokens)


@gluon.jit
def store_few(p, b_pieces, i_row, stride, tokens):
    """Store the rows from `i_row`, but not those beyond the end."""
    for i in gl.static_range(len(b_pieces)):
        _store_piece(p, b_pieces[i], i_row, stride, tokens, 32 * i)


@gluon.jit
def _scale_rows(b, b_factor):
    return b * gl.convert_layout(b_factor, gl.SliceLayout(1, gl.SliceLayout(0, together(b.shape[1]))))[:, None]


@gluon.jit
def attend_few(
    f_q, s_k, s_v, f_k, f_v, bar_v, p_out, p_lse, stride, tokens, scale, BLOCKS: gl.constexpr
):  # fmt: skip
    """The queries after the blocks: stores their output and log-sums. `s_` are the blocks, `f_` the few rows."""
    b_q = read_left(box(f_q, 0))
    b_last = mask_few(scores_of_few(b_q, box(f_k, 0)), BLOCKS * 64, tokens)
    b_most = gl.max(b_last, 2)
    b_s = ()
    for c in gl.static_range(BLOCKS):
        b_s = b_s + (scores(b_q, quarters(s_k, c)),)
        b_most = gl.maximum(b_most, gl.max(b_s[c], 2))
    b_max = gl.max(b_most, 0) * scale
    mbarrier.wait(bar_v, 0)
    b_p = gl.exp2(b_last * scale - b_max[None, :, None])
    b_part_sum = gl.sum(b_p, 2)
    b_out = sums_of_few(b_p, box(f_v, 0), empty_sums(box(f_v, 0)))
    for c in gl.static_range(BLOCKS):
        b_p = gl.exp2(b_s[c] * scale - b_max[None, :, None])
        b_part_sum = b_part_sum + gl.sum(b_p, 2)
        b_out = sums(b_p, quarters(s_v, c), b_out)
    b_sum = gl.sum(b_part_sum, 0)
    b_whole = add_parts(b_out)
    b_pieces = ()
    for i in gl.static_range(len(b_whole)):
        b_pieces = b_pieces + (_scale_rows(b_whole[i], 1.0 / b_sum),)
    store_few(p_out, b_pieces, BLOCKS * 64, stride, tokens)
    i_rows = BLOCKS * 64 + gl.arange(0, ROWS, layout=rows())
    gl.store(p_lse + i_rows, b_max + gl.log2(b_sum), mask=i_rows < tokens)


@gluon.jit
def _read_numbers(s_numbers):
    """Of the 64 rows of a block, as columns of the parts of a product."""
    return s_numbers.reshape([PARTS, 16]).load(gl.SliceLayout(1, product()))[:, None, :]


@gluon.jit
def differentiate_few(
    s_q, s_k, s_v, s_do, f_q, f_k, f_v, f_do, s_lse, s_delta, p_dq, width, tokens, scale, BLOCKS: gl.constexpr
):  # fmt: skip
    """The rows after the blocks (`f_`), as keys and as queries: stores dQ, dK and dV, and gives dQ's sums over them."""
    k, v, q, do = box(f_k, 0), box(f_v, 0), box(f_q, 0), box(f_do, 0)
    b_k = read_left(k)
    b_v = read_left(v)
    few_lse = s_lse.index(BLOCKS).slice(0, ROWS)
    few_delta = s_delta.index(BLOCKS).slice(0, ROWS)
    # As keys, [PARTS, keys, queries]: an infinite log-sum makes the probabilities of all parts but one zero.
    C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, product()))
    i_part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, product())))
    b_few_lse = gl.where(i_part[:, None, None] == 0, few_lse.load(C)[None, None, :], float("inf"))
    b_p = gl.exp2(scores_of_few(b_k, q) * scale - b_few_lse)
    b_ds = b_p * (scores_of_few(b_v, do) - few_delta.load(C)[None, None, :])
    b_dv = sums_of_few(b_p, do, empty_sums(v))
    b_dk = sums_of_few(b_ds, q, empty_sums(k))
    for i in range(BLOCKS):
        b_keys_p = gl.exp2(scores(b_k, quarters(s_q, i)) * scale - _read_numbers(s_lse.index(i)))
        b_keys_ds = b_keys_p * (scores(b_v, quarters(s_do, i)) - _read_numbers(s_delta.index(i)))
        b_dv = sums(b_keys_p, quarters(s_do, i), b_dv)
        b_dk = sums(b_keys_ds, quarters(s_q, i), b_dk)
    store_few(p_dq + 2 * width, add_parts(b_dv), BLOCKS * 64, 3 * width, tokens)
    store_few(p_dq + width, times(add_parts(b_dk), scale * LN_2), BLOCKS * 64, 3 * width, tokens)
    b_q = read_left(q)
    b_do = read_left(do)
    # As queries, [PARTS, queries, keys].
    b_lse = few_lse.load(rows())[None, :, None]
    b_delta = few_delta.load(rows())[None, :, None]
    b_p = gl.exp2(mask_few(scores_of_few(b_q, k) * scale - b_lse, BLOCKS * 64, tokens))
    b_dq = sums_of_few(b_p * (scores_of_few(b_do, v) - b_delta), k, empty_sums(q))
    for j in range(BLOCKS):
        b_queries_p = gl.exp2(scores(b_q, quarters(s_k, j)) * scale - b_lse)
        b_dq = sums(b_queries_p * (scores(b_do, quarters(s_v, j)) - b_delta), quarters(s_k, j), b_dq)
    store_few(p_dq, times(add_parts(b_dq), scale * LN_2), BLOCKS * 64, 3 * width, tokens)
    return times(add_rows(b_dq), scale * LN_2)
