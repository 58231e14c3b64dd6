# Gluon's functions and a launch are not what they say to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportUnboundVariable=false, reportPossiblyUnboundVariable=false
# pyright: reportIndexIssue=false
"""The pipeline of long attention: persistent programs, a producer warp that issues TMA loads, and two or three consumer warpgroups.

A work tile is a group of 64-row blocks of one head, one block for each consumer. A block's own rows are *resident*: loaded once, into a
buffer of its consumer. All rows of the head that it is multiplied with are *streamed* past all consumers through a ring of stages in shared
memory. The last streamed block comes first: it alone is masked, and may be narrower.

mbarriers, each with a phase that flips when it completes: `full` and `empty` of a stage, and the same of a resident buffer. The producer
waits for empty and its loads complete full; consumers wait for full and arrive at empty.

- RESIDENT: QUERIES or KEYS; keys stay until their tile ends, so they have two buffers to load the next tile's meanwhile
- VARLEN: sequences lie one after the other; rows beyond a sequence's end belong to the next one and are zeroed in the ring
- HEAD_DIM: a head's width, in one or two panels (`layouts`)
- WARPGROUPS: consumers; BUFFERS: for the resident rows of each
- BLOCK_N: rows of a stage; STAGES: of the ring; TAIL: rows of the last streamed block that are multiplied
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from polyvit_kernels.hopper import panels

QUERIES, KEYS = gl.constexpr(0), gl.constexpr(1)


@gluon.jit
def _locate_tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr):
    """(sequence, its first row, its length, head, group of its blocks, number of its groups)"""
    i_group = i_tile % groups
    i_head = i_tile // groups % heads
    i_sequence = i_tile // groups // heads
    if VARLEN:
        i_first = gl.load(p_cu_tokens + i_sequence)
        length = gl.load(p_cu_tokens + i_sequence + 1) - i_first
    else:
        i_first = 0
        length = tokens
    return i_sequence, i_first, length, i_head, i_group, (length + WARPGROUPS * 64 - 1) // (WARPGROUPS * 64)


@gluon.jit
def _lse_offset(i_sequence, i_first, i_head, tokens, heads, VARLEN: gl.constexpr):
    """Of a sequence's first log-sum-exp in `[batch, heads, tokens]`, or in `[heads, total]`."""
    if VARLEN:
        return i_head.to(gl.int64) * tokens + i_first
    return (i_sequence.to(gl.int64) * heads + i_head) * tokens


@gluon.jit
def _zero_rows(s_panel, i_end):
    """Zero the rows from `i_end` on: one warp, eight rows at a time."""
    WIDTH: gl.constexpr = s_panel.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    for i in gl.static_range(s_panel.shape[0] // 8):
        if i_end < i * 8 + 8:
            # [8, WIDTH]
            s_part = s_panel.slice(i * 8, 8)
            b_part = s_part.load(LAYOUT)
            # [8]
            i_rows = i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
            s_part.store(gl.where(i_rows[:, None] < i_end, b_part, gl.zeros_like(b_part)))


@gluon.jit
def _produce(
    resident, streamed, vectors, bars, sizes, RESIDENT: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: fills the resident buffers and the ring, tile after tile, as they become empty."""
    d_resident, s_resident = resident
    d_streamed, s_streamed = streamed
    p_lse, p_delta, s_lse, s_delta = vectors
    resident_full, resident_empty, full, empty, masked = bars
    p_cu_tokens, tokens, heads, groups, tiles, _scale = sizes
    LAYOUT: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    BUFFERS: gl.constexpr = 2 if RESIDENT == KEYS else 1
    ROW_BYTES: gl.constexpr = 2 * HEAD_DIM
    width = heads * HEAD_DIM
    # Tiles and streamed blocks so far: they choose buffer and stage, and the phase of its mbarriers.
    num_tiles = 0
    num_blocks = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, length, i_head, i_group, used = _locate_tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        # A sequence that is shorter than the longest has fewer groups.
        if i_group < used:
            i_batch = 0 if VARLEN else i_sequence
            column = i_head * HEAD_DIM
            for w in gl.static_range(WARPGROUPS):
                i_buffer = w * BUFFERS + num_tiles % BUFFERS
                # A fresh mbarrier passes for the phase before its first: the first round waits for nobody.
                mbarrier.wait(resident_empty.index(i_buffer), (num_tiles // BUFFERS & 1) ^ 1)
                mbarrier.expect(resident_full.index(i_buffer), len(d_resident) * 64 * ROW_BYTES)
                for x in gl.static_range(len(d_resident)):
                    # Q, K and V follow each other in a row; dO and O are matrices of their own.
                    c = column + (x + 1) * width if RESIDENT == KEYS else column
                    i_resident = i_first + (i_group + w * used) * 64
                    panels.load_tma(d_resident[x], i_batch, i_resident, c, resident_full.index(i_buffer), s_resident[x], i_buffer)
            blocks = (length + BLOCK_N - 1) // BLOCK_N
            for j in range(num_blocks, num_blocks + blocks):
                i_stage = j % STAGES
                # The last block first, then the others in their order.
                i_row = (blocks if j == num_blocks else j - num_blocks) * BLOCK_N - BLOCK_N
                if RESIDENT == KEYS:
                    # [BLOCK_N]
                    i = _lse_offset(i_sequence, i_first, i_head, tokens, heads, VARLEN) + i_row + gl.arange(0, BLOCK_N, layout=LAYOUT)
                    m_rows = i_row + gl.arange(0, BLOCK_N, layout=LAYOUT) < length
                    # An infinite log-sum-exp makes the probabilities of rows beyond the end zero.
                    b_lse = gl.load(p_lse + i, mask=m_rows, other=float("inf"))
                    b_delta = gl.load(p_delta + i, mask=m_rows, other=0.0)
                mbarrier.wait(empty.index(i_stage), (j // STAGES & 1) ^ 1)
                if RESIDENT == KEYS:
                    s_lse.index(i_stage).store(b_lse)
                    s_delta.index(i_stage).store(b_delta)
                    # One of the two arrivals that complete the stage; the TMA loads are the other.
                    mbarrier.arrive(full.index(i_stage), count=1)
                c_0 = column if RESIDENT == KEYS else column + width
                c_1 = column if RESIDENT == KEYS else column + 2 * width
                if VARLEN and j == num_blocks:
                    # The producer waits for this block itself and zeroes what lies beyond the sequence before consumers see it.
                    mbarrier.expect(masked, 2 * BLOCK_N * ROW_BYTES)
                    panels.load_tma(d_streamed[0], i_batch, i_first + i_row, c_0, masked, s_streamed[0], i_stage)
                    panels.load_tma(d_streamed[1], i_batch, i_first + i_row, c_1, masked, s_streamed[1], i_stage)
                    mbarrier.wait(masked, num_tiles & 1)
                    for x in gl.static_range(2):
                        for w in gl.static_range(len(s_streamed[x])):
                            _zero_rows(panels.stage(s_streamed[x], i_stage)[w], length - i_row)
                    # wgmma reads shared memory through the async proxy, which sees ordinary stores only after a fence.
                    fence_async_shared()
                    mbarrier.arrive(full.index(i_stage), count=1)
                else:
                    mbarrier.expect(full.index(i_stage), 2 * BLOCK_N * ROW_BYTES)
                    panels.load_tma(d_streamed[0], i_batch, i_first + i_row, c_0, full.index(i_stage), s_streamed[0], i_stage)
                    panels.load_tma(d_streamed[1], i_batch, i_first + i_row, c_1, full.index(i_stage), s_streamed[1], i_stage)
            num_blocks += blocks
            num_tiles += 1


@gluon.jit
def _consume(
    work, tensors, bars, sizes, WARPGROUP: gl.constexpr, BUFFERS: gl.constexpr, WARPGROUPS: gl.constexpr, VARLEN: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: does `work` on its block of 64 rows of every tile."""
    resident_full, resident_empty, full, empty, _masked = bars
    p_cu_tokens, tokens, heads, groups, tiles, scale = sizes
    # As the producer counts them.
    num_tiles = 0
    num_blocks = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_sequence, i_first, length, i_head, i_group, used = _locate_tile(i_tile, p_cu_tokens, tokens, heads, groups, WARPGROUPS, VARLEN)
        if i_group < used:
            blocks = (length + BLOCK_N - 1) // BLOCK_N
            i_row = (i_group + WARPGROUP * used) * 64
            i_buffer = WARPGROUP * BUFFERS + num_tiles % BUFFERS
            mbarrier.wait(resident_full.index(i_buffer), num_tiles // BUFFERS & 1)
            if i_row < length:
                o_row = i_first.to(gl.int64) if VARLEN else i_sequence.to(gl.int64) * tokens
                o_lse = _lse_offset(i_sequence, i_first, i_head, tokens, heads, VARLEN)
                rows = (i_row, length, o_row, o_lse, i_head * HEAD_DIM, heads * HEAD_DIM)
                released = resident_empty.index(i_buffer)
                work(tensors, i_buffer, released, full, empty, rows, num_blocks, num_blocks + blocks, scale, BLOCK_N, STAGES, TAIL, OPTION)
            else:
                # No rows in this tile: the stages pass unread.
                mbarrier.arrive(resident_empty.index(i_buffer), count=1)
                for j in range(num_blocks, num_blocks + blocks):
                    mbarrier.wait(full.index(j % STAGES), j // STAGES & 1)
                    mbarrier.arrive(empty.index(j % STAGES), count=1)
            num_blocks += blocks
            num_tiles += 1


@gluon.jit
def _init_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """mbarriers whose phases each take so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def run(
    work, tensors, resident, streamed, vectors, sizes, RESIDENT: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr,
    WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, OPTION: gl.constexpr,
):  # fmt: skip
    """Do `work` on all tiles of this program.

    `resident` and `streamed` are descriptors and their shared memory, `vectors` the log-sum-exp and rowsum(dO · O) with theirs. `work` gets
    `tensors`; the index of its buffer and the mbarrier to arrive at when that is read; the ring's mbarriers; (its first row, the sequence's
    length, offsets of the sequence's first row and log-sum-exp, the head's first column, the width of all heads); the first streamed block
    and the end.
    """
    BUFFERS: gl.constexpr = 2 if RESIDENT == KEYS else 1
    resident_full = _init_barriers(WARPGROUPS * BUFFERS, 1)
    resident_empty = _init_barriers(WARPGROUPS * BUFFERS, 1)
    full = _init_barriers(STAGES, 2 if RESIDENT == KEYS else 1)
    empty = _init_barriers(STAGES, WARPGROUPS)
    bars = (resident_full, resident_empty, full, empty, _init_barriers(1, 1).index(0))
    fence_async_shared()
    # Registers a thread: the producer gives up most of its own to the consumers, which hold accumulators.
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, BUFFERS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, BUFFERS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 2, BUFFERS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (resident, streamed, vectors, bars, sizes, RESIDENT, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (work, tensors, bars, sizes, 0, BUFFERS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_consume, (work, tensors, bars, sizes, 1, BUFFERS, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES, TAIL, OPTION)),
            (_produce, (resident, streamed, vectors, bars, sizes, RESIDENT, WARPGROUPS, VARLEN, HEAD_DIM, BLOCK_N, STAGES)),
        ], [4, 1], [232, 40])  # fmt: skip
