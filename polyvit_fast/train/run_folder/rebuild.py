"""A configuration made in Python, rebuilt from its JSON alone: possible where all its records are classes of this package.

A run folder names a class; which class that is stands here, so it can still name no code that is then loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyvit_fast import config, data
from polyvit_fast.config import Train
from polyvit_fast.train.run_folder.config_json import from_json

RECORDS: dict[str, type] = {
    name: record
    for module in (config, data)
    for name in module.__all__
    if isinstance(record := getattr(module, name), type) and hasattr(record, "__dataclass_fields__")
}
"""The records of the package by their names, which no two classes have in common."""
ADVICE = "give the configuration that the run was trained with: polyvit_fast.load(run, config=config)"


def rebuild(values: Mapping[str, Any]) -> Train:
    """The configuration of which `config_json.to_json` gave these values.

    Raises ValueError that names the dotted field when it holds a class or function that is not the package's own, or a wrong value.
    """
    built = _build(values, "")
    if not isinstance(built, Train):
        raise ValueError("the configuration is no Train")
    return from_json(built, values)  # which checks the values against the fields' types


def _build(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return tuple(_build(item, f"{path}.{number}") for number, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get("type"), str):
        return {key: _build(item, f"{path}.{key}" if path else key) for key, item in value.items()}
    kind = RECORDS.get(value["type"])
    if kind is None:
        raise ValueError(f"{path}: {value['type']} is no class of polyvit_fast; {ADVICE}")
    if ":" in str(value.get("schedule", "")):
        raise ValueError(f"schedule: {value['schedule']} is a function of your own; {ADVICE}")
    fields = {key: _build(item, f"{path}.{key}" if path else key) for key, item in value.items() if key != "type"}
    try:
        return kind(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path or 'the configuration'}: {error}") from error
