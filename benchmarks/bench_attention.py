"""Attention on the packed projection, each way, against torch's backends, compilers and packages.

Run: pytest benchmarks/bench_attention.py. The backward gives the packed gradient; what peers spend on joining theirs is in their time.
"""

from collections.abc import Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from card import DEVICE, DTYPE, HAS_GPU, Cost
from problem import BACKWARD, EAGER, FORWARD, OURS, Contender, Problem
from torch import Tensor

import polyvit_kernels
from polyvit_kernels import reference

# (batch, tokens, heads, head_dim): ViT-B/16 on images, on 8 s and on 25 s of sound, and on clips.
SHAPES = [(128, 197, 12, 64), (64, 401, 12, 64), (32, 1212, 12, 64), (8, 3137, 12, 64)] if HAS_GPU else [(2, 197, 3, 64)]
MOST_COMPILED_TOKENS = 401
SAMPLE = 2  # examples that are held to the truth


def eager_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def problem_of(shape: Sequence[int]) -> Problem:
    batch, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE, dtype=DTYPE)
    elements, size = batch * tokens * heads * head_dim, qkv.element_size()
    product = 2 * elements * tokens
    kernels = "attention_short" if tokens <= 256 else "attention_long"
    too_long = f"only up to {MOST_COMPILED_TOKENS} tokens, as compiling takes long"
    forms = (polyvit_kernels.attention, eager_attention, reference.attention)
    return Problem(
        title=f"attention | {batch}×{tokens}×{heads}×{head_dim}",
        inputs={"qkv": qkv},
        check=partial(compare.assert_as_exact_as_torch, *forms, {"qkv": qkv[:SAMPLE]}, DTYPE),
        contenders={
            OURS: Contender(operation=polyvit_kernels.attention),
            EAGER: Contender(operation=eager_attention),
            **(peers.compiled(eager_attention) if tokens <= MOST_COMPILED_TOKENS else dict.fromkeys(peers.COMPILERS, too_long)),
            **peers.attentions(),
        },
        # In: q, k, v; out: o and the log-sums. Backward in: do, q, k, v, o; out: dq, dk, dv; five products instead of two.
        costs={
            FORWARD: Cost(num_bytes=4 * elements * size + 4 * elements // head_dim, flops=2 * product),
            BACKWARD: Cost(num_bytes=8 * elements * size + 4 * elements // head_dim, flops=5 * product),
        },
        amount=batch,
        unit="examples",
        rows={
            direction: (("attention", tokens, head_dim), (f"{kernels}_{direction}", tokens, head_dim)) for direction in (FORWARD, BACKWARD)
        },
    )


@pytest.mark.parametrize("contender", [OURS, EAGER, *peers.COMPILERS, *peers.ATTENTIONS])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(report, shape, direction, contender):
    report(direction, contender, problem_of, shape)
