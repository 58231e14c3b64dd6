"""Taking a run's model away, or one task of it: `export`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch

import polyvit_fast
from polyvit_fast import experiments
from polyvit_fast.config import Train
from polyvit_fast.inference.export.model_card import write_card
from polyvit_fast.inference.export.targets import CONFIG, GRAPHS, TARGETS, WEIGHTS, Subject
from polyvit_fast.inference.export.verify import LogitDifference, compare
from polyvit_fast.inference.export.whole import DESCRIBING, write_whole, write_whole_card
from polyvit_fast.inference.loading import load
from polyvit_fast.model.export.plain import flatten, select_task
from polyvit_fast.train.evaluate import load_weights
from polyvit_fast.train.run_folder.checkpoint import Checkpoint, find_checkpoint
from polyvit_fast.train.run_folder.initial_weights import read_checkpoint
from polyvit_fast.train.run_folder.locate import locate_run
from polyvit_fast.train.run_folder.record import load_run

To = Literal["timm", "hf", "safetensors", "torch.export", "onnx", "polyvit"]
WHOLE = "polyvit"
"""All tasks, for this package."""
MODEL_CARD = "README.md"
CHECKPOINTS = "checkpoints"
WRITTEN = (MODEL_CARD, WEIGHTS, CONFIG, *DESCRIBING, "preprocessor_config.json", *GRAPHS.values(), f"{GRAPHS['onnx']}.data")
"""All files that an export may write. One that overwrites another leaves none of that one's."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    task: str
    """Its name, or "all"."""
    step: int
    """Of the checkpoint."""
    files: tuple[str, ...]
    remarks: tuple[str, ...]
    """What is not as it is in the run, in sentences."""
    comparison: LogitDifference | str
    """Of the logits; or a sentence: why there is none, or what else was compared."""

    def __str__(self) -> str:
        compared = self.comparison
        verdict = (
            f"the logits of {compared.library} differ from the run's by at most {compared}"
            if isinstance(compared, LogitDifference)
            else compared
        )
        files = f"{', '.join(self.files[:-1])} and {self.files[-1]}"
        lines = [
            f"{'all tasks' if self.task == 'all' else f'task {self.task}'}, step {self.step}: wrote {files} in {self.folder}",
            *self.remarks,
            verdict,
        ]
        return "\n".join(lines)


def export(
    run: str | os.PathLike[str],
    to: To,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    checkpoint: str | int = "newest",
    overwrite: bool = False,
    config: Train | None = None,
) -> Exported:
    """Write one task of a run into the folder `out`, as `to` loads it, with a model card, and compare the logits where `to` is installed.

    With `to` = "polyvit" it is all tasks, for `polyvit_fast.load` and `--init`: a run folder with nothing but the weights. `task` may be
    left out where the run has one. `checkpoint`, `config`: as in `polyvit_fast.load`. The weights are the moving average if the run has
    one. Raises ValueError when there is no such run, task or checkpoint, when `out` holds something and `overwrite` is False, or when the
    library has no model that computes the same.
    """
    folder = Path(out)
    if to != WHOLE and to not in TARGETS:
        raise ValueError(f"to = {to!r} is none of {', '.join(map(repr, (*TARGETS, WHOLE)))}")
    _check_folder(folder, overwrite)
    if to == WHOLE:
        if task is not None:
            raise ValueError(f"task = {task!r}: to = {WHOLE!r} takes all tasks; leave the task out")
        return _export_whole(run, folder, str(checkpoint), config)
    model = load(run, checkpoint, config=config)
    found = find_checkpoint(model.folder, str(model.step))
    recorded = load_run(model.folder, found, experiments.load, config, with_sources=False)
    subject = _make_subject(model.find_task(task), model.config, found, str(run))
    target, temporary = TARGETS[to], folder.with_name(f".tmp-{folder.name}-{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        remarks = target.write(subject, temporary)
        comparison = compare(subject, target, temporary, model.model)
        usage = target.usage(subject, temporary, str(folder))
        (temporary / MODEL_CARD).write_text(write_card(subject, recorded, found, to, usage, remarks, comparison))
        files = tuple(sorted(path.name for path in temporary.iterdir()))
        _publish(temporary, folder)
    except ValueError as error:
        raise ValueError(f"task {subject.task} cannot be exported to {to}: {error}") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}; choose another with --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verdict = comparison if isinstance(comparison, LogitDifference) else f"nothing was compared: {comparison}"
    return Exported(folder, subject.task, model.step, files, tuple(remarks), verdict)


def _export_whole(run: str | os.PathLike[str], folder: Path, checkpoint: str, config: Train | None) -> Exported:
    source = locate_run(Path(run))
    found, weights, _ = load_weights(source, checkpoint)
    recorded = load_run(source, found, experiments.load, config, with_sources=False)
    temporary = folder.with_name(f".tmp-{folder.name}-{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        remarks = write_whole(recorded, found, weights, temporary)
        (temporary / MODEL_CARD).write_text(write_whole_card(recorded, found, weights, str(folder), remarks))
        files = tuple(sorted(path.name for path in temporary.iterdir()))
        again = load(temporary, config=config).model.state_dict()
        if different := [name for name in weights if not torch.equal(again[name], weights[name])]:
            raise ValueError(f"{', '.join(different)}: not what was written; is the disk sound?")
        _publish(temporary, folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}; choose another with --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, "all", found.step, files, tuple(remarks), "loaded again, every weight is equal to the run's")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder that is empty, or not there yet")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} is not empty; name another folder, or let its model be replaced with --overwrite")


def _make_subject(task: str, config: Train, found: Checkpoint, run: str) -> Subject:
    record = config.tasks[task]
    weights = select_task(read_checkpoint(found, run), task, record.modality)
    vit = flatten(weights, record.modality, record.loss)
    mean, std = record.modality.normalisation
    origin = {
        "task": task,
        "class_names": vit.class_names,
        "loss": record.loss,
        "mean": mean,
        "std": std,
        "preprocessing": vit.preprocessing.steps,
        "step": found.step,
        "version": polyvit_fast.__version__,
    }
    return Subject(task, weights, vit, origin)


def _publish(temporary: Path, folder: Path) -> None:
    """Give the files their names at once where the folder is new, else one by one; what an earlier export left is deleted."""
    mode = (temporary / MODEL_CARD).stat().st_mode
    for path in temporary.iterdir():
        if path.is_file():
            path.chmod(mode)  # safetensors writes a file that nobody else may read
    if not folder.exists():
        os.rename(temporary, folder)
        return
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
