"""What a run folder says of its run: the experiment, its configuration, the command line, the versions of everything.

A configuration is stored as plain JSON and read back onto the experiment's own record, so that no code is ever loaded from a run folder's
data: classes and functions come from the experiment, numbers and words from the file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import polyvit_fast
from polyvit_fast import strict_json
from polyvit_fast.config import ComputeOptions, DataOptions, DistributedOptions, LogOptions, Train

GROUPS = {"data": DataOptions, "compute": ComputeOptions, "log": LogOptions, "distributed": DistributedOptions}

MAY_CHANGE = frozenset(
    {
        *("out", "resume", "log.log_every_steps", "log.eval_every_steps", "log.save_every_steps", "log.keep"),
        *("data.num_threads", "data.prefetch", "data.decode_timeout_seconds", "data.max_bad_ratio", "data.changed_files"),
        *("compute.nonfinite_patience", "compute.capture", "compute.recompute", "distributed.sharded"),
    }
)
"""Fields of `Train` in which a run and its resumption may differ, because no number of the training depends on them."""


def to_json(train: Train) -> dict[str, Any]:
    """The whole configuration as plain JSON values.

    A record becomes a dict with its class name under "type", a tuple a list, a function "module:qualname" (its code is not recorded).
    Raises ValueError for a field that has no JSON form.
    """
    return _encode(train, "")


def _encode(value: Any, path: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        names = _field_names(value)
        if "type" in names:
            raise ValueError(f"{_join(path, 'type')}: a record may not have a field named type; rename it")
        return {"type": type(value).__name__} | {name: _encode(getattr(value, name), _join(path, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _encode(item, _join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, _join(path, i)) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} = {value} has no JSON form; use a finite number or None")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if callable(value):
        return _function_name(value)
    raise ValueError(f"{path} = {value!r} has no JSON form; use numbers, text, tuples, dicts or frozen dataclasses")


def from_json(default: Train, values: Mapping[str, Any]) -> Train:
    """`default`, the experiment's own configuration, with every stored value put onto it.

    Fields that an earlier version did not know say what it did. Raises ValueError that names the dotted field when one is unknown, missing,
    of another kind, or refused by its record.
    """
    return _decode_record(default, _with_later_fields(values), "")


def _with_later_fields(values: Any) -> Any:
    """A stored configuration of an earlier version with the fields that came since, which say what that version did."""
    if not isinstance(values, Mapping):
        return values
    match values.get("type"):
        case "Train":
            tasks = values.get("tasks")
            if is_of_earlier_version(values) and isinstance(tasks, Mapping):
                values = {**values, "tasks": _with_one_normalisation(tasks)}
            values = _in_groups(dict(values))
        case "Task":
            values = {"mixup_pairs": "neighbours", "zero_head": False} | dict(values)
        case "Optim":
            absent = "auto" if values.get("name") == "sgd" else "coast"
            values = {"clip": "mean", "accumulate": "mean", "absent": absent} | dict(values)
        case "Audio":
            values = {"padding": "auto" if values.get("spectrogram") == "mbt" else "waveform"} | dict(values)
        case _:
            pass
    return {name: _with_later_fields(value) for name, value in values.items()}


def is_of_earlier_version(values: Mapping[str, Any]) -> bool:
    """Whether 0.4.1 or an earlier version wrote this stored configuration."""
    return "changed_files" not in values and "data" not in values


def _in_groups(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that versions before 0.6 kept side by side, in their groups, with the defaults of later fields."""
    if "data" in values:
        return values
    for group, kind in GROUPS.items():
        later = {field.name: _encode(field.default, field.name) for field in fields(kind)}
        values[group] = {"type": kind.__name__} | {name: values.pop(name, default) for name, default in later.items()}
    return values


def _with_one_normalisation(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Those versions normalised all tasks of a modality by the numbers of the last one."""
    numbers: dict[str, dict[str, Any]] = {}
    for task in tasks.values():
        modality = task.get("modality") if isinstance(task, Mapping) else None
        if isinstance(modality, Mapping):
            numbers[str(modality.get("type"))] = {name: modality[name] for name in ("mean", "std") if name in modality}
    return {
        name: {**task, "modality": {**task["modality"], **numbers[str(task["modality"].get("type"))]}}
        if isinstance(task, Mapping) and isinstance(task.get("modality"), Mapping)
        else task
        for name, task in tasks.items()
    }


def _decode_record(default: Any, values: Any, path: str) -> Any:
    where, expected = path or "the configuration", type(default).__name__
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} = {values!r}: the experiment has a {expected} here")
    if values.get("type") != expected:
        raise ValueError(f"{where}: the experiment has a {expected} here, the stored configuration {values.get('type')!r}")
    names, hints = _field_names(default), _hints(type(default))
    _check_names(names, [name for name in values if name != "type"], path)
    new = {name: _decode(getattr(default, name), values[name], hints.get(name, Any), _join(path, name)) for name in names}
    try:
        return replace(default, **new)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _decode(default: Any, value: Any, hint: Any, path: str) -> Any:
    if value is None and (default is None or _fits(None, hint)):
        return None
    if is_dataclass(default) and not isinstance(default, type):
        return _decode_record(default, value, path)
    if isinstance(default, dict) and isinstance(value, Mapping):
        _check_names(list(default), list(value), path)
        return {key: _decode(default[key], item, Any, _join(path, key)) for key, item in value.items()}
    if callable(default) or (_takes_function(hint) and ":" in str(value)):
        return _decode_function(default, value, path)
    if not _fits(value, hint) or (isinstance(value, Mapping) and "type" in value):
        raise ValueError(f"{path} = {value!r} does not fit the experiment, which has {default!r} here")
    if isinstance(default, list | tuple) and isinstance(value, list):
        # A sequence may have grown; its last element then stands for the kind of the new ones.
        items = [_decode(default[min(i, len(default) - 1)], v, Any, _join(path, i)) if default else v for i, v in enumerate(value)]
        return type(default)(items)
    if isinstance(default, PurePath):
        return type(default)(str(value))
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _decode_function(default: Any, value: Any, path: str) -> Any:
    # The module's name depends on where the experiment file lies, so the function's own name decides.
    if callable(default) and str(value).partition(":")[2] == _function_name(default).partition(":")[2]:
        return default
    if isinstance(value, str) and ":" not in value:
        return value
    raise ValueError(f"{path}: the run used the function {value}; the experiment has {_encode(default, path)} here")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value may stand where a field has this type; True where the type says nothing about JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, list) else args
        return isinstance(value, list) and len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return isinstance(value, str)
    return type(value) is hint if hint in (bool, int, str, NoneType) else value is not None or hint is Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every field in which two stored configurations differ, as "tasks.motion.batch: 32 -> 64"."""
    return _differences(old, new, "")


def resume_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences that forbid to resume: all but those of the fields in `MAY_CHANGE`."""
    return differences(*(_without(config, MAY_CHANGE, "") for config in (_with_later_fields(old), new)))


def _without(values: Any, names: Collection[str], path: str) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {name: _without(value, names, _join(path, name)) for name, value in values.items() if _join(path, name) not in names}


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        same = old == new and isinstance(old, bool) == isinstance(new, bool)
        return [] if same else [f"{path}: {_brief(old)} -> {_brief(new)}"]
    types = old.get("type"), new.get("type")
    if all(isinstance(name, str) for name in types) and types[0] != types[1]:
        return [f"{path}: {types[0]} -> {types[1]}"]
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        found += _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), _join(path, key))
    # The order of a record's fields means nothing; that of the tasks decides the plan.
    if not isinstance(types[0], str) and old.keys() == new.keys() and list(old) != list(new):
        found.append(f"{path}: order {', '.join(old)} -> {', '.join(new)}")
    return found


def _brief(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return str(value.get("type", "a dict")) if isinstance(value, Mapping) else strict_json.dumps(value)


_ABSENT = object()


@dataclass(frozen=True)
class RecordedRun:
    """A run folder, read back."""

    folder: Path
    experiment: str
    """As the command line named it: a name or the path of a file."""
    config: Train
    commands: list[str]
    """The command lines that worked on this folder, oldest first."""
    versions: dict[str, Any]
    """Of Python, the libraries and this package, at the last start."""


def describe_run(folder: Path, experiment: str, argv: Sequence[str], config: Train) -> None:
    """Write config.json, command.txt, versions.json and, when the experiment is a user's file, a copy of it: experiment.py.

    A resumed run adds its command line to the earlier ones. Raises ValueError when the folder cannot be written.
    """
    content = {"experiment": experiment, "config": to_json(config)}
    commands = folder / "command.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = commands.read_text() if commands.is_file() else ""
        if experiment.endswith(".py"):
            _write(folder / "experiment.py", Path(experiment).read_text())
        _write(commands, f"{earlier}{shlex.join(argv)}\n")
        _write(folder / "versions.json", strict_json.dumps(_versions(), indent=2) + "\n")
        _write(folder / "config.json", strict_json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror or error}; choose another with --out") from error


def record_classes(folder: Path, names: Mapping[str, Sequence[str] | None]) -> None:
    """Write classes.json: for each task the names of its classes in the order of their numbers, null where it knows none."""
    try:
        _write(folder / "classes.json", strict_json.dumps(dict(names), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror or error}; choose another with --out") from error


def load_run(folder: Path, load: Callable[[str], Train]) -> RecordedRun:
    """What `describe_run` wrote; `load` gives an experiment's configuration by its name or file, the run's own copy of it if need be.

    Raises ValueError when `folder` is not a run folder, a file of it is broken, or the experiment has changed too much.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.json (polyvit-fast train makes one, under runs/ unless --out)")
    content, versions = _read_json(folder / "config.json"), _read_json(folder / "versions.json")
    experiment, values = content.get("experiment"), content.get("config")
    if not isinstance(experiment, str) or not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} does not describe a run: it needs the fields experiment and config")
    try:
        config = from_json(load(_unchanged(folder, experiment)), values)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} does not fit its experiment {experiment}: {error}") from error
    commands = folder / "command.txt"
    return RecordedRun(folder, experiment, config, commands.read_text().splitlines() if commands.is_file() else [], versions)


def _unchanged(folder: Path, experiment: str) -> str:
    """The user's experiment file where it was when it is still the same, for it may look beside itself; else the run's copy."""
    copy = folder / "experiment.py"
    if not copy.is_file():
        return experiment
    original = Path(experiment)
    return experiment if original.is_file() and original.read_bytes() == copy.read_bytes() else str(copy)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a whole run folder: {path.name} is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is broken: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: it holds no JSON object")
    return content


def _write(path: Path, text: str) -> None:
    """Put `text` at `path` so that a reader finds the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _versions() -> dict[str, Any]:
    packages = {"torch": "torch", "dali": "nvidia-dali-cuda130", "numpy": "numpy", "av": "av"}
    return {
        "polyvit_fast": polyvit_fast.__version__,
        "commit": _commit(Path(polyvit_fast.__file__).resolve().parents[1]),
        "python": platform.python_version(),
        **{name: _package_version(package) for name, package in packages.items()},
        "platform": platform.platform(),
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit of a checkout, with "-dirty" when tracked files differ from it; None for installed code or without git."""
    # An installed package may lie inside somebody else's repository, whose commit says nothing about our code.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _field_names(record: Any) -> list[str]:
    return [field.name for field in fields(record) if field.init]


def _hints(record: type) -> dict[str, Any]:
    try:
        return get_type_hints(record)
    except NameError:  # a user's record may be annotated with names that only a type checker sees
        return {}


def _takes_function(hint: Any) -> bool:
    return any(get_origin(kind) is Callable for kind in (hint, *get_args(hint)))


def _function_name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _check_names(expected: list[str], found: list[str], path: str) -> None:
    for name in found:
        if name not in expected:
            raise ValueError(f"{_join(path, name)}: the stored configuration has it, the experiment does not")
    for name in expected:
        if name not in found:
            raise ValueError(f"{_join(path, name)}: the experiment has it, the stored configuration does not")


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
