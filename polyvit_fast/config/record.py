"""What all frozen dataclasses of a configuration have in common: `Record`, whose fields hold values of their own types."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any, get_type_hints

from polyvit_fast.config.values import MisfitError, fit
from polyvit_fast.config.words import show

LACKS = {"[": "not be negative", "(": "be positive"}
"""What a number below an interval that begins at 0 must do."""


class Record:
    """Base of all dataclasses of a configuration. When `__post_init__` runs, every field holds a value of its own type.

    It comes from an experiment file, a flag, `dataclasses.replace` or stored JSON: all make a record, and so all are checked here, for
    classes of your own too. Values are written in the type of their field (`values.fit`), and a wrong one raises ValueError.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """A class with a `__post_init__` of its own need not call this one for its fields to be checked."""
        super().__init_subclass__(**options)
        own: Callable[[Record], None] | None = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def check_all(self: Record) -> None:
            _fit_fields(self)
            own(self)

        cls.__post_init__ = check_all

    def __post_init__(self) -> None:
        _fit_fields(self)

    @classmethod
    def suggest(cls, value: object) -> str:
        """What to write where a `value` stands that is no such record."""
        return f"write {cls.__name__}(…)"


class ConfigError(ValueError):
    """A value that a field cannot have. The message begins with the field's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_range(record: object, interval: str, *names: str) -> None:
    """Raise ConfigError when a number in these fields, or in a tuple in one, is outside an interval such as "[0, 1)" or "[1, inf)"."""
    low, high = (int(bound) if bound.strip("- ").isdigit() else float(bound) for bound in interval[1:-1].split(","))
    for name in names:
        value = getattr(record, name)
        for index, number in enumerate(value) if isinstance(value, tuple) else ((None, value),):
            above = number >= low if interval[0] == "[" else number > low
            below = number <= high if interval[-1] == "]" else number < high
            if not (above and below):
                where = name if index is None else f"{name}[{index}]"
                if high <= 1:
                    raise ConfigError(name, f"{where} = {show(number)} must be in {interval}")
                bound = f"at most {high:,}" if above else f"at least {low:,}" if low else ""
                raise ConfigError(name, f"{where} = {show(number)} must {f'be {bound}' if bound else LACKS[interval[0]]}")


def field_types(record: type) -> dict[str, Any]:
    """The types of a dataclass's fields. A type that cannot be evaluated, as it names what only a type checker sees, is Any."""
    return dict(_field_types(record))


@cache
def _field_types(record: type) -> dict[str, Any]:
    return {field.name: _find_type(record, field.name) for field in fields(record)}


def _find_type(record: type, name: str) -> Any:
    owner = next(base for base in record.__mro__ if name in inspect.get_annotations(base))
    annotations = SimpleNamespace(__annotations__={name: inspect.get_annotations(owner)[name]})
    module = sys.modules.get(owner.__module__)
    try:
        return get_type_hints(annotations, vars(module) if module else {}, dict(vars(owner)))[name]
    except Exception:  # what an annotation may raise has no bounds
        return Any


def _fit_fields(record: Any) -> None:
    """Write every field's value in the field's type. Raises ConfigError."""
    types = _field_types(type(record))
    for field in fields(record):
        value = getattr(record, field.name)
        try:
            fitted = fit(value, types[field.name], field.name)
        except MisfitError as error:
            if value is field.default is not MISSING:  # `limit: int = None` is what its author wanted
                continue
            raise ConfigError(field.name, str(error)) from None
        if fitted is not value:
            object.__setattr__(record, field.name, fitted)
