"""What the process of one run has to do, as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from conditions import Condition, RunSpec


@dataclass(frozen=True)
class Assignment:
    """What a process has to do: a run, and where its files are."""

    spec: RunSpec
    form: str
    device: str
    results: Path
    """Its file of results."""
    work: Path
    """Its run folder while it runs."""
    keeps_weights: bool
    """Whether the run folder stays."""

    def to_json(self) -> str:
        """For a file that `read` takes."""
        return json.dumps(asdict(self), default=str, allow_nan=False)

    @classmethod
    def read(cls, path: Path) -> Assignment:
        """From a file of `to_json`."""
        values = json.loads(path.read_text())
        spec = values["spec"]
        condition = Condition(**(spec["condition"] | {"tasks": tuple(spec["condition"]["tasks"])}))
        values["spec"] = RunSpec(**(spec | {"condition": condition}))
        return cls(**(values | {"results": Path(values["results"]), "work": Path(values["work"])}))
