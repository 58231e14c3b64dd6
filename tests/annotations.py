"""How annotations are checked in tests: as type checkers read them, a whole number will do where a float is wanted.

jaxtyping's hook puts `jaxtyping.jaxtyped` around each function. Alone, that binds every call's arguments to a signature, checks them twice,
and took a quarter of the time of these tests; here it is left to functions whose annotations name arrays, and checks these once.
"""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from inspect import isgeneratorfunction
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[tuple, Callable] = {}


def check(function: Callable) -> Callable:
    """`function`, a signature that jaxtyping gives a body of its own, with checks of what its annotations say.

    A function within another one is defined anew at each call of that one; its checks, which take a millisecond to make, are made once.
    """
    if "<locals>" not in function.__qualname__:
        return _check(function)
    key = (function.__module__, function.__qualname__, function.__code__, str(function.__annotations__))
    if key not in _checked:
        _checked[key] = _check(function)
    return _checked[key]


def _jaxtyped(decorated=None, *, typechecker, by_jaxtyping=jaxtyping.jaxtyped):
    if decorated is None:
        return partial(_jaxtyped, typechecker=typechecker)
    if isinstance(decorated, type):
        if is_dataclass(decorated):
            decorated.__init__ = _jaxtyped(decorated.__init__, typechecker=typechecker)
        return decorated
    if not isinstance(decorated, FunctionType) or isgeneratorfunction(decorated) or "<locals>" in decorated.__qualname__:
        return by_jaxtyping(decorated, typechecker=typechecker)
    checked = _check_as_resolved(decorated)
    if _names_arrays(decorated):
        checked = by_jaxtyping(checked, typechecker=None)

    @wraps(decorated)
    def call(*args, **kwargs):
        return (decorated if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return call


def _names_arrays(function: FunctionType) -> bool:
    words = re.findall(r"\w+", str(function.__annotations__))
    return "jaxtyping" in words or any("jaxtyping" in str(function.__globals__.get(word)) for word in words)


def _check_as_resolved(function: FunctionType) -> Callable:
    written = function.__annotations__
    function.__annotations__ = {name: _resolve(annotation, function) for name, annotation in written.items()}
    try:
        return _check(function)
    finally:
        function.__annotations__ = written


def _resolve(annotation, function: FunctionType):
    """An annotation that is a string as what it says; Any where that is not there when the program runs."""

    def of(value: annotation): ...

    try:
        return get_type_hints(of, function.__globals__, include_extras=True)["value"]
    except Exception:  # whatever its evaluation raises
        return Any


jaxtyping.jaxtyped = _jaxtyped
