"""The rule for both attention kernels: output, log-sum-exp and packed gradient against the reference in fp64."""

import math

import torch
from compare import DEVICE, assert_within_rule
from samples import normal
from torch.nn import functional

from polyvit_kernels import reference, tiles

ARCH = tiles.architecture(DEVICE) if DEVICE.type == "cuda" else 90
DTYPES = [torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]
"""Triton's interpreter multiplies no bf16; there the kernels run in fp32, with the blocks of the bf16 rows."""


KERNEL_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""A dtype that the registered operations have kernels for."""

VIEWS = {
    "heads before tokens": ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
    "batch last": ((65, 3, 2, 32, 2), lambda leaf: leaf.permute(4, 0, 1, 2, 3)),
    "inside a wider buffer": ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
    "every second token": ((2, 130, 3, 2, 32), lambda leaf: leaf[:, ::2]),
    "one example repeated": ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
}


def row(op, tokens, head_dim):
    return tiles.pick(op, ARCH, torch.bfloat16, tokens=tokens, features=head_dim, portable=True)


def plain(qkv):
    if qkv.is_cuda and qkv.dtype is torch.float32:  # there ours is that very call, and the rule only bounds it against the truth
        return library(qkv.clone(memory_format=torch.contiguous_format))  # whose kernels read where an address is no multiple of 16
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def library(qkv):
    """The baseline where scores are large: like our kernels and unlike `plain` it does not round them to 16 bits."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def gradient(operation, qkv, grad):
    leaf = qkv.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(operation(leaf), leaf, grad)
    return result


def assert_obeys(qkv, found, lse, dtype, grad, plain=plain):
    """`found` holds the kernels' "out" and "dqkv"; `plain` is the baseline."""
    true = {"out": reference.attention(qkv.double()), "dqkv": reference.attention_backward(qkv.double(), grad.double())}
    baseline = {"out": plain(qkv), "dqkv": gradient(plain, qkv, grad)}
    assert_within_rule(found, baseline, true, dtype)
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    sums = torch.logsumexp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    torch.testing.assert_close(lse.double() * math.log(2), sums, rtol=1e-5, atol=1e-5)


def upstream(qkv):
    """A gradient by the output, laid out as autograd often gives it: heads before tokens."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return normal(batch, heads, tokens, head_dim, seed=9).to(qkv.dtype).transpose(1, 2)


def negative_scores(tokens, head_dim, dtype):
    """Queries and keys on opposite sides: scores between about -20 and -100, in fp16 -20 at the least."""
    qkv = normal(1, tokens, 3, 1, head_dim) * 0.1
    side = head_dim**0.25 * (4.2 if dtype is torch.float16 else 9.5)
    qkv[:, :, 0, :, 0] -= side
    qkv[:, :, 1, :, 0] += side
    return qkv.to(dtype)
