"""Inputs for kernels: random tensors as inside trained ViTs, on the device where kernels are tested."""

from functools import partial

import torch
from compare import DEVICE
from torch.nn import functional


def quick_gelu(x):
    """CLIP's, as transformers computes it."""
    return x * torch.sigmoid(1.702 * x)


PLAIN_GELU = {"tanh": partial(functional.gelu, approximate="tanh"), "erf": functional.gelu, "quick": quick_gelu}
"""The forms of GELU by torch's operators."""


def plain_slope(x, gelu):
    """What autograd gives for the derivative of a form, in x's dtype."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(PLAIN_GELU[gelu](leaf).sum(), leaf)[0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def factors(examples):
    """Of drop path at a rate of 0.3: every third example is left out, from the second on."""
    kept = torch.full((examples,), 1 / 0.7, device=DEVICE)
    kept[1::3] = 0
    return kept


def activations(*shape):
    """As inside trained ViTs: each channel has its own offset, and a few are a hundred times the others."""
    scale = torch.ones(shape[-1], device=DEVICE)
    scale[::31] = 100
    return (normal(*shape) + normal(shape[-1], seed=1)) * scale
