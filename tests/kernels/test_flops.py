"""What torch's counter makes of the operations, against the same model from torch's own operators."""

import pytest
import torch
from compare import DEVICE
from samples import normal
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import polyvit_kernels as ops
import polyvit_kernels.flops as _registered  # noqa: F401 - importing it is what registers


def plain_attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v)


def plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gelu):
    return functional.linear(functional.gelu(functional.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def plain_patch_embed(grid, weight, bias, *_):
    return functional.conv3d(grid.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), bias, stride=weight.shape[1:4])


WEIGHTS = [normal(24, 16), normal(24), normal(16, 24), normal(16)]
PATCHES = [normal(2, 2, 8, 8, 3), normal(16, 1, 4, 4, 3), normal(16), normal(1, 1, 16), normal(1, 9, 16), normal(3), normal(3)]
CALLS = {
    "attention": (ops.attention, plain_attention, [normal(2, 9, 3, 2, 16)], 5 / 4),  # torch's plain one keeps its scores
    "linear_gelu": (
        lambda *x: ops.linear_gelu(*x, "erf"),
        lambda *x: functional.gelu(functional.linear(*x)),
        [normal(2, 9, 16), *WEIGHTS[:2]],
        1,
    ),
    "linear_add": (
        ops.linear_add,
        lambda x, w, b, r: r + functional.linear(x, w, b),
        [normal(2, 9, 16), *WEIGHTS[:2], normal(2, 9, 24)],
        1,
    ),
    "mlp": (lambda *x: ops.mlp(*x, "erf"), lambda *x: plain_mlp(*x, "erf"), [normal(2, 9, 16), *WEIGHTS], 1),
}


def count(form, *inputs):
    with FlopCounterMode(display=False) as counter:
        form(*inputs)
    return counter.get_total_flops()


def count_backward(form, *leaves):
    return count(form(*leaves).sum().backward)


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name):
    ours, plain, inputs, more = CALLS[name]
    assert count(ours, *inputs) == count(plain, *inputs) > 0
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert count_backward(ours, *leaves) == more * count_backward(plain, *leaves)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_frozen_input_or_weight_of_an_mlp_costs_no_product(frozen):
    leaves = [normal(2, 9, 16), *(tensor.clone() for tensor in WEIGHTS)]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index != frozen)
    ours, plain, _, _ = CALLS["mlp"]
    assert count_backward(ours, *leaves) == count_backward(plain, *leaves)


def test_patch_embed():
    grid, weight, *more = PATCHES
    more[2] = normal(1, 1 + 2 * 2 * 2, 16)
    assert count(ops.patch_embed, grid, weight, *more) == count(plain_patch_embed, grid, weight, *more)
    weight.requires_grad_()
    assert count_backward(ops.patch_embed, grid, weight, *more) == count_backward(plain_patch_embed, grid, weight, *more)


def test_sequences_in_one_buffer_cost_what_they_cost_alone():
    lengths = [9, 0, 1, 30]
    qkv = normal(sum(lengths), 3, 2, 16).requires_grad_()
    cu_tokens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    alone = [sequence[None].detach().requires_grad_() for sequence in qkv.split(lengths) if len(sequence)]
    assert count(ops.attention_varlen, qkv, cu_tokens, 30) == sum(count(ops.attention, sequence) for sequence in alone) > 0
    assert count_backward(lambda x: ops.attention_varlen(x, cu_tokens, 30), qkv) == sum(count_backward(ops.attention, x) for x in alone)
