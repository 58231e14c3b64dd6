# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""Tiles of attention whose rows stream: one program a processor takes one tile after the other.

Of a tile's head a few blocks of 64 rows stay, one with each consumer, a warpgroup; all rows of the head stream past them through a ring in
shared memory, which a warp of its own fills by TMA. The last block of what streams comes first: it alone is masked, and may be narrower.

- VARLEN: sequences are packed, and the rows beyond a sequence's end, which are another one's, are zeroed in the ring
- HEAD_DIM: a head's width, in one or two panels (`layouts`)
- WARPGROUPS: consumers, two or three; PLACES: for the rows of each that stay, two where they are read to the tile's end
- BLOCK_N: rows that stream at a time, STAGES: places for them; TAIL: so many rows of the last block are multiplied
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from polyvit_kernels.hopper.layouts import box, copy

QUERIES, KEYS = gl.constexpr(0), gl.constexpr(1)  # what stays


@gluon.jit
def _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr):
    """(sequence, its first row, number of its rows, head, group of its blocks, number of its groups)"""
    i_group = i_tile % groups
    i_head = i_tile // groups % heads
    i_sequence = i_tile // groups // heads
    if VARLEN:
        i_first = gl.load(p_cu_tokens + i_sequence)
        count = gl.load(p_cu_tokens + i_sequence + 1) - i_first
    else:
        i_first = 0
        count = tokens
    return i_sequence, i_first, count, i_head, i_group, (count + WARPGROUPS * 64 - 1) // (WARPGROUPS * 64)


@gluon.jit
def _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN: gl.constexpr):
    """Offset of a sequence's first log-sum in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(gl.int64) * tokens + i_first
    return (i_sequence.to(gl.int64) * heads + i_head) * tokens


@gluon.jit
def _zero_beyond(s_panel, rest):
    """Zero the rows from `rest` on: one warp, eight rows at a time."""
    WIDTH: gl.constexpr = s_panel.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    for i in gl.static_range(s_panel.shape[0] // 8):
        if rest < i * 8 + 8:
            s_part = s_panel.slice(i * 8, 8)
            b_part = s_part.load(LAYOUT)
            r = i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            s_part.store(gl.where(r[:, None] < rest, b_part, gl.zeros_like(b_part)))


@gluon.jit
def _produce(
    stay, stream, sums, bars, sizes, STAYS: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the consumers' places and the ring, tile after tile, as they become free."""
    d_stay, s_stay = stay
    d_stream, s_stream = stream
    p_lse, p_delta, s_lse, s_delta = sums
    own_full, own_empty, full, empty, landed = bars
    p_cu_tokens, tokens, heads, groups, tiles, _scale = sizes
    LINE: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    PLACES: gl.constexpr = 2 if STAYS == KEYS else 1
    BYTES: gl.constexpr = 2 * HEAD_DIM
    width = heads * HEAD_DIM
    turn = 0
    step = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            i_batch = 0 if VARLEN else i_sequence
            column = i_head * HEAD_DIM
            for w in gl.static_range(WARPGROUPS):
                place = w * PLACES + turn % PLACES
                mbarrier.wait(own_empty.index(place), (turn // PLACES & 1) ^ 1)
                mbarrier.expect(own_full.index(place), len(d_stay) * 64 * BYTES)
                for x in gl.static_range(len(d_stay)):
                    c = column + (x + 1) * width if STAYS == KEYS else column
                    copy(d_stay[x], i_batch, i_first + (i_group + w * used) * 64, c, own_full.index(place), s_stay[x], place)
            steps = (count + BLOCK_N - 1) // BLOCK_N
            for j in range(step, step + steps):
                slot = j % STAGES
                i_row = (steps if j == step else j - step) * BLOCK_N - BLOCK_N
                if STAYS == KEYS:
                    i = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN) + i_row + gl.arange(0, BLOCK_N, layout=LINE)
                    is_row = i_row + gl.arange(0, BLOCK_N, layout=LINE) < count
                    # An infinite log-sum makes the probabilities of rows beyond the end zero.
                    b_lse = gl.load(p_lse + i, mask=is_row, other=float("inf"))
                    b_delta = gl.load(p_delta + i, mask=is_row, other=0.0)
                mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)
                if STAYS == KEYS:
                    s_lse.index(slot).store(b_lse)
                    s_delta.index(slot).store(b_delta)
                    mbarrier.arrive(full.index(slot), count=1)
                c_0 = column if STAYS == KEYS else column + width
                c_1 = column if STAYS == KEYS else column + 2 * width
                if VARLEN and j == step:
                    mbarrier.expect(landed, 2 * BLOCK_N * BYTES)
                    copy(d_stream[0], i_batch, i_first + i_row, c_0, landed, s_stream[0], slot)
                    copy(d_stream[1], i_batch, i_first + i_row, c_1, landed, s_stream[1], slot)
                    mbarrier.wait(landed, turn & 1)
                    for x in gl.static_range(2):
                        for w in gl.static_range(len(s_stream[x])):
                            _zero_beyond(box(s_stream[x], slot)[w], count - i_row)
                    fence_async_shared()
                    mbarrier.arrive(full.index(slot), count=1)
                else:
                    mbarrier.expect(full.index(slot), 2 * BLOCK_N * BYTES)
                    copy(d_stream[0], i_batch, i_first + i_row, c_0, full.index(slot), s_stream[0], slot)
                    copy(d_stream[1], i_batch, i_first + i_row, c_1, full.index(slot), s_stream[1], slot)
            step += steps
            turn += 1


@gluon.jit
def _consume(
    work, tensors, bars, sizes, WARPGROUP: gl.constexpr, PLACES: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    """One block of 64 rows of every tile."""
    own_full, own_empty, full, empty, _landed = bars
    p_cu_tokens, tokens, heads, groups, tiles, scale = sizes
    turn = 0
    step = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, count, i_head, i_group, used = _tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            steps = (count + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            place = WARPGROUP * PLACES + turn % PLACES
            mbarrier.wait(own_full.index(place), turn // PLACES & 1)
            if i_row < count:
                o_row = i_first.to(gl.int64) if VARLEN else i_sequence.to(gl.int64) * tokens
                o_sum = _first_sum(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                rows = (i_row, count, o_row, o_sum, i_head * HEAD_DIM, heads * HEAD_DIM)
                work(tensors, place, own_empty.index(place), full, empty, rows, step, step + steps, scale, BLOCK_N, STAGES, TAIL, OPTION)
            else:
                mbarrier.arrive(own_empty.index(place), count=1)
                for j in range(step, step + steps):
                    mbarrier.wait(full.index(j % STAGES), j // STAGES & 1)
                    mbarrier.arrive(empty.index(j % STAGES), count=1)
            step += steps
            turn += 1


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def run(
    work, tensors, stay, stream, sums, sizes, STAYS: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr, WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    """Do `work` on all tiles of this program.

    `stay` and `stream` are descriptors and their places in shared memory, `sums` the log-sums and rowsum(dO · out) with theirs. `work` gets
    `tensors`, where its rows are and whom to tell that they are read, the ring's barriers, (its first row, the sequence's rows, the row and
    the log-sum with which the sequence begins, the head's first column, the width of all heads), and which steps are its own.
    """
    PLACES: gl.constexpr = 2 if STAYS == KEYS else 1
    own_full = _barriers(WARPGROUPS * PLACES, 1)
    own_empty = _barriers(WARPGROUPS * PLACES, 1)
    full = _barriers(STAGES, 2 if STAYS == KEYS else 1)
    empty = _barriers(STAGES, WARPGROUPS)
    bars = (own_full, own_empty, full, empty, _barriers(1, 1).index(0))
    fence_async_shared()
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 2, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (stay, stream, sums, bars, sizes, STAYS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, PLACES, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (stay, stream, sums, bars, sizes, STAYS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [232, 40])  # fmt: skip
