from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from polyvit_fast.config import Model, Source
from polyvit_fast.config.words import describe, show, strip, suggest_word


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


class Tall:
    def __repr__(self) -> str:
        return "one\ntwo"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or None"),
        (bool, "True or False"),
        (Literal["a"], '"a"'),
        (Literal["a", 1, 2], '"a", 1 or 2'),
        (tuple[int, ...], "a tuple of whole numbers"),
        (tuple[str, str], "a tuple of 2 texts"),
        (tuple, "a tuple"),
        (dict[str, Model], 'a dict such as {"name": Model(…)}'),
        (dict[str, Any], 'a dict such as {"name": …}'),
        (Path, "a path"),
        (Model, "a Model"),
        (Callable[[int], int], "a function"),
        (str | Callable[[int], int], "text or a function"),
        (list[int], "a list"),
        (Source | None, "a Source or None"),
    ],
    ids=str,
)
def test_types_in_words(kind, words):
    assert describe(kind) == words


def test_values_on_one_line_and_not_too_long():
    assert [show(value) for value in ("a", 'say "a"', 1.5, Model, Model(), Tall())] == [
        '"a"',
        "'say \"a\"'",
        "1.5",
        "<class Model>",
        "Model(…)",
        "one two",
    ]
    assert show(Broken()) == "<Broken>"
    assert show(10**5000) == "<int>"
    assert all(len(show(value)) < 200 for value in ("x" * 10_000, list(range(1000)), {"a": ["b" * 1000]}, np.zeros((100, 100))))
    endless: list = []
    endless.append(endless)
    assert show(endless) == "[[[[...]]]]"


def test_the_word_that_was_meant():
    assert suggest_word("Cosin", ("run", "cosine", "constant")) == '; perhaps you meant "cosine"'
    assert suggest_word("x", ("run", 3)) == ""
    assert suggest_word(3, ("run", 3)) == ""


def test_what_says_nothing_of_values_is_stripped():
    assert strip(None) is type(None)
    assert strip(int) is int
