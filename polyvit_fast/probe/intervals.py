"""How sure a figure is: 95 % confidence intervals of accuracies, of means over draws, and of any metric by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from polyvit_fast.randomness import generator

NORMAL = 1.959964
"""The 97.5 % quantile of the normal distribution."""
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""That of Student's t by degrees of freedom."""
NUM_RESAMPLES = 200


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def wilson(right: int, count: int) -> Estimate:
    """The fraction of right answers among `count` (Wilson's interval, 1927), which stays within 0 and 1 however few there are."""
    ratio, square = right / count, NORMAL**2
    centre = (ratio + square / (2 * count)) / (1 + square / count)
    half = NORMAL / (1 + square / count) * math.sqrt(ratio * (1 - ratio) / count + square / (4 * count**2))
    return Estimate(ratio, max(0.0, centre - half), min(1.0, centre + half))


def mean_of_draws(values: Sequence[float]) -> Estimate:
    """The mean over up to ten independent draws, with Student's interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = STUDENT[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def bootstrap(metric: Callable[[np.ndarray], float], count: int, seed: int) -> Estimate:
    """A metric of `count` examples, given their indices, with the percentiles of its values over resampled examples."""
    rng = generator(seed, "bootstrap")
    values = [metric(rng.integers(count, size=count)) for _ in range(NUM_RESAMPLES)]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return Estimate(metric(np.arange(count)), float(low), float(high))
