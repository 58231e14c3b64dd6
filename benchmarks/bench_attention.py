"""Attention on the packed projection, each way, against torch's backends, compilers and packages.

Run: pytest benchmarks/bench_attention.py. The backward gives the packed gradient; what peers spend on joining theirs is in their time.
Where the tile table sends a length to a library, ours is that, and our own kernels are a contender beside it.
"""

from collections.abc import Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from card import DEVICE, DTYPE, HAS_GPU, Cost
from problem import BACKWARD, EAGER, FORWARD, KERNELS, OURS, PORTABLE, Contender, Problem, portable
from torch import Tensor

import polyvit_kernels
from polyvit_kernels import reference, tiles

# (batch, tokens, heads, head_dim): ViT-B/16 on images of 224 and 384 pixels, on 8 s and on 25 s of sound, on clips; ViT-H/14's heads.
ON_A_GPU = [
    *((128, 197, 12, 64), (256, 197, 12, 64), (64, 401, 12, 64), (32, 577, 12, 64), (32, 1212, 12, 64), (8, 3137, 12, 64)),
    (128, 257, 16, 80),
]
SHAPES = ON_A_GPU if HAS_GPU else [(2, 197, 3, 64)]
COMPILED = [(128, 197, 12, 64), (64, 401, 12, 64), (2, 197, 3, 64)]
SAMPLE = 2  # examples that are held to the truth


def eager_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def our_kernels(qkv: Tensor) -> Tensor:
    return torch.ops.polyvit.attention(qkv)[0]


def is_a_librarys(tokens: int, head_dim: int) -> bool:
    """Whether the tile table sends such attention to a library."""
    return HAS_GPU and tiles.pick("attention", tiles.architecture(DEVICE), DTYPE, tokens=tokens, features=head_dim).backend != "triton"


def problem_of(shape: Sequence[int]) -> Problem:
    batch, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=DEVICE, dtype=DTYPE)
    elements, size = batch * tokens * heads * head_dim, qkv.element_size()
    product = 2 * elements * tokens
    kernels = "attention_short" if tokens <= 256 else "attention_long"
    forms = (polyvit_kernels.attention, eager_attention, reference.attention)
    return Problem(
        title=f"attention | {batch}×{tokens}×{heads}×{head_dim}",
        inputs={"qkv": qkv},
        check=partial(compare.assert_as_exact_as_torch, *forms, {"qkv": qkv[:SAMPLE]}, DTYPE),
        contenders={
            OURS: Contender(operation=polyvit_kernels.attention),
            KERNELS: Contender(operation=our_kernels, alike=False) if is_a_librarys(tokens, head_dim) else "what ours is",
            PORTABLE: portable(our_kernels),
            EAGER: Contender(operation=eager_attention),
            **(peers.compiled(eager_attention) if shape in COMPILED else dict.fromkeys(peers.COMPILERS, "two lengths are enough")),
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


@pytest.mark.parametrize("contender", [OURS, KERNELS, PORTABLE, EAGER, *peers.COMPILERS, *peers.ATTENTIONS])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(report, shape, direction, contender):
    report(direction, contender, problem_of, shape)
