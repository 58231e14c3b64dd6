"""The losses, each way, eager and compiled: what a kernel of ours could gain on them at most.

Run: pytest benchmarks/bench_cross_entropy.py. There is no kernel of ours. The best that fusion gives is torch.compile's time.
"""

from collections.abc import Sequence

import peers
import pytest
import torch
from card import DEVICE, HAS_GPU, Cost
from problem import BACKWARD, EAGER, FORWARD, Contender, Problem
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
    read = logits.numel() * logits.element_size() + label_bytes
    return Problem(
        title=f"{title} | {batch}×{classes}",
        inputs={"logits": logits},
        contenders={EAGER: Contender(operation=loss), **peers.compiled(loss)},
        costs={FORWARD: Cost(num_bytes=read), BACKWARD: Cost(num_bytes=read + logits.numel() * logits.element_size())},
        amount=batch,
        unit="examples",
    )


@pytest.mark.parametrize("contender", [EAGER, *peers.COMPILERS])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("problem_of", [smoothed_of, soft_of])
def test_softmax(report, problem_of, shape, direction, contender):
    report(direction, contender, problem_of, shape)


@pytest.mark.parametrize("contender", [EAGER, *peers.COMPILERS])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SIGMOID_SHAPES, ids=str)
def test_sigmoid(report, shape, direction, contender):
    report(direction, contender, sigmoid_of, shape)
