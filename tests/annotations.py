"""How annotations are checked in tests: as type checkers read them, a whole number will do where a float is wanted."""

from collections.abc import Callable

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
