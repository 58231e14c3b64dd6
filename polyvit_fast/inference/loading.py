"""A run folder as a model that can be used: `load`."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from polyvit_fast import experiments
from polyvit_fast.config import Train
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.inference.trained_model import TrainedModel
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.evaluate import Weights, load_weights
from polyvit_fast.train.run_folder.checkpoint import Checkpoint
from polyvit_fast.train.run_folder.locate import locate_run
from polyvit_fast.train.run_folder.record import load_run

Device = Literal["cpu", "cuda", "auto"]

_logger = logging.getLogger(__name__)


def load(
    run: str | os.PathLike[str],
    checkpoint: str | int = "newest",
    *,
    device: Device = "cpu",
    weights: Weights = "auto",
    config: Train | None = None,
) -> TrainedModel:
    """The trained model of a run folder, ready to predict. The files that it was trained on need not exist any more.

    `checkpoint`: newest, best, or the step of one. `device`: auto is cuda where there is a GPU. `weights`: auto are the moving average
    of the weights if the run has one, which are those that it was evaluated with. `config`: the configuration that the run was trained
    with, needed where it was made in Python of classes of your own. Raises ValueError when there is no such run, checkpoint or device.
    """
    folder = locate_run(Path(run))
    _check_word("weights", weights, Weights)
    found, tensors, group = load_weights(folder, str(checkpoint), weights)
    recorded = load_run(folder, found, experiments.load, config, with_sources=False)
    if recorded.remark:
        _logger.warning("%s", recorded.remark)
    settings = move_to(recorded.config, device)
    model = PolyViT.from_config(settings)
    model.load_state_dict(tensors)
    classes = {name: _find_classes(settings, name, found) for name in settings.tasks}
    return TrainedModel(folder, settings, model.to(settings.device).eval(), classes, step=found.step, weights=group)


def _check_word(name: str, value: str, words: Any) -> None:
    allowed = [repr(word) for word in get_args(words)]
    if repr(value) not in allowed:
        raise ValueError(f"{name} = {value!r} is none of {', '.join(allowed[:-1])} and {allowed[-1]}")


def move_to(config: Train, device: Device) -> Train:
    """The configuration on another device, without what only the first one has. Raises ValueError when the device is not there."""
    _check_word("device", device, Device)
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device = cuda: PyTorch finds no NVIDIA GPU here; take device = cpu, or look at what nvidia-smi says")
    if device == "cuda" or (device == "auto" and has_gpu):
        return replace(config, device="cuda")
    compute, data = replace(config.compute, attention="auto"), replace(config.data, decoding="auto")
    return replace(config, device="cpu", compute=compute, data=data)


def _find_classes(config: Train, task: str, found: Checkpoint) -> tuple[str, ...] | None:
    """The names that the checkpoint stores. 0.4.1 and earlier stored none: then those of the task's files, while these are there."""
    stored = found.state.get("classes", {})
    if task in stored:
        return tuple(stored[task]) if stored[task] else None
    try:
        return class_list(config.tasks[task])
    except (ValueError, OSError):
        return None
