"""Which of many cases of a test `make test` runs; `make test-all` runs all of them."""

from collections.abc import Collection, Container, Iterable
from itertools import cycle, product

import pytest


def mark_long(cases: Iterable, short: Container) -> list:
    """The cases for `parametrize`, in their order; those that are not among the `short` ones are marked long."""
    return [case if case in short else _mark(case) for case in cases]


def every(step: int, cases: Iterable) -> list:
    """The cases for `parametrize`, in their order; all but the first of every `step` are marked long."""
    return [_mark(case) if index % step else case for index, case in enumerate(cases)]


def pairs(firsts: Collection, seconds: Iterable) -> list:
    """All pairs for `parametrize`; of them each of the first meets one of the second, in turn, and the others are marked long."""
    seconds = list(seconds)
    return mark_long(product(firsts, seconds), [*zip(firsts, cycle(seconds), strict=False)])


def _mark(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
