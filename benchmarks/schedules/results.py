"""Reads the runs' files of results, and chooses learning rates."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A file of results."""

    run: dict[str, Any]
    """Its first line."""
    val: dict[int, dict[str, float]]
    """The tasks' metrics on val at each step that was evaluated."""
    test: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The answers to the test files of each task."""
    probes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def condition(self) -> str:
        """How it was trained."""
        return self.run["condition"]

    @property
    def score(self) -> float:
        """The mean of the tasks' metrics on val at the end."""
        last = self.val[max(self.val)]
        return sum(last.values()) / len(last)


def read_run(path: Path) -> RunResult:
    """A run's results."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    val = {line["step"]: line["metrics"] for line in lines if line["kind"] == "val"}
    test = {line["task"]: line for line in lines if line["kind"] == "test"}
    return RunResult(lines[0], val, test, [line for line in lines if line["kind"] == "probe"])


def read_runs(folder: Path) -> list[RunResult]:
    """All runs of a stage, by name."""
    return [read_run(path) for path in sorted(folder.glob("*.jsonl"))]


def choose_rates(sweep: Iterable[RunResult]) -> Mapping[str, float]:
    """The peak rate of each condition with the best mean metric on val; of equal ones the lowest."""
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in sweep:
        scores[result.condition].append((-result.score, result.run["rate"]))
    return {condition: min(found)[1] for condition, found in scores.items()}
