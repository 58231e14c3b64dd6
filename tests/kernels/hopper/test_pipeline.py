"""The pipeline of long attention, executed on a CPU: a kernel that adds up its resident and its streamed rows."""

import pytest
import torch
from compare import DEVICE
from gluon_executor import executing
from long_forms import every
from samples import normal
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from polyvit_kernels.hopper import panels
from polyvit_kernels.hopper.layouts import descriptors, mma, vector_shared
from polyvit_kernels.hopper.pipeline import KEYS, QUERIES, run

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the executor is for machines without a GPU")


@gluon.jit
def total(s_rows):
    return gl.sum(gl.sum(s_rows[0].load(mma(64)).to(gl.float32), 1), 0)


@gluon.jit
def add(
    tensors, i_buffer, released, full, empty, rows, start, end, scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    OPTION: gl.constexpr,
):  # fmt: skip
    """The sums of the resident rows and of both kinds of streamed rows, stored where the block's first log-sum-exp would be."""
    p_sums, s_resident, s_0, s_1 = tensors
    i_row, _length, _o_row, o_lse, _column, _width = rows
    resident = total(panels.stage(s_resident, i_buffer))
    mbarrier.arrive(released, count=1)
    first = 0.0
    second = 0.0
    for j in range(start, end):
        mbarrier.wait(full.index(j % STAGES), j // STAGES & 1)
        first += total(panels.stage(s_0, j % STAGES))
        second += total(panels.stage(s_1, j % STAGES))
        mbarrier.arrive(empty.index(j % STAGES), count=1)
    p = p_sums + (o_lse + i_row) * 3
    gl.store(p, resident)
    gl.store(p + 1, first * scale)
    gl.store(p + 2, second * scale)


@gluon.jit
def add_kernel(
    d_qkv, d_grad, p_sums, p_lse, p_cu_tokens, tokens, heads, groups, tiles, RESIDENT: gl.constexpr, VARLEN: gl.constexpr,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    d = panels.combine(d_qkv, None)
    d_do = panels.combine(d_grad, None)
    s_resident = panels.allocate(d, WARPGROUPS * 2)
    s_0 = panels.allocate(d, STAGES)
    s_1 = panels.allocate(d, STAGES)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, 64], vector_shared())
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, 64], vector_shared())
    d_second = d_do if RESIDENT == KEYS else d
    run(
        add, (p_sums, s_resident, s_0, s_1), ((d,), (s_resident,)), ((d, d_second), (s_0, s_1)), (p_lse, p_lse, s_lse, s_delta),
        (p_cu_tokens, tokens, heads, groups, tiles, 2.0), RESIDENT, VARLEN, 64, WARPGROUPS, 64, STAGES, 64, False,
    )  # fmt: skip


def sums(qkv, grad, resident, warpgroups, stages, programs, cu_tokens=None, longest=0):
    """`[batch or 1, heads, tokens, 3]`, NaN where no block begins."""
    batch, tokens, _, heads, _ = qkv.shape
    sequences, longest = (batch, tokens) if cu_tokens is None else (len(cu_tokens) - 1, longest)
    groups = -(-longest // (64 * warpgroups))
    found = torch.full((batch, heads, tokens, 3), torch.nan)
    add_kernel[(programs,)](
        descriptors(qkv, 64, 64)[0], descriptors(grad, 64, 64)[0], found, torch.zeros(batch, heads, tokens), cu_tokens, tokens, heads,
        groups, sequences * heads * groups, RESIDENT=resident, VARLEN=cu_tokens is not None, WARPGROUPS=warpgroups, STAGES=stages,
    )  # fmt: skip
    return found


def expected(qkv, grad, resident):
    """Of one sequence `[tokens, 3, heads, 64]`."""
    q, k, v = (part.double().sum(-1).T for part in qkv.unbind(1))
    do = grad.double().sum(-1).T
    kept, first, second = (k, q, do) if resident == KEYS.value else (q, k, v)
    blocks = torch.stack([block.sum(1) for block in kept.split(64, 1)], 1)
    streamed = [2 * x.sum(1, keepdim=True).expand_as(blocks) for x in (first, second)]
    return torch.stack([blocks, *streamed], -1)


CASES = [(QUERIES, 3, 2, 1), (QUERIES, 2, 4, 3), (KEYS, 3, 4, 2), (KEYS, 2, 3, 5)]


@pytest.mark.parametrize("seed", every(2, range(2)))
@pytest.mark.parametrize(("resident", "warpgroups", "stages", "programs"), CASES, ids=str)
def test_all_rows_of_equal_sequences_are_streamed_past_every_block(resident, warpgroups, stages, programs, seed):
    qkv, grad = normal(2, 330, 3, 2, 64).to(torch.bfloat16), normal(2, 330, 2, 64, seed=1).to(torch.bfloat16)
    with executing(seed=seed, partly=("p_sums",)):
        found = sums(qkv, grad, resident.value, warpgroups, stages, programs)
    for one, x, g in zip(found, qkv, grad, strict=True):
        # Rows beyond the end come as zeros, so that even the last block's sum is right.
        torch.testing.assert_close(one[:, ::64].double(), expected(x, g, resident.value), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("resident", "warpgroups", "stages", "programs"), CASES, ids=str)
def test_only_a_sequences_own_rows_are_streamed(resident, warpgroups, stages, programs):
    lengths = [1, 63, 64, 0, 65, 200, 7]
    cu_tokens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv, grad = normal(1, 400, 3, 2, 64).to(torch.bfloat16), normal(1, 400, 2, 64, seed=1).to(torch.bfloat16)
    with executing(partly=("p_sums",)):
        found = sums(qkv, grad, resident.value, warpgroups, stages, programs, cu_tokens, 256)
    for first, last in zip(cu_tokens[:-1].tolist(), cu_tokens[1:].tolist(), strict=True):
        if first < last:
            # Resident rows beyond the end are not zeroed, as their results are not stored.
            true = expected(qkv[0, first:last], grad[0, first:last], resident.value)[..., 1:]
            torch.testing.assert_close(found[0, :, first:last:64, 1:].double(), true, rtol=1e-4, atol=1e-2)
