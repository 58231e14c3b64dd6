"""A configuration as plain JSON, and back.

It is read back onto the experiment's own configuration: classes and functions come from the experiment, numbers and strings from the file.
So nothing in a run folder can name code that is then loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import PurePath
from typing import Any, get_args, get_origin

from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.config.record import field_types
from polyvit_fast.config.values import fit


def to_json(record: Any) -> dict[str, Any]:
    """A configuration, or any frozen dataclass of one, as plain JSON values.

    A dataclass becomes a dict with its class name under "type", as "module:name" if the class is not the package's own; a tuple becomes a
    list, a function "module:qualname" (its code is not stored).
    Raises ValueError for a field that has no JSON form.
    """
    return _encode(record, "")


def from_json(default: Train, values: Mapping[str, Any]) -> Train:
    """`default`, the experiment's own configuration, with every stored value in it.

    Raises ValueError that names the dotted field when one is unknown, missing, of another kind, or refused by its class.
    """
    return _decode_record(default, values, "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Every field in which two stored configurations differ, as "tasks.motion.batch: 32 -> 64"; `ignore` holds dotted names of fields."""
    return _compare(old, new, "", ignore)


def _encode(value: Any, path: str) -> Any:
    if _is_record(value):
        names = _field_names(value)
        if "type" in names:
            raise ValueError(f"{_join(path, 'type')}: a dataclass in a configuration may not have a field named type; rename it")
        return {"type": _type_name(value)} | {name: _encode(getattr(value, name), _join(path, name)) for name in names}
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


def _decode_record(default: Any, values: Any, path: str) -> Any:
    where, expected = path or "the configuration", type(default).__name__
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} = {values!r}: the experiment has a {expected} here")
    if not same_type(values.get("type"), _type_name(default)):
        raise ValueError(f"{where}: the experiment has a {expected} here, the stored configuration {values.get('type')!r}")
    names, kinds = _field_names(default), field_types(type(default))
    _check_names(names, [name for name in values if name != "type"], path)
    new = {name: _decode(getattr(default, name), values[name], kinds[name], _join(path, name)) for name in names}
    try:
        return replace(default, **new)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _decode(default: Any, value: Any, kind: Any, path: str) -> Any:
    """A JSON value as its field has it: `default` gives classes and functions, the field's type says which values fit."""
    if value is None and default is None:
        return None
    if _is_record(default):
        return _decode_record(default, value, path)
    if isinstance(default, dict) and isinstance(value, Mapping) and any(map(_is_record, default.values())):
        _check_names(list(default), list(value), path)
        return {key: _decode(default[key], item, Any, _join(path, key)) for key, item in value.items()}
    if callable(default) or (_takes_function(kind) and ":" in str(value)):
        return _decode_function(default, value, path)
    if isinstance(value, Mapping) and "type" in value:
        raise ValueError(f"{path} = {value!r} does not fit the experiment, which has {default!r} here")
    if isinstance(value, list):
        # The stored sequence may be longer; the default's last element then stands for the further ones.
        items = [_decode(default[min(i, len(default) - 1)], v, Any, _join(path, i)) if default else v for i, v in enumerate(value)]
        value = items if isinstance(default, list) else tuple(items)
    return fit(float(value) if isinstance(default, float) and type(value) is int else value, kind, path)


def _decode_function(default: Any, value: Any, path: str) -> Any:
    # The module's name depends on the path of the experiment file, so the function's own name decides.
    if callable(default) and str(value).partition(":")[2] == _function_name(default).partition(":")[2]:
        return default
    if isinstance(value, str) and (":" not in value or value == default):
        return value
    raise ValueError(f"{path}: the run used the function {value}; the experiment has {_encode(default, path)} here")


def _type_name(record: Any) -> str:
    kind = type(record)
    return kind.__name__ if kind.__module__.startswith("polyvit_fast.") else f"{kind.__module__}:{kind.__name__}"


def same_type(stored: Any, now: Any) -> bool:
    """Whether two names of classes mean one: a module may have moved, and before 0.8 nothing said whether a class was a user's own."""
    (module, _, name), (other_module, _, other) = (str(one).rpartition(":") for one in (stored, now))
    return name == other and (bool(other_module) or not module)


def _compare(old: Any, new: Any, path: str, ignore: Collection[str]) -> list[str]:
    if path in ignore:
        return []
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        same = old == new and isinstance(old, bool) == isinstance(new, bool)
        return [] if same else [f"{path}: {_describe(old)} -> {_describe(new)}"]
    types = old.get("type"), new.get("type")
    are_records = all(isinstance(name, str) for name in types)
    if are_records and not same_type(*types):
        return [f"{path}: {types[0]} -> {types[1]}"]
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        if are_records and key == "type":
            continue
        found += _compare(old.get(key, _ABSENT), new.get(key, _ABSENT), _join(path, key), ignore)
    # The order of a dataclass's fields means nothing; that of the tasks decides the step plan.
    if not are_records and old.keys() == new.keys() and list(old) != list(new):
        found.append(f"{path}: order {', '.join(old)} -> {', '.join(new)}")
    return found


def _describe(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return str(value.get("type", "a dict")) if isinstance(value, Mapping) else strict_json.dumps(value)


_ABSENT = object()


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _field_names(record: Any) -> list[str]:
    return [field.name for field in fields(record) if field.init]


def _takes_function(kind: Any) -> bool:
    return any(get_origin(one) is Callable for one in (kind, *get_args(kind)))


def _function_name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _check_names(expected: Sequence[str], found: Sequence[str], path: str) -> None:
    for name in [*found, *expected]:
        if name not in expected:
            raise ValueError(f"{_join(path, name)}: the stored configuration has it, the experiment does not")
        if name not in found:
            raise ValueError(f"{_join(path, name)}: the experiment has it, the stored configuration does not")


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
