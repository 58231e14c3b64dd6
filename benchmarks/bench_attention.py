"""Attention on the packed projection, each way, against torch's backends, compilers and packages.

Run: pytest benchmarks/bench_attention.py. The backward gives the packed gradient; the time in which peers concatenate theirs is counted.
Where the tile table sends a length to a library, ours is that, and our own kernels are a candidate of their own.
"""

from collections.abc import Sequence
from functools import partial

import compare
import machine
import peers
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, OURS, Candidate, Problem, group_params
from machine import DEVICE, DTYPE, HAS_GPU
from torch import Tensor

import polyvit_kernels
from polyvit_kernels import reference, tiles

KERNELS = "our kernels"
# (batch, tokens, heads, head_dim): ViT-B/16 on images of 224 and 384 pixels, on 8 s and on 25 s of sound, on clips; ViT-H/14's heads.
ON_A_GPU = [
    *((128, 197, 12, 64), (256, 197, 12, 64), (64, 401, 12, 64), (32, 577, 12, 64), (32, 1212, 12, 64), (8, 3137, 12, 64)),
    (128, 257, 16, 80),
]
SHAPES = ON_A_GPU if HAS_GPU else [(1, 33, 1, 16) if machine.IS_TINY else (2, 197, 3, 64)]
COMPILED = [(128, 197, 12, 64), (64, 401, 12, 64)]
SAMPLE = 2  # examples that are held to the truth


def eager_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def our_kernels(qkv: Tensor) -> Tensor:
    return torch.ops.polyvit.attention(qkv)[0]


def find_our_kernels(tokens: int, head_dim: int) -> Candidate | str:
    """Our kernels, where the tile table sends such attention to a library."""
    if not HAS_GPU or tiles.pick("attention", tiles.architecture(DEVICE), DTYPE, tokens=tokens, features=head_dim).backend == "triton":
        return "the same as ours here"
    return Candidate(operation=our_kernels)


def attention_of(shape: Sequence[int]) -> Problem:
    batch, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE, dtype=DTYPE)
    elements, size = batch * tokens * heads * head_dim, qkv.element_size()
    forms = (polyvit_kernels.attention, eager_attention, reference.attention)
    return Problem(
        title=f"attention {batch}×{tokens}×{heads}×{head_dim}",
        inputs={"qkv": qkv},
        check=partial(compare.assert_as_exact_as_torch, *forms, {"qkv": qkv[:SAMPLE]}, DTYPE),
        candidates={
            OURS: Candidate(operation=polyvit_kernels.attention),
            KERNELS: find_our_kernels(tokens, head_dim),
            EAGER: Candidate(operation=eager_attention),
            **(peers.compile_operation(eager_attention) if shape in COMPILED else dict.fromkeys(peers.COMPILERS, "two lengths are enough")),
            **peers.find_attentions(),
        },
        # In: q, k, v; out: o and the log-sums. Backward in: do, q, k, v, o; out: dq, dk, dv.
        num_bytes={FORWARD: 4 * elements * size + 4 * elements // head_dim, BACKWARD: 8 * elements * size + 4 * elements // head_dim},
        amount=batch,
        unit="examples",
    )


@pytest.mark.parametrize("candidate", [OURS, KERNELS, EAGER, *peers.COMPILERS, *peers.ATTENTIONS])
@pytest.mark.parametrize("group", group_params(attention_of, SHAPES), indirect=True)
def test_attention(group, candidate, benchmark):
    group.enter(candidate, benchmark)
