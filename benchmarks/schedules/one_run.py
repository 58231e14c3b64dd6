"""One run, in a process of its own: train it, evaluate it once on the test files, write its file of results.

python one_run.py SPEC.json, as the runner writes it. A stopped run goes on where its checkpoint is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from assignment import Assignment
from conditions import FORMS, build_config
from torch import Tensor

import polyvit_fast as pf
from polyvit_fast import experiments, strict_json
from polyvit_fast.config import Train
from polyvit_fast.data import Manifest
from polyvit_fast.data.stream import Loader
from polyvit_fast.experiments.schedules_data.dataset import read_record
from polyvit_fast.files import write_atomically
from polyvit_fast.probe.probing import ProbePlan, probe
from polyvit_fast.train.evaluate import evaluate_run, load_weights
from polyvit_fast.train.output.cost_report import estimate_cost

PROBED = ("weighted", "images alone", "videos alone", "sounds alone")
"""Conditions whose trunks are probed on the tasks that are held out."""
OTHER_SPEAKERS = "schedules-data/speakers/test.csv"


class AnswerKeeper:
    """Keeps the answers to test files: for each whether it was right, or of several labels all logits."""

    def __init__(self) -> None:
        self.right: dict[str, list[bool]] = {}
        self.logits: dict[str, list[Tensor]] = {}
        self.labels: dict[str, list[Tensor]] = {}

    def __call__(self, loader: Loader, indices: list[int], logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        if labels.is_floating_point():
            self.logits.setdefault(loader.name, []).append(logits)
            self.labels.setdefault(loader.name, []).append(labels)
        else:
            self.right.setdefault(loader.name, []).extend((logits.argmax(1) == labels).tolist())

    def describe(self, task: str) -> dict[str, Any]:
        """The answers to a task's files in their order, as text: bits, or halves of logits and bits of labels."""
        if task in self.right:
            return {"right": "".join(map(str, map(int, self.right[task])))}
        logits, labels = torch.cat(self.logits[task]), torch.cat(self.labels[task])
        packed = base64.b64encode(logits.half().numpy().tobytes()).decode()
        return {"logits": packed, "labels": ["".join(map(str, row)) for row in labels.int().tolist()]}


def main(path: str) -> None:
    """Do what a file of an `Assignment` says."""
    todo = Assignment.read(Path(path))
    started = time.monotonic()
    config = build_config(todo.spec, FORMS[todo.form], todo.device)
    pf.train(config, out=todo.work)
    lines = [_describe(todo, config), *_read_validation(todo.work)]
    if todo.spec.stage != "sweep":
        lines += _test(todo.work, replace(config, out=str(todo.work)))
    if todo.spec.stage in ("table", "transfer") and todo.spec.condition.name in PROBED:
        lines += _probe(todo)
    lines[0]["seconds"] = round(time.monotonic() - started, 1)
    todo.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(todo.results, "".join(strict_json.dumps(line) + "\n" for line in lines))
    if not todo.keeps_weights:
        shutil.rmtree(todo.work)


def _describe(todo: Assignment, config: Train) -> dict[str, Any]:
    """The first line: what ran, on what, and what came out, but for the metrics. Only `seconds` differs when it runs again."""
    cost, spec = estimate_cost(config), todo.spec
    _, weights, _ = load_weights(todo.work, "newest")
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "kind": "run",
        "name": spec.name,
        "stage": spec.stage,
        "condition": spec.condition.name,
        "form": todo.form,
        "seed": spec.seed,
        "rate": spec.rate,
        "steps": {name: task.steps for name, task in config.tasks.items()},
        "updates": cost.num_steps,
        "minibatches": {row.name: row.num_steps for row in cost.tasks},
        "parameters": cost.num_parameters,
        "flops": cost.training_flops,
        "weights": digest.hexdigest()[:16],
        "data": {name: _find_digest(name) for name in config.tasks},
        "device": config.device,
        "machine": _find_machine(),
        "commit": _find_commit(),
        "versions": {"polyvit_fast": pf.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _read_validation(folder: Path) -> list[dict[str, Any]]:
    """The metrics on val of every evaluation."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = {row["step"]: row["tasks"] for row in rows if row["kind"] == "eval"}
    return [
        {"kind": "val", "step": step, "metrics": {name: _metric(row) for name, row in tasks.items()}}
        for step, tasks in sorted(found.items())
    ]


def _metric(row: Mapping[str, float]) -> float:
    return round(row["mAP"] if "mAP" in row else row["top1"], 5)


def _test(folder: Path, config: Train) -> list[dict[str, Any]]:
    """The answers to the test files, and to those of other speakers."""
    keeper = AnswerKeeper()
    rows = evaluate_run(folder, config, "newest", (), _ignore, split="test", keep=keeper).rows
    lines = [{"kind": "test", "task": name, "metric": _metric(row), **keeper.describe(name)} for name, row in rows.items()]
    if "language" in config.tasks and Path(OTHER_SPEAKERS).is_file():
        keeper, task = AnswerKeeper(), config.tasks["language"]
        others = replace(task, test=Manifest(path=OTHER_SPEAKERS, classes="schedules-data/speakers/classes.txt"))
        config = replace(config, tasks=config.tasks | {"language": others})
        row = evaluate_run(folder, config, "newest", ("language",), _ignore, split="test", keep=keeper).rows["language"]
        lines.append({"kind": "test", "task": "speakers", "metric": _metric(row), **keeper.describe("language")})
    return lines


def _probe(todo: Assignment) -> list[dict[str, Any]]:
    """Heads on the frozen trunk, and of the weighted runs on one with random weights of the same seed."""
    config = replace(experiments.load("schedules_transfer"), seed=todo.spec.seed, device=todo.device)
    config = replace(config, data=replace(config.data, num_threads=1), compute=replace(config.compute, compute_threads=1))
    names = tuple(name for name in config.tasks if Path(f"schedules-data/{name}/test.csv").is_file())
    if not names:
        return []
    # Tokenizers of modalities that the trunk has not seen are random.
    trained = build_config(todo.spec, FORMS[todo.form], todo.device).modalities
    probed = {config.tasks[name].modality.name: True for name in names}
    parts = ["trunk", *(name for name in probed if name in trained)]
    plan = ProbePlan(
        source=",".join(f"{part}={todo.work}" for part in parts),
        config=config,
        tasks=names,
        heads=("linear", "few-shot"),
        shots=(5,),
        compares_random=todo.spec.condition.name == "weighted",
        folder=todo.work / "probe",
    )
    return [
        {
            "kind": "probe",
            "trunk": "random" if result.weights == "random weights" else todo.spec.condition.name,
            "task": result.task,
            "head": result.head,
            "metric": round(result.estimate.value, 5),
        }
        for result in probe(plan, print, _ignore)
    ]


def _ignore(*_: object) -> None:
    pass


def _find_digest(name: str) -> str:
    record = read_record(Path("schedules-data") / name)
    return record.digest if record else ""


def _find_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _find_commit() -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1])
