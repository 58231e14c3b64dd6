"""The losses a task may have, each over hard or mixed labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from jaxtyping import Float, Int
from torch import Tensor

Labels = Int[Tensor, " batch"] | Float[Tensor, "batch classes"]
Loss = Callable[[Tensor, Tensor, float], Tensor]


def softmax_loss(logits: Float[Tensor, "batch classes"], labels: Labels, label_smoothing: float) -> Float[Tensor, ""]:
    """Cross-entropy of the softmax, mean over the batch."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def sigmoid_loss(logits: Float[Tensor, "batch classes"], labels: Labels, label_smoothing: float) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over classes, mean over the batch; smoothed targets are y (1 - s) + s / C."""
    num_classes = logits.shape[1]
    # F.one_hot would ask a GPU whether all labels are in range, which waits for it.
    targets = labels if labels.is_floating_point() else (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / len(logits)


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def mixed_loss(loss: Loss, logits: Tensor, labels: Labels, partners: Labels, ratio: Float[Tensor, ""], label_smoothing: float) -> Tensor:
    """`ratio` of the `loss` by `labels` and the rest by the labels of the examples mixed in: both losses are linear in the target."""
    own, other = loss(logits, labels, label_smoothing), loss(logits, partners, label_smoothing)
    return ratio * own + (1 - ratio) * other


def matches(logits: Float[Tensor, "batch classes"], labels: Labels) -> Float[Tensor, ""]:
    """Fraction of right answers: of top-1 classes, or of all yes/no decisions of a multi-label task."""
    right = (logits > 0) == (labels > 0.5) if labels.is_floating_point() else logits.argmax(1) == labels
    return right.float().mean()
