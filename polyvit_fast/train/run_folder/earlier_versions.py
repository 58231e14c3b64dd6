"""Configurations that versions 0.3 to 0.6 stored, in today's form.

A field that a version did not know gets the value by which today's code computes what that version did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyvit_fast.config import ComputeOptions, DataOptions, DistributedOptions, LogOptions
from polyvit_fast.train.run_folder.config_json import to_json

GROUPS = {"data": DataOptions(), "compute": ComputeOptions(), "log": LogOptions(), "distributed": DistributedOptions()}
"""Up to 0.5 their fields were fields of `Train`."""
RENAMED = {"colour_jitter_chance": "colour_jitter_prob", "grey_chance": "grey_prob"}
"""Fields of `Video`, renamed after 0.5."""
TOKENS = {"num_class_tokens": 1, "pool": "cls", "positions": "learned"}
"""Fields of every modality since 0.7."""


def upgrade(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored configuration of any version in today's form. What is not well formed stays as it is."""
    if is_older_than_0_5(config) and isinstance(config.get("tasks"), Mapping):
        config = {**config, "tasks": _with_one_normalisation(config["tasks"])}
    if config.get("type") == "Train" and "data" not in config:
        config = _with_groups(config)
    return _upgrade_record(config)


def is_older_than_0_5(config: Mapping[str, Any]) -> bool:
    """Whether 0.4.1 or an earlier version stored this configuration."""
    return "data" not in config and "changed_files" not in config


def _with_one_normalisation(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Up to 0.4.1, the mean and std of a modality's last task held for all its tasks."""
    modalities = {name: task.get("modality") for name, task in tasks.items() if isinstance(task, Mapping)}
    modalities = {name: modality for name, modality in modalities.items() if isinstance(modality, Mapping)}
    numbers = {str(modality.get("type")): {k: modality[k] for k in ("mean", "std") if k in modality} for modality in modalities.values()}
    return {
        name: {**task, "modality": {**modalities[name], **numbers[str(modalities[name].get("type"))]}} if name in modalities else task
        for name, task in tasks.items()
    }


def _with_groups(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(config)
    for name, options in GROUPS.items():
        group = to_json(options)
        flat[name] = {field: flat.pop(field, default) if field != "type" else default for field, default in group.items()}
    return flat


def _upgrade_record(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    later: dict[str, Any] = {}
    match values.get("type"):
        case "Task":
            later = {"test": None, "mixup_pairs": "neighbours", "zero_head": False, "head_norm": False}
            later |= {"lr_schedule": "run", "warmup_steps": 0, "loss_weight": 1.0, "cutmix": 0.0}
            if isinstance(values.get("modality"), Mapping):
                values = {**values, "modality": {**TOKENS, **values["modality"]}}
        case "Train":
            later = {"init": "", "init_positions": "bilinear", "init_tubelets": "central"}
        case "Model":
            later = {"norm_eps": 1e-6, "last_norm_eps": 0.0}
        case "Optim":
            later = {"clip": "mean", "accumulate": "mean", "absent": "auto" if values.get("name") == "sgd" else "coast"}
            later |= {"freeze": [], "layer_decay": 1.0}
        case "Image":
            later = {"random_erasing_prob": 0.0, "random_erasing_area_ratios": [0.02, 0.4], "random_erasing_aspect_ratio": 0.3}
        case "LogOptions":
            later = {"early_stop_evaluations": 0}
        case "Audio":
            later = {"padding": "auto" if values.get("spectrogram") == "mbt" else "waveform", "patch_stride": 0}
        case "Video":
            values = {RENAMED.get(name, name): value for name, value in values.items()}
        case _:
            pass
    return {name: _upgrade_record(value) for name, value in (later | dict(values)).items()}
