"""The executor of Gluon kernels: correct kernels give correct results, and planted faults are found, in whatever order partitions run."""

import numpy as np
import pytest
import torch
from gluon_executor import executing
from gluon_machine import FaultError
from gluon_samples import copy, copy_kernel
from gluon_values import Value, rounded
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SEEDS = range(4)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def mma_layout():
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])


@gluon.jit
def begin_load(d_in, i_row, i_column, ready, s_block, NUM_BYTES: gl.constexpr = 8192):
    mbarrier.expect(ready, NUM_BYTES)
    tma.async_copy_global_to_shared(d_in, [i_row, i_column], ready, s_block)


@gluon.jit
def gram_kernel(d_in, d_out, p_out, columns, FAULT: gl.constexpr):
    """The products of 64 rows with each other: a ring of two stages, wgmma, the result through shared memory to TMA and by threads."""
    M: gl.constexpr = mma_layout()
    s_in = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], d_in.layout)
    s_out = gl.allocate_shared_memory(gl.bfloat16, [64, 64], d_out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    i_row = gl.program_id(0) * 64
    steps = columns // 64
    for i in range(2):
        begin_load(d_in, i_row, i * 64, ready.index(i), s_in.index(i), 8190 if FAULT == "bytes" else 8192)
    b_sum = gl.zeros([64, 64], gl.float32, M)
    for i in range(steps):
        i_stage = i % 2
        if FAULT != "copy not waited for":
            mbarrier.wait(ready.index(i_stage), (i // 2 + (1 if FAULT == "phase" else 0)) % 2)
        b_sum = warpgroup_mma(s_in.index(i_stage), s_in.index(i_stage).permute((1, 0)), b_sum, use_acc=i > 0, is_async=True)
        if FAULT != "product not waited for before its operand is overwritten":
            b_sum = warpgroup_mma_wait(0, deps=(b_sum,))
        if i + 2 < steps:
            begin_load(d_in, i_row, (i + 2) * 64, ready.index(i_stage), s_in.index(i_stage))
        if FAULT == "never waited for" and i + 2 >= steps:
            begin_load(d_in, i_row, 0, ready.index(i_stage), s_in.index(i_stage))
    if FAULT == "product not waited for before its operand is overwritten":
        b_sum = warpgroup_mma_wait(0, deps=(b_sum,))
    if FAULT == "unwritten":
        b_sum += s_out.load(M).to(gl.float32)
    s_out.store(b_sum.to(gl.bfloat16))
    if FAULT != "fence":
        fence_async_shared()
    tma.async_copy_shared_to_global(d_out, [i_row, 0], s_out)
    if FAULT == "overwritten during a copy from it":
        s_out.store(b_sum.to(gl.bfloat16))
    if FAULT != "copy from shared memory not waited for":
        tma.store_wait(0)
    o_row = i_row + gl.arange(0, 64, layout=gl.SliceLayout(1, M))
    o_column = gl.arange(0, 64, layout=gl.SliceLayout(0, M))
    gl.store(p_out + o_row[:, None] * 64 + o_column[None, :], b_sum)


def gram(x, fault=""):
    by_tma, by_threads = torch.empty(len(x), 64, dtype=torch.bfloat16), torch.empty(len(x), 64)
    d_in, d_out = (TensorDescriptor.from_tensor(tensor, [64, 64], LAYOUT) for tensor in (x, by_tma))
    gram_kernel[(len(x) // 64,)](d_in, d_out, by_threads, x.shape[1], FAULT=fault, num_warps=4)
    return by_tma, by_threads


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kernel_with_copies_and_products(seed):
    x = torch.randn(128, 320).bfloat16()
    with executing(seed=seed) as report:
        by_tma, by_threads = gram(x)
    true = torch.cat([part @ part.T for part in x.double().split(64)])
    torch.testing.assert_close(by_threads.double(), true, rtol=1e-5, atol=1e-4)
    assert torch.equal(by_tma, by_threads.bfloat16())
    assert (report.launches, report.copied_bytes, report.products) == ([("gram_kernel", (2, 1, 1))], x.nbytes, 10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("copy not waited for", "data race on allocation 0.*a wgmma in gram_kernel.*comes after a copy to shared memory in begin_load"),
        ("bytes", r"(?s)deadlock:.*gram_kernel waits for parity 0 of barrier 0.*0 of 1 arrivals and -2 bytes are missing"),
        ("phase", "data race on allocation 0|deadlock"),
        (
            "product not waited for before its operand is overwritten",
            "data race on allocation 0.*begin_load.*comes after a wgmma in gram_kernel",
        ),
        ("never waited for", "the program ends (during|without waiting for) a copy to shared memory in begin_load"),
        ("unwritten", "a load reads what nobody wrote in allocation 1"),
        ("fence", "a copy from shared memory in gram_kernel, line .* needs fence_async_shared after a store in gram_kernel"),
        ("overwritten during a copy from it", "data race on allocation 1.*a store in .*comes after a copy from shared memory"),
        ("copy from shared memory not waited for", "gram_kernel ends before its last copy from shared memory"),
    ],
)
def test_faults_of_one_partition(fault, words, seed):
    with pytest.raises(FaultError, match=words), executing(seed=seed):
        gram(torch.randn(64, 320).bfloat16(), fault)


@gluon.jit
def pending_kernel(d_in, p_out, ASYNC: gl.constexpr, OUTSTANDING: gl.constexpr):
    """Two products; of which OUTSTANDING may not be over when the first one is read."""
    M: gl.constexpr = mma_layout()
    s_in = gl.allocate_shared_memory(gl.bfloat16, [64, 64], d_in.layout)
    ready = mbarrier.allocate_mbarrier()
    mbarrier.init(ready, count=1)
    begin_load(d_in, 0, 0, ready, s_in)
    mbarrier.wait(ready, 0)
    b_one = warpgroup_mma(s_in, s_in, gl.zeros([64, 64], gl.float32, M), use_acc=False, is_async=ASYNC)
    b_two = warpgroup_mma(s_in, s_in, gl.zeros([64, 64], gl.float32, M), use_acc=False, is_async=ASYNC)
    if OUTSTANDING is not None:
        b_one = warpgroup_mma_wait(OUTSTANDING, deps=(b_one,))
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, M))
    o_column = gl.arange(0, 64, layout=gl.SliceLayout(0, M))
    p_tile = p_out + o_row[:, None] * 64 + o_column[None, :]
    gl.store(p_tile, b_one * 2.0)
    if ASYNC:
        b_two = warpgroup_mma_wait(0, deps=(b_two,))
    gl.store(p_tile + 4096, b_two)


@pytest.mark.parametrize(
    ("is_async", "outstanding", "is_right"), [(True, 0, True), (True, 1, True), (True, 2, False), (True, None, False), (False, None, True)]
)
def test_a_product_is_read_after_the_right_wait_alone(is_async, outstanding, is_right):
    x, out = torch.randn(64, 64).bfloat16(), torch.empty(2, 64, 64)
    descriptor = TensorDescriptor.from_tensor(x, [64, 64], LAYOUT)
    if is_right:
        with executing():
            pending_kernel[(1,)](descriptor, out, is_async, outstanding)
        torch.testing.assert_close(out, torch.stack([2 * x.float() @ x.float(), x.float() @ x.float()]))
    else:
        with pytest.raises(FaultError, match="a product is read that was not waited for"), executing():
            pending_kernel[(1,)](descriptor, out, is_async, outstanding)


@gluon.jit
def produce(d_in, s_in, full, empty, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    for i in range(steps):
        i_stage = i % STAGES
        if FAULT != "overwritten before it is read":
            mbarrier.wait(empty.index(i_stage), (i // STAGES + 1) % 2)
        begin_load(d_in, i * 64, 0, full.index(i_stage), s_in.index(i_stage))


@gluon.jit
def double(s_in, s_out, full, empty, handed, taken, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in range(steps):
        i_stage = i % STAGES
        mbarrier.wait(full.index(i_stage), i // STAGES % 2)
        b_tile = s_in.index(i_stage).load(B)
        if FAULT != "never released":
            mbarrier.arrive(empty.index(i_stage), count=2 if FAULT == "too many arrivals" else 1)
        mbarrier.wait(taken, (i + 1) % 2)
        s_out.store(b_tile + b_tile)
        if FAULT == "handed over too early":
            mbarrier.arrive(handed, count=1)
            s_out.store(b_tile + b_tile)
        elif FAULT == "handed over by one thread":
            mbarrier.expect(handed, 0)
        else:
            mbarrier.arrive(handed, count=1)


@gluon.jit
def write(s_out, p_out, handed, taken, steps, FAULT: gl.constexpr):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, B))
    o_column = gl.arange(0, 64, layout=gl.SliceLayout(0, B))
    for i in range(steps):
        if FAULT != "read before it is handed over":
            mbarrier.wait(handed, i % 2)
        b_tile = s_out.load(B)
        if FAULT == "both wait":
            mbarrier.wait(handed, (i + 1) % 2)
        mbarrier.arrive(taken, count=1)
        gl.store(p_out + (i * 64 + o_row[:, None]) * 64 + o_column[None, :], b_tile)


@gluon.jit
def pipeline_kernel(d_in, p_out, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    """Three partitions: TMA fills a ring of stages; threads double them and hand them to those that write."""
    s_in = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], d_in.layout)
    s_out = gl.allocate_shared_memory(gl.bfloat16, [64, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    handed = mbarrier.allocate_mbarrier()
    taken = mbarrier.allocate_mbarrier()
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 if FAULT == "too few arrivals" else 1)
    mbarrier.init(handed, count=1)
    if FAULT != "not initialized":
        mbarrier.init(taken, count=1)
    gl.warp_specialize(
        [
            (write, (s_out, p_out, handed, taken, steps, FAULT)),
            (double, (s_in, s_out, full, empty, handed, taken, steps, STAGES, FAULT)),
            (produce, (d_in, s_in, full, empty, steps, STAGES, FAULT)),
        ],
        [4, 1],
        [80, 24],
    )


def pipeline(x, fault=""):
    out = torch.empty_like(x)
    pipeline_kernel[(1,)](TensorDescriptor.from_tensor(x, [64, 64], LAYOUT), out, len(x) // 64, STAGES=2, FAULT=fault)
    return out


@pytest.mark.parametrize("seed", range(10))
def test_partitions_take_turns_in_any_order(seed):
    x = torch.randn(448, 64).bfloat16()
    with executing(seed=seed):
        assert torch.equal(pipeline(x), 2 * x)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "overwritten before it is read",
            "data race on allocation 0.*begin_load.*comes after a (load in double|copy to)|more arrivals than expected",
        ),
        ("never released", r"(?s)deadlock:.*partition 2, produce, waits for parity 0 of barrier 0 of allocation \d+ .*1 of 1 arrivals"),
        ("too few arrivals", "(?s)deadlock:.*partition 2, produce, waits for.*1 of 2 arrivals"),
        ("too many arrivals", "more arrivals than expected, 2 at barrier"),
        ("handed over too early", "data race on allocation 1"),
        ("handed over by one thread", "data race on allocation 1.*a load in write.*comes after a store in double"),
        ("read before it is handed over", "data race on allocation 1|reads what nobody wrote in allocation 1"),
        ("both wait", "(?s)deadlock:.*partition 0, write, waits for parity 1 of.*partition 1, double, waits for parity 0 of"),
        ("not initialized", "barrier 0 of .* is not initialized"),
    ],
)
def test_faults_between_partitions(fault, words, seed):
    with pytest.raises(FaultError, match=words), executing(seed=seed):
        pipeline(torch.randn(448, 64).bfloat16(), fault)


@gluon.jit
def scatter_kernel(p_in, p_out, count, FAULT: gl.constexpr):
    """Each element of the input to the output, 32 of them a program."""
    o = gl.program_id(0) * 32 + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    b = gl.load(p_in + o, mask=o < (count + 1 if FAULT == "beyond the input" else count))
    at = gl.maximum(o, 1) if FAULT == "twice in a store" else gl.minimum(o, count - 2) if FAULT == "twice" else o
    end = count + 1 if FAULT == "beyond the output" else count - 1 if FAULT == "left out" else count
    gl.store(p_out + at, b, mask=o < end)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("beyond the input", "p_in is accessed at 96 to 97, but has 97"),
        ("beyond the output", "p_out is accessed at 96 to 97, but has 97"),
        ("twice in a store", "an element is written twice in one launch"),
        ("twice", "an element is written twice in one launch"),
        ("left out", "1 elements of p_out were never written"),
    ],
)
def test_faults_in_global_memory(fault, words):
    buffer = torch.zeros(300)
    x, out = buffer[100:197], torch.zeros(97)
    x.copy_(torch.arange(97))
    with executing():
        scatter_kernel[(4,)](x, out, 97, FAULT="")
    assert torch.equal(out, x)
    with pytest.raises(FaultError, match=words), executing():
        scatter_kernel[(4,)](x, torch.zeros(97), 97, FAULT=fault)


def test_what_a_launch_may_do_is_named():
    x = torch.arange(97.0)
    with executing(rewritten=("p_out",), partly=("p_out",)):
        scatter_kernel[(4,)](x, torch.zeros(97), 97, FAULT="twice in a store")


@gluon.jit
def shift_kernel(p_x, count):
    o = gl.program_id(0) * 32 + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(p_x + o, gl.load(p_x + o + 1, mask=o + 1 < count, other=0.0), mask=o < count)


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_do_not_read_what_others_write(seed):
    with pytest.raises(FaultError, match=r"a program (reads what another one writes|writes what another one reads)"), executing(seed=seed):
        shift_kernel[(3,)](torch.zeros(96), 96)
    with executing(seed=seed):
        shift_kernel[(1,)](torch.zeros(32), 32)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 150])
def test_rows_beyond_a_tensor_come_as_zeros(rows):
    x = torch.randn(2, rows, 48).bfloat16()
    with executing():
        assert torch.equal(copy(x), x)


@gluon.jit
def block_kernel(d_in, d_out, COORDINATES: gl.constexpr, BACK: gl.constexpr, NUM_BYTES: gl.constexpr):
    s_block = gl.allocate_shared_memory(d_in.dtype, d_in.block_type.shape, d_in.layout)
    ready = mbarrier.allocate_mbarrier()
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, NUM_BYTES)
    tma.async_copy_global_to_shared(d_in, COORDINATES, ready, s_block)
    mbarrier.wait(ready, 0)
    tma.async_copy_shared_to_global(d_out, BACK, s_block)
    tma.store_wait(0)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_blocks_of_every_rank(rank):
    shape, block = (3, 2, 5, 9, 40)[-rank:], (1, 2, 2, 8, 32)[-rank:]
    start = (2, -1, 4, 3, 16)[-rank:]
    x, out = torch.randn(shape).half(), torch.ones(block).half()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=rank)
    descriptors = [TensorDescriptor.from_tensor(tensor, list(block), layout) for tensor in (x, out)]
    with executing() as report:
        block_kernel[(1,)](*descriptors, start, (0,) * rank, NUM_BYTES=out.nbytes)
    expected = torch.zeros_like(out)
    for inside in torch.cartesian_prod(*map(torch.arange, block)).tolist():
        at = tuple(first + step for first, step in zip(start, inside, strict=True))
        if all(0 <= i < size for i, size in zip(at, shape, strict=True)):
            expected[tuple(inside)] = x[at]
    assert torch.equal(out, expected)
    assert report.copied_bytes == out.nbytes


def test_a_tma_copy_begins_at_a_multiple_of_16_bytes():
    x = torch.zeros(8, 64).half()
    descriptor = TensorDescriptor.from_tensor(x, [8, 32], gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
    with pytest.raises(FaultError, match="begins at column 4, no multiple of 16 bytes"), executing():
        block_kernel[(1,)](descriptor, descriptor, (0, 4), (0, 0), NUM_BYTES=512)


@gluon.jit
def number_kernel(p_out, one, many, scale):
    gl.store(p_out, (many.to(gl.int64) * 3).to(gl.float32) * scale)
    gl.store(p_out + 1, one.to(gl.float32))


@gluon.jit
def atomic_kernel(p_out):
    gl.atomic_add(p_out, 1.0)


def test_arguments_are_what_triton_makes_of_them():
    with pytest.raises(AttributeError, match="'int' object has no attribute 'to'"), executing():
        number_kernel[(1,)](torch.zeros(2), 1, 2, 0.5)
    out = torch.zeros(2)
    with executing():
        number_kernel[(1,)](out, 2, 1 << 31, 0.5)
    assert out.tolist() == [3221225472.0, 2.0]
    with pytest.raises(TypeError, match=r"has no parameters \['num_warp'\]"), executing():
        number_kernel[(1,)](out, 2, 2, 0.5, num_warp=4)


def test_what_is_not_known_is_refused():
    with pytest.raises(NotImplementedError, match="atomic_add has no stand-in"), executing():
        atomic_kernel[(1,)](torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_rounds_them(dtype):
    x = torch.cat(
        [torch.randint(-(1 << 31), 1 << 31, (10000,)).int().view(torch.float32), torch.tensor([65520.0, 1e-8, 3.3961775292304957e38])]
    )
    with np.errstate(all="ignore"):
        found = torch.from_numpy(rounded(x.numpy(), gl.bfloat16 if dtype is torch.bfloat16 else gl.float16))
    torch.testing.assert_close(found, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_results_have_tritons_types():
    half, single, whole, wide, truth = (Value([1], dtype) for dtype in (gl.bfloat16, gl.float32, gl.int32, gl.int64, gl.int1))
    for result, dtype in (
        (half * 1.5, gl.bfloat16),
        (2 - half, gl.bfloat16),
        (half + single, gl.float32),
        (whole * 1.5, gl.float32),
        (whole * single, gl.float32),
        (whole + 1, gl.int32),
        (whole + wide, gl.int64),
        (half / half, gl.float32),
        (whole / 2, gl.float32),
        (True & truth, gl.int1),
        (truth | (whole < 3), gl.int1),
        (half.to(gl.float32) / 3, gl.float32),
        (whole // 2, gl.int32),
    ):
        assert result.dtype == dtype
    for left, right in ((Value(7, gl.int32), -2), (Value(-7, gl.int32), 2)):
        for divide in (lambda x, y: x // y, lambda x, y: x % y):
            with pytest.raises(FaultError, match="a division of negative numbers"):
                divide(left, right)
    assert (half * 0.1).values == rounded(0.1, gl.bfloat16)
    with pytest.raises(FaultError, match="int32 overflows: 2 to 2147483648"):
        Value([1, 1 << 30], gl.int32) * 2


def test_nothing_is_patched_afterwards():
    run = type(copy_kernel).run
    with pytest.raises(ZeroDivisionError), executing():
        raise ZeroDivisionError
    assert type(copy_kernel).run is run
