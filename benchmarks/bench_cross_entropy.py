"""The losses, each way, eager and compiled: the most that a kernel of ours could gain on them.

Run: pytest benchmarks/bench_cross_entropy.py. There is no kernel of ours; torch.compile's time is the best that fusion gives.
"""

from collections.abc import Sequence

import peers
import pytest
import torch
from harness import BACKWARD, EAGER, FORWARD, Candidate, Problem, group_params
from machine import DEVICE, HAS_GPU
from torch import Tensor
from torch.nn import functional

# (batch, classes): ImageNet-1k and ImageNet-21k; AudioSet.
SHAPES = [(256, 1_000), (256, 21_843)] if HAS_GPU else [(64, 1_000)]
SIGMOID_SHAPES = [(128, 527)] if HAS_GPU else [(64, 527)]
SMOOTHING = 0.1


def smoothed_of(shape: Sequence[int]) -> Problem:
    batch, classes = shape
    labels = torch.randint(classes, (batch,), device=DEVICE)

    def smoothed(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)

    return _problem("smoothed cross-entropy", shape, smoothed, label_bytes=8 * batch)


def soft_of(shape: Sequence[int]) -> Problem:
    labels = torch.rand(*shape, device=DEVICE).softmax(1)

    def soft(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels)

    return _problem("soft cross-entropy", shape, soft, label_bytes=4 * labels.numel())


def sigmoid_of(shape: Sequence[int]) -> Problem:
    labels = (torch.rand(*shape, device=DEVICE) < 0.01).float()

    def sigmoid(logits: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(logits)

    return _problem("sigmoid cross-entropy", shape, sigmoid, label_bytes=4 * labels.numel())


def _problem(title: str, shape: Sequence[int], loss, label_bytes: int) -> Problem:
    batch, classes = shape
    logits = torch.randn(batch, classes, device=DEVICE)
    read = logits.nbytes + label_bytes
    return Problem(
        title=f"{title} {batch}×{classes}",
        inputs={"logits": logits},
        candidates={EAGER: Candidate(operation=loss), **peers.compile_operation(loss)},
        num_bytes={FORWARD: read, BACKWARD: read + logits.nbytes},
        amount=batch,
        unit="examples",
    )


@pytest.mark.parametrize("candidate", [EAGER, *peers.COMPILERS])
@pytest.mark.parametrize("group", [*group_params(smoothed_of, SHAPES), *group_params(soft_of, SHAPES)], indirect=True)
def test_softmax(group, candidate, benchmark):
    group.enter(candidate, benchmark)


@pytest.mark.parametrize("candidate", [EAGER, *peers.COMPILERS])
@pytest.mark.parametrize("group", group_params(sigmoid_of, SIGMOID_SHAPES), indirect=True)
def test_sigmoid(group, candidate, benchmark):
    group.enter(candidate, benchmark)
