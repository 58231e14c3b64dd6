"""The README.md of an exported model: what it does, how well, how to load it, what it was trained on, and by which commands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from polyvit_fast.inference.export.targets import TARGETS, Subject
from polyvit_fast.inference.export.verify import LogitDifference
from polyvit_fast.model.export.graph import describe_layout
from polyvit_fast.train.run_folder.checkpoint import Checkpoint
from polyvit_fast.train.run_folder.record import RecordedRun

SHOWN_CLASSES = 40
SPEED = "examples_per_second"
"""Among the metrics, what is one of the machine's."""


def write_card(
    subject: Subject,
    recorded: RecordedRun,
    found: Checkpoint,
    to: str,
    usage: str,
    remarks: Sequence[str],
    comparison: LogitDifference | str,
) -> str:
    """The model card, in Markdown."""
    sections = {
        "Load it": f"```python\n{usage}\n```",
        "Classes": _describe_classes(subject),
        "Metrics": _describe_metrics(subject.task, found),
        "Input": _describe_input(subject, to),
        "What differs from the run": _describe_differences(subject, to, remarks, comparison),
        "Where it comes from": _describe_origin(subject.task, recorded, found),
    }
    head = f"---\nlibrary_name: {TARGETS[to].library}\ntags:\n- polyvit-fast\n---\n\n# {subject.task}"
    introduction = _introduce(subject, recorded, found)
    return "\n\n".join([head, introduction, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _introduce(subject: Subject, recorded: RecordedRun, found: Checkpoint) -> str:
    model, count = subject.vit.model, sum(tensor.numel() for tensor in subject.weights.state_dict().values())
    others = [name for name in recorded.config.tasks if name != subject.task]
    together = f" It was trained together with {', '.join(others)}, which are not in these files." if others else ""
    average = " The weights are the moving average of the training's." if "ema" in found.names else ""
    return (
        f"A Vision Transformer with {model.depth} blocks, dim {model.dim}, {model.num_heads} heads and {count:,} parameters: the task "
        f"{subject.task} of a PolyViT after {found.step:,} steps.{together}{average}"
    )


def _describe_classes(subject: Subject) -> str:
    vit, sigmoid = subject.vit, subject.vit.loss == "sigmoid"
    probabilities = "sigmoid gives each class's own probability" if sigmoid else "softmax gives probabilities"
    if vit.class_names is None:
        return f"{vit.num_classes} classes, whose names the run does not know. Of the logits, {probabilities}."
    names = ", ".join(vit.class_names[:SHOWN_CLASSES]) + (" …" if vit.num_classes > SHOWN_CLASSES else "")
    return f"{vit.num_classes}, in the order of the logits: {names}. Of the logits, {probabilities}."


def _describe_metrics(task: str, found: Checkpoint) -> str:
    row: Mapping[str, float | None] = found.state.get("metrics", {}).get(task, {})
    if not row:
        return "The run had not been evaluated at this checkpoint."
    lines = [f"| {name} | {'–' if value is None else f'{value:.6g}'} |" for name, value in row.items() if name != SPEED]
    step = found.state.get("metrics_step", found.step)
    when = "at this checkpoint" if step == found.step else f"at step {step:,}, not at this checkpoint of step {found.step:,}"
    return "\n".join([f"On the run's validation files, {when}:", "", "| metric | value |", "|---|---|", *lines])


def _describe_input(subject: Subject, to: str) -> str:
    vit, preprocessing = subject.vit, subject.vit.preprocessing
    mean, std = (_list_numbers(values) for values in vit.grid.normalisation)
    frames, rows, columns, channels = vit.grid.sizes
    lines = [f"{number}. {step}" for number, step in enumerate(preprocessing.steps, 1)]
    if not lines:
        size = f"{frames} frame{'s' * (frames > 1)}, {rows} rows, {columns} columns and {channels} channels"
        lines.append(f"The run's own decoder makes a grid of {size}.")
    inside = "The model does this itself" if to not in ("timm", "hf") else "The model takes the result"
    lines += ["", f"Then the mean {mean} is subtracted, and the rest divided by the std {std}. {inside}."]
    if to in ("torch.export", "onnx"):
        lines.append(f"Its input is called {preprocessing.input_name}: {preprocessing.dtype} {describe_layout(vit)}, any batch.")
    return "\n".join(lines)


def _list_numbers(values: Sequence[float]) -> str:
    """Those of the channels, or the one that they have in common."""
    return f"{values[0]:.8g}" if len(set(values)) == 1 else f"({', '.join(f'{value:.8g}' for value in values)})"


def _describe_differences(subject: Subject, to: str, remarks: Sequence[str], comparison: LogitDifference | str) -> str:
    known = {"hf": subject.vit.preprocessing.hugging_face, "timm": subject.vit.preprocessing.timm}.get(to)
    lines = [*remarks, *(subject.vit.preprocessing.differences if to in ("timm", "hf") else ())]
    if known == {}:
        lines.append("These files describe no preprocessing: the library has none that makes this input.")
    if isinstance(comparison, LogitDifference):
        lines.append(
            f"The logits of {comparison.library} and of the run were compared on random grids: they differ by at most {comparison}."
        )
    else:
        lines.append(f"The logits were not compared with the run's: {comparison}.")
    return "\n".join(f"- {line}" for line in lines)


def describe_run(recorded: RecordedRun) -> str:
    """Which run it was: its experiment, command lines and versions."""
    versions = ", ".join(f"{name} {value}" for name, value in recorded.versions.items() if value)
    commands = "\n".join(recorded.commands) or "(made in Python)"
    init = recorded.config.init
    lines = [f"Run folder `{recorded.folder}`, experiment `{recorded.experiment}`, seed {recorded.config.seed}. Its command lines:"]
    lines += ["", "```", commands, "```", "", f"Versions: {versions}."]
    if init:
        lines.append(f"It began with the weights of {init if isinstance(init, str) else ', '.join(f'{k}={v}' for k, v in init.items())}.")
    return "\n".join(lines)


def _describe_origin(task: str, recorded: RecordedRun, found: Checkpoint) -> str:
    lines = [describe_run(recorded)]
    for split, key in (("Training", "samples"), ("Validation", "validation_samples")):
        if task in found.state.get(key, {}):
            lines.append(f"{split} files: {_shorten(found.state[key][task])}.")
    return "\n".join(lines)


def _shorten(fingerprint: Any) -> str:
    """The fingerprint's number of files and digest of their names, and one digest of their sizes and contents."""
    if isinstance(fingerprint, str):  # of versions before 0.4, which took the names alone
        return fingerprint
    rest = "\n".join(fingerprint[name] for name in ("sizes", "contents"))
    files = fingerprint.get("list") or fingerprint["names"]
    return f"{files} (names and labels), {hashlib.blake2b(rest.encode(), digest_size=16).hexdigest()} (sizes and contents)"
