"""Configurations that earlier versions stored, in today's form.

A field that a version did not know gets the value by which today's code computes what that version did. Since 0.8 every stored file says
its schema; what has none is of 0.3 to 0.7, and is recognised by its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polyvit_fast

ADDED: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "Train": {"init": "", "init_positions": "bilinear", "init_tubelets": "central"},
        "Task": {
            "test": None,
            "mixup_pairs": "neighbours",
            "zero_head": False,
            "head_norm": False,
            "lr_schedule": "run",
            "warmup_steps": 0,
            "loss_weight": 1.0,
            "cutmix": 0.0,
        },
        "Model": {"norm_eps": 1e-6, "last_norm_eps": 0.0},
        "Optim": {"clip": "mean", "accumulate": "mean", "freeze": [], "layer_decay": 1.0},
        "DataOptions": {"changed_files": "refuse"},
        "ComputeOptions": {"attention": "auto", "residual": "fp32"},
        "LogOptions": {"early_stop_evaluations": 0},
        "Image": {"random_erasing_prob": 0.0, "random_erasing_area_ratios": [0.02, 0.4], "random_erasing_aspect_ratio": 0.3},
        "Audio": {"patch_stride": 0},
    },
}
"""The fields that each schema has brought, by their classes, with the values by which nothing changes."""
SCHEMA = max(ADDED)
"""Of what this version stores."""
EVERY_MODALITY = {"num_class_tokens": 1, "pool": "cls", "positions": "learned"}
"""Fields that schema 1 has brought to all modalities, a user's own too."""
GROUPS = {
    "data": ("DataOptions", "decoding", "num_threads", "prefetch", "decode_timeout_seconds", "max_bad_ratio", "changed_files"),
    "compute": ("ComputeOptions", "residual", "attention", "capture", "recompute", "compute_threads", "nonfinite_patience"),
    "log": ("LogOptions", "log_every_steps", "eval_every_steps", "save_every_steps", "keep"),
    "distributed": ("DistributedOptions", "sharded", "grad_reduce"),
}
"""The class and the fields of each group; up to 0.5 these were fields of `Train`."""
RENAMED = {"colour_jitter_chance": "colour_jitter_prob", "grey_chance": "grey_prob"}
"""Fields of `Video`, renamed after 0.5."""


class LaterVersionError(ValueError):
    """A file that a later version of this package has written."""


def stamp() -> dict[str, Any]:
    """What every stored file says of its form."""
    return {"schema": SCHEMA, "version": polyvit_fast.__version__}


def check_schema(values: Mapping[str, Any], path: Path) -> None:
    """Raise LaterVersionError when a later version has written the file of which these are the values."""
    if values.get("schema", 0) > SCHEMA:
        raise LaterVersionError(
            f"{path} was written by polyvit-fast {values.get('version')}, whose files this version, {polyvit_fast.__version__}, does not "
            "know; upgrade: pip install --upgrade polyvit-fast"
        )


def upgrade(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored configuration of any version in today's form, without its stamp. What is not well formed stays as it is."""
    schema, config = config.get("schema", 0), {name: value for name, value in config.items() if name not in stamp()}
    if not schema:
        if is_older_than_0_5(config) and isinstance(config.get("tasks"), Mapping):
            config = {**config, "tasks": _with_one_normalisation(config["tasks"])}
        if config.get("type") == "Train" and "data" not in config:
            config = _with_groups(config)
    return _upgrade_record(config, schema)


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
    for group, (kind, *names) in GROUPS.items():
        flat[group] = {"type": kind, **{name: flat.pop(name) for name in names if name in flat}}
    return flat


def _upgrade_record(values: Any, schema: int) -> Any:
    if isinstance(values, list):
        return [_upgrade_record(value, schema) for value in values]
    if not isinstance(values, Mapping):
        return values
    values, kind = dict(values), values.get("type")
    if not schema:
        values = _upgrade_from_0_7(values)
    for number in range(schema + 1, SCHEMA + 1):
        values = ADDED[number].get(str(kind), {}) | values
    return {name: _upgrade_record(value, schema) for name, value in values.items()}


def _upgrade_from_0_7(values: dict[str, Any]) -> dict[str, Any]:
    """What depends on other values of the record."""
    match values.get("type"):
        case "Task" if isinstance(values.get("modality"), Mapping):
            return {**values, "modality": {**EVERY_MODALITY, **values["modality"]}}
        case "Optim":
            return {"absent": "auto" if values.get("name") == "sgd" else "coast", **values}
        case "Audio":
            return {"padding": "auto" if values.get("spectrogram") == "mbt" else "waveform", **values}
        case "Video":
            return {RENAMED.get(name, name): value for name, value in values.items()}
        case _:
            return values
