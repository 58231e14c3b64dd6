"""A configuration rebuilt from its JSON alone: possible where what it is needed for are classes of this package.

A run folder names a class; which class that is stands here, so it can still name no code that is then loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyvit_fast import config, data
from polyvit_fast.config import Source, Task, Train
from polyvit_fast.media import Sample
from polyvit_fast.train.run_folder.config_json import from_json

RECORDS: dict[str, type] = {
    name: record
    for module in (config, data)
    for name in module.__all__
    if isinstance(record := getattr(module, name), type) and hasattr(record, "__dataclass_fields__")
}
"""The records of the package by their names, which no two classes have in common."""
SOURCES = ("train", "val", "test")
"""The fields of a task that only its data needs."""


class OwnClassError(ValueError):
    """A configuration holds a class that is not the package's own."""


@dataclass(frozen=True, kw_only=True)
class UnknownSource(Source):
    """Stands for a source of a user's own class where nothing is read from it."""

    kind: str
    """Its class."""

    def samples(self, task: Task) -> Sequence[Sample]:
        """Raises ValueError."""
        raise ValueError(f"its files are listed by the class {self.kind}, which only the run's experiment has")


def rebuild(values: Mapping[str, Any], own: Collection[str] = (), *, with_sources: bool = True) -> Train:
    """The configuration of which `config_json.to_json` gave these values; a schedule that is a function remains its name.

    `own`: names of classes that are a user's although the package has such names too. Without sources, those of a user's own class are
    UnknownSource. Raises OwnClassError that names the dotted field where the package lacks a class, other ValueErrors for wrong values.
    """
    known = {name: record for name, record in RECORDS.items() if name not in own}
    values = values if with_sources else _without_own_sources(values, known)
    built = _build(values, "", known)
    if not isinstance(built, Train):
        raise ValueError("the configuration is no Train")
    return from_json(built, values)  # which checks the values against the fields' types


def _without_own_sources(values: Mapping[str, Any], known: Mapping[str, type]) -> Mapping[str, Any]:
    tasks = values.get("tasks")
    if not isinstance(tasks, Mapping):
        return values

    def replace_source(source: Any) -> Any:
        kind = source.get("type") if isinstance(source, Mapping) else None
        return source if kind is None or kind in known else {"type": UnknownSource.__name__, "kind": str(kind)}

    def replace_sources(task: Any) -> Any:
        if not isinstance(task, Mapping):
            return task
        return {name: replace_source(value) if name in SOURCES else value for name, value in task.items()}

    return {**values, "tasks": {name: replace_sources(task) for name, task in tasks.items()}}


def _build(value: Any, path: str, known: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_build(item, f"{path}.{number}", known) for number, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get("type"), str):
        return {key: _build(item, f"{path}.{key}" if path else key, known) for key, item in value.items()}
    kind = UnknownSource if value["type"] == UnknownSource.__name__ else known.get(value["type"])
    if kind is None:
        raise OwnClassError(f"{path}: {value['type'].rpartition(':')[2]} is no class of polyvit_fast")
    fields = {key: _build(item, f"{path}.{key}" if path else key, known) for key, item in value.items() if key != "type"}
    try:
        return kind(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path or 'the configuration'}: {error}") from error
