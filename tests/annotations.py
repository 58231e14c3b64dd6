"""How annotations are checked in tests: as type checkers read them, a whole number will do where a float is wanted."""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from types import FunctionType

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


def _names_arrays(function: FunctionType) -> bool:
    words = re.findall(r"\w+", str(function.__annotations__))
    return "jaxtyping" in words or any("jaxtyping" in str(function.__globals__.get(word)) for word in words)


def _jaxtyped(decorated=None, *, typechecker, with_shapes=jaxtyping.jaxtyped):
    """`jaxtyping.jaxtyped`, which binds the axes of every call, where a signature names arrays; elsewhere beartype alone, which is fast."""
    if decorated is None:
        return partial(_jaxtyped, typechecker=typechecker)
    if isinstance(decorated, type) and is_dataclass(decorated):
        decorated.__init__ = _jaxtyped(decorated.__init__, typechecker=typechecker)
    elif not isinstance(decorated, FunctionType) or "<locals>" in decorated.__qualname__ or _names_arrays(decorated):
        return with_shapes(decorated, typechecker=typechecker)
    else:
        return _check(decorated)
    return decorated


jaxtyping.jaxtyped = _jaxtyped
