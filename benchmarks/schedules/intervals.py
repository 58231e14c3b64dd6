"""Differences between conditions with paired bootstrap intervals, over seeds and test files together."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from polyvit_fast.randomness import generator

NUM_DRAWS = 4_000
Draws = Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class Difference:
    """A difference between two conditions."""

    value: float
    draws: Draws
    """Of the bootstrap."""

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return float(low), float(high)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        low, high = self.interval
        return low > 0 or high < 0


def draw_seeds(num_seeds: int) -> Int[np.ndarray, "draws seeds"]:
    """How often each seed counts in each draw: the same in all tasks, as they are trained together."""
    return generator("bootstrap", "seeds", num_seeds).multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_DRAWS)


def draw_files(task: str, num_files: int) -> Int[np.ndarray, "draws files"]:
    """How often each test file of a task counts in each draw."""
    return generator("bootstrap", "files", task, num_files).multinomial(num_files, np.full(num_files, 1 / num_files), NUM_DRAWS)


def compare(task: str, ours: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Difference:
    """The mean metric of our runs on a task minus that of the others, which have the same seeds in the same order.

    The arguments are the `test` lines of the runs' results.
    """
    seeds = draw_seeds(len(ours))
    value = float(np.mean([line["metric"] for line in ours]) - np.mean([line["metric"] for line in others]))
    files = draw_files(task, len(ours[0].get("right", ours[0].get("labels"))))
    measured = [measure_draws(line, files) - measure_draws(other, files) for line, other in zip(ours, others, strict=True)]
    return Difference(value, (seeds * np.stack(measured, 1)).sum(1) / len(ours))


def measure_draws(line: dict[str, Any], files: Int[np.ndarray, "draws files"]) -> Draws:
    """The metric of a run on each draw of test files."""
    if "right" in line:
        return files @ np.array(list(map(int, line["right"]))) / files.shape[1]
    labels = np.array([list(map(int, row)) for row in line["labels"]])
    logits = np.frombuffer(base64.b64decode(line["logits"]), np.float16).reshape(labels.shape)
    return np.mean([_draw_precisions(logits[:, i], labels[:, i], files) for i in range(labels.shape[1])], 0)


def _draw_precisions(
    logits: Float[np.ndarray, " files"], labels: Int[np.ndarray, " files"], files: Int[np.ndarray, "draws files"]
) -> Draws:
    """The average precision of a class on each draw."""
    order = np.argsort(-logits.astype(np.float32), kind="stable")
    counts, hits = files[:, order].astype(np.float32), labels[order]
    found = np.cumsum(counts * hits, 1)
    precision = found / np.maximum(np.cumsum(counts, 1), 1)
    return (counts * hits * precision).sum(1) / np.maximum(found[:, -1], 1)


def average(differences: Sequence[Difference]) -> Difference:
    """The mean of the differences on several tasks."""
    return Difference(float(np.mean([one.value for one in differences])), np.mean([one.draws for one in differences], 0))
