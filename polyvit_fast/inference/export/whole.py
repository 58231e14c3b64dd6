"""All tasks of a run, as a run folder that holds one checkpoint with nothing but the weights: `write_whole`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polyvit_fast.config import Task
from polyvit_fast.inference.export.model_card import describe_run
from polyvit_fast.train.run_folder.checkpoint import Checkpoint, save
from polyvit_fast.train.run_folder.record import RecordedRun

DESCRIBING = ("config.json", "classes.json", "versions.json", "command.txt", "experiment.py")
"""Files of a run folder that say what the run was."""


def write_whole(recorded: RecordedRun, found: Checkpoint, weights: dict[str, Tensor], folder: Path) -> list[str]:
    """Write the weights and what describes them into a folder. Returns what is not as it was in the run, in sentences."""
    state = {name: value for name, value in found.state.items() if name not in ("counters", "best_step")}
    save(folder, found.step, {"model": weights}, {**state, "best_step": None}, found.config, keep=1)
    for name in DESCRIBING:
        if (recorded.folder / name).is_file():
            shutil.copyfile(recorded.folder / name, folder / name)
    remarks = ["The optimizer's state is left out: training starts from these weights with --init, and does not resume."]
    return remarks + (["The weights are the moving average of the training's."] if "ema" in found.names else [])


def write_whole_card(recorded: RecordedRun, found: Checkpoint, weights: Mapping[str, Tensor], out: str, remarks: list[str]) -> str:
    """The model card of all tasks, in Markdown."""
    model, tasks = recorded.config.model, recorded.config.tasks
    count = sum(tensor.numel() for tensor in weights.values())
    example = next(iter(tasks))
    sections = {
        "Load it": (
            f'```python\nimport polyvit_fast as pf\n\nmodel = pf.load("{out}")\nprint(model.predict("FILE", task="{example}"))\n```\n\n'
            f"Or `polyvit-fast predict {out} FILES --task {example}`, `polyvit-fast eval {out}` where the run's files are, and "
            f"`--init {out}` for a run that starts from it."
        ),
        "Tasks": _tabulate_tasks(tasks, found.state),
        "What differs from the run": "\n".join(f"- {remark}" for remark in remarks),
        "Where it comes from": describe_run(recorded),
    }
    head = "---\nlibrary_name: polyvit-fast\ntags:\n- polyvit-fast\n---\n\n# PolyViT"
    introduction = (
        f"One Vision Transformer for {len(tasks)} tasks on {', '.join(recorded.config.modalities)}: {model.depth} blocks, dim {model.dim}, "
        f"{model.num_heads} heads and {count:,} parameters, after {found.step:,} steps."
    )
    return "\n\n".join([head, introduction, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _tabulate_tasks(tasks: Mapping[str, Task], state: Mapping[str, Any]) -> str:
    """A line for each task, with its metric on the validation files."""
    metrics, classes = state.get("metrics", {}), state.get("classes", {})
    lines = ["| task | modality | classes | metric on validation files |", "|---|---|---|---|"]
    for name, task in tasks.items():
        value = metrics.get(name, {}).get(task.metric)
        names = ", ".join(classes.get(name) or ()) or f"{task.num_classes}, without names"
        lines.append(f"| {name} | {task.modality.name} | {names} | {task.metric} {'not evaluated' if value is None else f'{value:.4f}'} |")
    step, evaluated = state.get("step"), state.get("metrics_step")
    if metrics and evaluated is not None and evaluated != step:
        lines.append(f"\nEvaluated at step {evaluated:,}, not at this checkpoint of step {step:,}.")
    return "\n".join(lines)
