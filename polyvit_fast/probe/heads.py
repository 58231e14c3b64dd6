"""Heads on frozen features, for several strengths of regularisation at once: linear, and attentive.

An L2 penalty is part of the loss, and each strength has weights of its own, so that one pass over the features trains all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polyvit_fast.randomness import key
from polyvit_fast.train.loss import LOSSES, Labels

NUM_QUERIES = 8
LEARNING_RATE = 0.05
STEPS = (400, 4000)
"""The fewest and the most steps of a fit; between them as many as 40 passes over the features take."""
PASSES = 40


class Probe(ABC):
    """A head for each of `penalties`, on features that are first brought to a mean of 0 and a std of 1, those of what it is fitted to."""

    batch: int
    """Examples per step."""

    def __init__(self, num_classes: int, loss: str, penalties: Sequence[float]) -> None:
        self.num_classes, self.loss, self.penalties = num_classes, loss, torch.tensor(penalties)

    def fit(self, features: Tensor, labels: Labels, seed: int) -> None:
        """Train on all examples by Adam with a cosine, from a start that `seed` determines."""
        axes = tuple(range(features.ndim - 1))
        self.mean, self.std = features.float().mean(axes), features.float().std(axes).clamp_min(1e-6)
        generator = torch.Generator().manual_seed(key(seed, "probe") >> 1)
        parameters = self.start(features.shape[-1], generator)
        optimizer, size = torch.optim.Adam(parameters, lr=LEARNING_RATE), min(self.batch, len(features))
        steps = max(STEPS[0], min(STEPS[1], PASSES * len(features) // size))
        order = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(features), generator=generator)])
            chosen, order = order[:size], order[size:]
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            self._objective(features[chosen], labels[chosen]).backward()
            optimizer.step()

    def _objective(self, features: Tensor, labels: Labels) -> Float[Tensor, ""]:
        """The sum over the penalties of each one's loss: none of them has a gradient of another's."""
        logits = self.compute(self._standardise(features))
        losses = torch.stack([LOSSES[self.loss](one, labels, 0.0) for one in logits])
        return (losses + 0.5 * self.penalties * self.classifier.square().sum((1, 2))).sum()

    def _standardise(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std

    @torch.no_grad()
    def predict(self, features: Tensor) -> Float[Tensor, "penalties examples classes"]:
        """The logits of each penalty's head."""
        parts = features.split(self.batch)
        return torch.cat([self.compute(self._standardise(part)) for part in parts], 1)

    classifier: Float[Tensor, "penalties classes dim"]
    bias: Float[Tensor, "penalties 1 classes"]

    def start(self, dim: int, generator: torch.Generator) -> list[Tensor]:
        """The parameters at the start: a classifier of zeros."""
        count = len(self.penalties)
        self.classifier = torch.zeros(count, self.num_classes, dim, requires_grad=True)
        self.bias = torch.zeros(count, 1, self.num_classes, requires_grad=True)
        return [self.classifier, self.bias]

    @abstractmethod
    def compute(self, features: Tensor) -> Float[Tensor, "penalties examples classes"]:
        """The logits of standardised features."""


class LinearProbe(Probe):
    """Logistic regression on what heads read, `[examples, dim]`."""

    batch = 1024

    def compute(self, features: Float[Tensor, "examples dim"]) -> Float[Tensor, "penalties examples classes"]:
        """The logits of standardised features."""
        return features @ self.classifier.transpose(1, 2) + self.bias


class AttentiveProbe(Probe):
    """Logistic regression on what learned queries read of all tokens, `[examples, tokens, dim]`.

    Each query gives weights of the tokens, by which one part of the features is averaged: attention without projections, after
    arXiv 2506.10178.
    """

    batch = 128

    def start(self, dim: int, generator: torch.Generator) -> list[Tensor]:
        """The parameters at the start: random queries, and a classifier of zeros."""
        self.num_queries = math.gcd(NUM_QUERIES, dim)
        shape = (len(self.penalties), self.num_queries, dim)
        self.queries = (torch.randn(shape, generator=generator) / math.sqrt(dim)).requires_grad_()
        return [self.queries, *super().start(dim, generator)]

    def compute(self, features: Float[Tensor, "examples tokens dim"]) -> Float[Tensor, "penalties examples classes"]:
        """The logits of standardised features."""
        scores = torch.einsum("kqd,ntd->knqt", self.queries, features) / math.sqrt(features.shape[-1])
        parts = features.unflatten(-1, (self.num_queries, -1))  # a part of the features for each query
        read = torch.einsum("knqt,ntqc->knqc", scores.softmax(-1), parts).flatten(2)
        return read @ self.classifier.transpose(1, 2) + self.bias


def split_for_choice(count: int, seed: int) -> tuple[Int[Tensor, " fitted"], Int[Tensor, " held_out"]]:
    """Indices of four fifths of the examples, to fit to, and of the others, by which a penalty is chosen."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key(seed, "probe", "choice") >> 1))
    held_out = max(1, count // 5)
    return order[held_out:], order[:held_out]
