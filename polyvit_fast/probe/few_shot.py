"""Few-shot classification: ridge regression to a handful of examples of each class, as in big_vision, with draws for an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polyvit_fast.probe.intervals import Estimate, mean_of_draws
from polyvit_fast.randomness import permutation

NUM_DRAWS = 10
PENALTIES = tuple(2.0**exponent for exponent in range(-10, 21, 3))
"""Added to the squared singular values of the features."""
LARGEST_CHOICE = 4096
"""The most training examples, of those not drawn, by which a penalty is chosen."""


@dataclass(frozen=True)
class FewShotResult:
    """The accuracy on the validation split with `shots` examples of each class."""

    shots: int
    accuracy: Estimate
    penalty: float
    """The one that was chosen most often."""


def draw_shots(labels: Int[Tensor, " examples"], num_classes: int, shots: int, *seed: int | str) -> Int[Tensor, " drawn"]:
    """Indices of `shots` examples of each class, of a class with fewer all of them."""
    drawn = []
    for label in range(num_classes):
        own = (labels == label).nonzero().flatten()
        drawn.append(own[torch.from_numpy(permutation(len(own), *seed, "few-shot", shots, label))[:shots]])
    return torch.cat(drawn)


def solve_ridge(
    features: Float[Tensor, "drawn dim"], labels: Int[Tensor, " drawn"], num_classes: int, penalties: Sequence[float]
) -> tuple[Float[Tensor, "penalties dim classes"], Float[Tensor, " dim"], Float[Tensor, " classes"]]:
    """Weights for every penalty from one decomposition, and the means of features and targets: logits are (x - mean) W + mean target."""
    targets = torch.nn.functional.one_hot(labels, num_classes).double() * 2 - 1
    mean, target = features.double().mean(0), targets.mean(0)
    u, s, vt = torch.linalg.svd(features.double() - mean, full_matrices=False)
    projected = u.t() @ (targets - target)
    weights = [vt.t() @ (projected * (s / (s.square() + penalty))[:, None]) for penalty in penalties]
    return torch.stack(weights), mean, target


def measure_few_shot(
    train: tuple[Float[Tensor, "train dim"], Int[Tensor, " train"]],
    val: tuple[Float[Tensor, "val dim"], Int[Tensor, " val"]],
    num_classes: int,
    shots: int,
    seed: int,
) -> FewShotResult:
    """The accuracy over draws; the penalty of each draw is that which is best on training examples that were not drawn."""
    accuracies, chosen = [], []
    for draw in range(NUM_DRAWS):
        drawn = draw_shots(train[1], num_classes, shots, seed, draw)
        weights, mean, target = solve_ridge(train[0][drawn], train[1][drawn], num_classes, PENALTIES)
        rest = torch.ones(len(train[1]), dtype=torch.bool)
        rest[drawn] = False
        others = rest.nonzero().flatten()[:LARGEST_CHOICE]
        index = len(PENALTIES) // 2
        if len(others):
            index = int(_score(weights, mean, target, train[0][others], train[1][others]).argmax())
        accuracies.append(float(_score(weights[index : index + 1], mean, target, *val)))
        chosen.append(PENALTIES[index])
    return FewShotResult(shots, mean_of_draws(accuracies), max(set(chosen), key=chosen.count))


def _score(weights: Tensor, mean: Tensor, target: Tensor, features: Tensor, labels: Tensor) -> Float[Tensor, " penalties"]:
    """The accuracy of each penalty's weights."""
    logits = (features.double() - mean) @ weights + target
    return (logits.argmax(-1) == labels).double().mean(-1)
