"""GELU and its derivative as the epilogues compute them: truth is `reference.py` in fp64."""

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE, largest_difference

from polyvit_kernels import reference
from polyvit_kernels.triton_kernels.gelu import gelu as kernel_gelu
from polyvit_kernels.triton_kernels.gelu import gelu_and_slope as kernel_gelu_and_slope


@triton.jit
def gelu_kernel(p_x, p_y, p_slope, p_gelu, GELU: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr):
    i_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_x)
    b_y, b_slope = kernel_gelu_and_slope(b_x, GELU, PRECISE)
    tl.store(p_y + i_x, b_y)
    tl.store(p_slope + i_x, b_slope)
    tl.store(p_gelu + i_x, kernel_gelu(b_x, GELU, PRECISE))


def gelu_and_slope(x, gelu, precise):
    y, slope, again = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(len(x) // 4096,)](x, y, slope, again, GELU=gelu, PRECISE=precise, BLOCK=4096)
    assert torch.equal(again, y)
    return y, slope


@pytest.mark.parametrize(("gelu", "error", "relative"), [("erf", 7e-7, 6e-6), ("tanh", 1.6e-5, 1e-4), ("quick", 7e-7, 6e-6)])
def test_the_fits_are_as_exact_as_said(gelu, error, relative):
    x = torch.linspace(-14, 14, 32 * 4096, device=DEVICE)
    y, slope = gelu_and_slope(x, gelu, precise=False)
    true = reference.gelu(x.double(), gelu)
    assert largest_difference(y, true) < error
    tail = (x < 0) & (true < -1e-6)
    assert ((y - true) / true)[tail].abs().max() < relative
    # The slope is P + x P': two errors of the fit, the second one scaled up.
    assert largest_difference(slope, reference.gelu_backward(x.double(), gelu, torch.ones_like(true))) < 4 * error


@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
@pytest.mark.parametrize("precise", [False, True])
def test_far_away_gelu_is_the_identity_or_zero(precise, gelu):
    start = 70 if gelu == "quick" else 15  # from where the tail is below the smallest number
    far = torch.cat([torch.linspace(start, 200, 4096, device=DEVICE), torch.logspace(2, 4.5, 4096, device=DEVICE)])
    for x, slope in ((far, 1.0), (-far, 0.0)):
        y, slopes = gelu_and_slope(x, gelu, precise)
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(slopes, torch.full_like(x, slope))
