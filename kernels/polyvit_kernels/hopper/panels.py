# Gluon's functions are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
"""Operations on the rows of a head: TMA loads, wgmma, and loads and stores of global memory.

Whatever holds a head's rows, in shared memory or in registers, is a tuple with an entry for each panel (`layouts`). A function here does
to all panels what Gluon does to one tensor; the loops over panels are unrolled.

- d_: TMA descriptors; s_: shared memory, with its stages as the first axis; b_: registers; all are tuples over panels
- width: a panel's columns; ROWS: rows, 64 or those of a tail
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from polyvit_kernels.hopper.layouts import coalesced, mma, mma_rows, operand_a, store_layout, vector


@gluon.jit
def combine(d_first, d_rest):
    """The descriptors of a head's panels, of which those that are not needed are None."""
    if d_first is None:
        d_panels = ()
    elif d_rest is None:
        d_panels = (d_first,)
    else:
        d_panels = (d_first, d_rest)
    return d_panels


@gluon.jit
def allocate(d_panels, STAGES: gl.constexpr):
    """Shared memory with STAGES stages, each for one TMA load of a panel."""
    s_panels = ()
    for w in gl.static_range(len(d_panels)):
        # [STAGES, 1, ROWS, width]
        s_panels = s_panels + (gl.allocate_shared_memory(d_panels[w].dtype, [STAGES] + d_panels[w].block_type.shape, d_panels[w].layout),)
    return s_panels


@gluon.jit
def load_tma(d_panels, i_batch, i_row, column, bar, s_panels, i_stage):
    """Issue the TMA loads of the rows from `i_row` of the head that begins at `column`; their bytes arrive at the mbarrier `bar`."""
    for w in gl.static_range(len(d_panels)):
        # The second panel begins where the first one ends.
        i_column = column + w * d_panels[0].block_type.shape[2]
        tma.async_copy_global_to_shared(d_panels[w], [i_batch, i_row, i_column], bar, s_panels[w].index(i_stage))


@gluon.jit
def stage(s_panels, i_stage):
    """The rows of one stage."""
    s_rows = ()
    for w in gl.static_range(len(s_panels)):
        # [ROWS, width]
        s_rows = s_rows + (s_panels[w].index(i_stage).reshape([s_panels[w].shape[2], s_panels[w].shape[3]]),)
    return s_rows


@gluon.jit
def first_rows(s_rows, ROWS: gl.constexpr):
    """The first rows of a stage."""
    s_first = ()
    for w in gl.static_range(len(s_rows)):
        # [ROWS, width]
        s_first = s_first + (s_rows[w].slice(0, ROWS),)
    return s_first


@gluon.jit
def load_shared(s_rows, L: gl.constexpr):
    """The rows of a stage in registers, in the layout L."""
    b_panels = ()
    for w in gl.static_range(len(s_rows)):
        # [ROWS, width]
        b_panels = b_panels + (s_rows[w].load(L),)
    return b_panels


@gluon.jit
def load_coalesced(s_rows):
    """The rows of a stage in registers, in the layout of `load_rows`."""
    b_panels = ()
    for w in gl.static_range(len(s_rows)):
        # [ROWS, width]
        b_panels = b_panels + (s_rows[w].load(coalesced(s_rows[w].shape[1])),)
    return b_panels


@gluon.jit
def _zeros(ROWS: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    return gl.zeros([ROWS, WIDTH], gl.float32, L)


@gluon.jit
def zeros_coalesced(like):
    """Zeros in the layout of `load_coalesced`."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        # [ROWS, width]
        b_panels = b_panels + (_zeros(like[w].shape[0], like[w].shape[1], coalesced(like[w].shape[1])),)
    return b_panels


@gluon.jit
def zeros_mma(like):
    """Zeros in the layout of accumulators, for ordinary additions."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        # [ROWS, width]
        b_panels = b_panels + (_zeros(like[w].shape[0], like[w].shape[1], mma(like[w].shape[1])),)
    return b_panels


@gluon.jit
def accumulators(like, ROWS: gl.constexpr):
    """Zeros for wgmma to accumulate in."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        # [ROWS, width]
        b_panels = b_panels + (warpgroup_mma_init(_zeros(ROWS, like[w].shape[1], mma(like[w].shape[1]))),)
    return b_panels


@gluon.jit
def mma_scores(b_left, s_rows, N: gl.constexpr):
    """Issue the product of 64 rows with N rows, a wgmma for each panel: the head's columns are summed over."""
    # [64, N]
    b_s = gl.zeros([64, N], gl.float32, mma(N))
    for w in gl.static_range(len(s_rows)):
        b_s = warpgroup_mma(b_left[w], s_rows[w].permute((1, 0)), b_s, use_acc=w > 0, is_async=True)
    return b_s


@gluon.jit
def mma_accumulate(b_p, s_rows, b_acc, use_acc=True):
    """Issue the product of `b_p` [64, N] with N rows, a wgmma for each panel, added to `b_acc`."""
    # [64, N]; rounded accumulators are a left operand as they come, no data moves between threads
    b_left = gl.convert_layout(b_p.to(s_rows[0].dtype), operand_a())
    b_new = ()
    for w in gl.static_range(len(s_rows)):
        # [64, width]
        b_new = b_new + (warpgroup_mma(b_left, s_rows[w], b_acc[w], use_acc=use_acc, is_async=True),)
    return b_new


@gluon.jit
def mma_wait(b_acc, PENDING: gl.constexpr = 0):
    """The accumulators, when all but the PENDING wgmmas issued after theirs are done."""
    b_new = ()
    for w in gl.static_range(len(b_acc)):
        # [64, width]
        b_new = b_new + (warpgroup_mma_wait(PENDING, deps=(b_acc[w],)),)
    return b_new


@gluon.jit
def scale(b_panels, factor):
    """All elements times a number."""
    b_new = ()
    for w in gl.static_range(len(b_panels)):
        # The shape of the panel.
        b_new = b_new + (b_panels[w] * factor,)
    return b_new


@gluon.jit
def _scale_panel_rows(b_panel, b_factor):
    # [64, width] * [64, 1]
    return b_panel * gl.convert_layout(b_factor, mma_rows(b_panel.shape[1]))[:, None]


@gluon.jit
def scale_rows(b_panels, b_factor):
    """Every row of accumulators times its element of `b_factor` [64]."""
    b_new = ()
    for w in gl.static_range(len(b_panels)):
        # [64, width]
        b_new = b_new + (_scale_panel_rows(b_panels[w], b_factor),)
    return b_new


@gluon.jit
def add(a, b):
    """The sum of both, in fp32."""
    b_new = ()
    for w in gl.static_range(len(a)):
        # The shape of the panel.
        b_new = b_new + (a[w] + b[w].to(gl.float32),)
    return b_new


@gluon.jit
def row_dots(a, b):
    """rowsum(a · b) over all panels, in fp32."""
    for w in gl.static_range(len(a)):
        # [ROWS]
        b_part = gl.convert_layout(gl.sum(a[w].to(gl.float32) * b[w].to(gl.float32), 1), vector())
        b_sum = b_part if w == 0 else b_sum + b_part
    return b_sum


@gluon.jit
def column_sums(b_panels):
    """The sums over all rows, in fp32."""
    b_sums = ()
    for w in gl.static_range(len(b_panels)):
        # [width]
        b_sums = b_sums + (gl.convert_layout(gl.sum(b_panels[w].to(gl.float32), 0), vector()),)
    return b_sums


@gluon.jit
def _offsets(i_row, stride, i_column, ROWS: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    """Offsets of a panel that begins at `i_column`, and the index of each row; 32 bits are enough within one sequence."""
    # [ROWS], [WIDTH]
    i_rows = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    i_columns = i_column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    # [ROWS, WIDTH], [ROWS, 1]
    return i_rows[:, None] * stride + i_columns[None, :], i_rows[:, None]


@gluon.jit
def _load_panel(p, i_row, stride, tokens, i_column, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    # [ROWS, WIDTH], [ROWS, 1]
    o, i_rows = _offsets(i_row, stride, i_column, ROWS, WIDTH, coalesced(WIDTH))
    return gl.load(p + o, mask=i_rows < tokens, other=0.0)


@gluon.jit
def load_rows(p, like, i_row, stride, tokens):
    """The rows from `i_row` on of a head in global memory, in the shapes of `like`; those beyond the end are zeros."""
    b_panels = ()
    for w in gl.static_range(len(like)):
        # [ROWS, width]
        b_panels = b_panels + (_load_panel(p, i_row, stride, tokens, w * like[0].shape[1], like[w].shape[0], like[w].shape[1]),)
    return b_panels


@gluon.jit
def _store_panel(p, b_panel, i_row, stride, tokens, i_column, L: gl.constexpr):
    # [ROWS, width], [ROWS, 1]
    o, i_rows = _offsets(i_row, stride, i_column, b_panel.shape[0], b_panel.shape[1], L)
    gl.store(p + o, gl.convert_layout(b_panel.to(p.dtype.element_ty), L), mask=i_rows < tokens)


@gluon.jit
def store_rows(p, b_panels, i_row, stride, tokens):
    """Store accumulators to the rows from `i_row` on of a head in global memory, but not to those beyond the end."""
    for w in gl.static_range(len(b_panels)):
        # Panels lie side by side in a row.
        _store_panel(p, b_panels[w], i_row, stride, tokens, w * b_panels[0].shape[1], store_layout(b_panels[w].shape[1]))


@gluon.jit
def store_vector(p, b_sums):
    """Store an element for each column of a head."""
    for w in gl.static_range(len(b_sums)):
        # [width]
        gl.store(p + w * b_sums[0].shape[0] + gl.arange(0, b_sums[w].shape[0], layout=vector()), b_sums[w])
