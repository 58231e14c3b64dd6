"""One value in the type of its field, as it stands in an experiment file, on a command line or in JSON: `fit`."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from polyvit_fast.config.words import describe, show, strip, suggest_word


class MisfitError(ValueError):
    """A value that no field of this type can have. The message begins with the field's name."""


def fit(value: Any, kind: Any, name: str) -> Any:
    """The value as a field of this type holds it: the same object wherever that is one already.

    A path becomes text where text is wanted, an int a float, a list a tuple, a number of NumPy one of Python. Nothing else is changed: 30.0
    is no int, 1 no bool, and no float is infinite. Types that say nothing about a single value fit everything. Raises MisfitError.
    """
    if type(value) is kind and (kind in (bool, int) or (kind is float and math.isfinite(value))):
        return value  # most are
    kind = strip(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _fit_union(value, get_args(kind), name)
    if origin is Literal:
        return _fit_word(value, get_args(kind), name)
    if origin is tuple:
        return _fit_tuple(value, kind, name)
    if origin is dict:
        return _fit_dict(value, kind, name)
    if origin is not None and origin is not Callable and isinstance(origin, type):
        kind = origin  # of list[int] and the like, the list
    simple = SIMPLE.get(kind) if isinstance(kind, type) else None
    if simple:
        return value if type(value) is kind is bool else simple(value, name)
    if kind is Callable or origin is Callable:
        if not callable(value):
            raise _misfit(value, Callable, name)
        return value
    if isinstance(kind, type) and issubclass(kind, PurePath) and isinstance(value, str):
        return kind(value)
    return _check_class(value, kind, name)


def _misfit(value: object, kind: Any, name: str, advice: str = "") -> MisfitError:
    return MisfitError(f"{name} = {show(value)} must be {describe(kind)}{advice}")


def _fit_bool(value: Any, name: str) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    known = isinstance(value, numbers.Number) and value in (0, 1)
    raise MisfitError(f"{name} = {show(value)} must be True or False{f': write {bool(value)}' if known else ''}")


def _fit_int(value: Any, name: str) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    _refuse_text(value, name, int, "a whole number")
    is_whole = isinstance(value, float | np.floating) and float(value).is_integer()
    raise _misfit(value, int, name, f": write {int(value)}" if is_whole else "")


def _fit_float(value: Any, name: str) -> float:
    _refuse_text(value, name, float, "a number")
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise _misfit(value, float, name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MisfitError(f"{name} = {show(value)} must be a finite number")
    return number


def _refuse_text(value: Any, name: str, kind: type[int] | type[float], wanted: str) -> None:
    """Raise MisfitError for a text, which may be a number in quotes."""
    if isinstance(value, str):
        try:
            is_number = math.isfinite(kind(value))
        except ValueError:
            is_number = False
        advice = f": write {value.strip()}" if is_number else f", and must be {wanted}"
        raise MisfitError(f"{name} = {show(value)} is text{advice}")


def _fit_text(value: Any, name: str) -> str:
    text = os.fsdecode(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _misfit(value, str, name, f': write "{value}"' if isinstance(value, int | float) else "")
    if "\0" in text:
        raise MisfitError(f"{name} = {show(text)} holds a NUL character, which no path or name does")
    return text if type(text) is str else str.__str__(text)


SIMPLE: dict[type, Callable[[Any, str], Any]] = {bool: _fit_bool, int: _fit_int, float: _fit_float, str: _fit_text}


def _fit_word(value: Any, words: tuple[Any, ...], name: str) -> Any:
    own = operator.index(value) if isinstance(value, np.integer) else value
    for word in words:
        if type(own) is type(word) and own == word:
            return own
    alike = next((word for word in words if isinstance(value, int | float) and not isinstance(value, bool) and word == value), None)
    advice = f": write {show(alike)}" if alike is not None else suggest_word(value, words)
    raise MisfitError(f"{name} = {show(value)} must be {describe(Literal[words])}{advice}")


def _fit_tuple(value: Any, kind: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        texts = isinstance(value, str | os.PathLike) and get_args(kind)[:1] == (str,)
        raise _misfit(value, kind, name, f": write ({show(os.fspath(value))},)" if texts else "")
    kinds = get_args(kind)
    if kinds[-1:] == (Ellipsis,):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _misfit(value, kind, name, f", and not {len(value)}")
    fitted = tuple(fit(item, one, f"{name}[{i}]") for i, (item, one) in enumerate(zip(value, kinds, strict=True)))
    if isinstance(value, tuple) and all(new is old for new, old in zip(fitted, value, strict=True)):
        return value
    return fitted


def _fit_dict(value: Any, kind: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _misfit(value, kind, name)
    of_key, of_item = get_args(kind)
    fitted = {}
    for key, item in value.items():
        try:
            new = fit(key, of_key, name)
        except MisfitError:
            raise MisfitError(f"{name} has the key {show(key)}, which must be {describe(of_key)}") from None
        fitted[new] = fit(item, of_item, f"{name}[{show(key)}]")
    same = all(new is old for pair in zip(fitted.items(), value.items(), strict=True) for new, old in zip(*pair, strict=True))
    return value if same else fitted


def _fit_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """The value in the type that it has already, else in the first that it can be written in."""
    found: list[Any] = []
    errors: list[MisfitError] = []
    for kind in kinds:
        try:
            fitted = fit(value, kind, name)
        except MisfitError as error:
            if strip(kind) is not NoneType:
                errors.append(error)
        else:
            if fitted is value:
                return value
            found.append(fitted)
    if found:
        return found[0]
    if len(errors) == 1:
        raise errors[0]
    words = tuple(word for kind in kinds if get_origin(strip(kind)) is Literal for word in get_args(strip(kind)))
    raise MisfitError(f"{name} = {show(value)} must be {' or '.join(map(describe, kinds))}{suggest_word(value, words)}")


def _check_class(value: Any, kind: Any, name: str) -> Any:
    try:
        fits = not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:  # a protocol or a typed dict, which is no question of classes
        fits = True
    if fits:
        return value
    if isinstance(value, type) and issubclass(value, kind):
        required = any(field.default is field.default_factory is MISSING for field in fields(value)) if is_dataclass(value) else False
        raise MisfitError(f"{name} = {show(value)}: write {value.__name__}({'…' * required}), with brackets")
    suggest = getattr(kind, "suggest", None)
    raise _misfit(value, kind, name, f": {suggest(value)}" if suggest else "")
