"""Operations on a head's panels, executed on a CPU: a kernel that does them all, on heads of one panel and of two."""

import pytest
import torch
from compare import DEVICE
from gluon_executor import executing
from samples import normal
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from polyvit_kernels.hopper import panels
from polyvit_kernels.hopper.layouts import LN_2, descriptors, mma_rows, operand_a, vector

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the executor is for machines without a GPU")


@gluon.jit
def panels_kernel(d_x, d_x_rest, p_x, p_scaled, p_product, p_dots, p_sums, tokens, stride, HEAD_DIM: gl.constexpr):
    """Of X, the 64 rows from row 3 on of the second head: 2 (X Xᵀ) X, rowsum(X · X) and the sums of X's columns."""
    d = panels.combine(d_x, d_x_rest)
    s_x = panels.allocate(d, 2)
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, 64 * HEAD_DIM * 2)
    panels.load_tma(d, 0, 3, HEAD_DIM, bar, s_x, 1)
    mbarrier.wait(bar, 0)
    s_rows = panels.stage(s_x, 1)
    # [64, 64]
    b_s = warpgroup_mma_wait(0, deps=(panels.mma_scores(panels.load_shared(s_rows, operand_a()), s_rows, 64),))
    # [64, width] a panel
    b_acc = panels.mma_wait(panels.mma_accumulate(b_s, s_rows, panels.accumulators(s_rows, 64)))
    b_acc = panels.add(panels.scale(b_acc, 2.0), panels.zeros_mma(s_rows))
    panels.store_rows(p_product + 3 * HEAD_DIM, b_acc, 0, HEAD_DIM, tokens - 3)
    # [64]
    i = gl.arange(0, 64, layout=mma_rows())
    panels.store_rows(p_scaled + 3 * HEAD_DIM, panels.scale_rows(b_acc, i.to(gl.float32) * LN_2), 0, HEAD_DIM, tokens - 3)
    # [64, width] a panel
    b_x = panels.load_rows(p_x + HEAD_DIM, s_rows, 3, stride, tokens)
    b_same = panels.add(panels.zeros_coalesced(s_rows), panels.load_coalesced(s_rows))
    gl.store(p_dots + gl.arange(0, 64, layout=vector()), panels.row_dots(b_x, b_same))
    panels.store_vector(p_sums, panels.column_sums(b_x))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("tokens", [50, 67])
def test_products_sums_loads_and_stores(tokens, head_dim):
    x = normal(1, tokens, 2, head_dim).bfloat16()
    scaled, product = torch.zeros(tokens, head_dim), torch.zeros(tokens, head_dim)
    dots, sums = torch.empty(64), torch.empty(head_dim)
    with executing(rounding=False, partly=("p_scaled", "p_product")):
        panels_kernel[(1,)](
            *descriptors(x, head_dim, 64), x, scaled, product, dots, sums, tokens, x.stride(1), HEAD_DIM=head_dim, num_warps=4
        )  # fmt: skip
    rows = torch.zeros(64, head_dim, dtype=torch.float64)
    rows[: tokens - 3] = x[0, 3:67, 1]
    true = 2 * (rows @ rows.T) @ rows
    expected = (true[: tokens - 3], (true * torch.arange(64)[:, None] * LN_2.value)[: tokens - 3], rows.square().sum(1), rows.sum(0))
    found = (product[3:67], scaled[3:67], dots, sums)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)
    assert not product[:3].any()
