import dataclasses
import enum
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, TypedDict, TypeVar, Union

import numpy as np
import pytest
import torch

from polyvit_fast.config import Model, Optim
from polyvit_fast.config.values import MisfitError, fit

pytestmark = pytest.mark.usefixtures("unchecked_types")
Count = NewType("Count", int)
Item = TypeVar("Item")


class Shape(TypedDict):
    rows: int


class Word(enum.StrEnum):
    ONE = "one"


class Closable(Protocol):
    def close(self) -> None: ...


class OwnPath:
    def __repr__(self):
        return "OwnPath()"

    def __fspath__(self) -> str:
        return "own/path"


FITTING = [
    (3, int, 3),
    (np.int64(3), int, 3),
    (np.uint8(3), Count, 3),
    (True, bool, True),
    (np.bool_(True), bool, True),
    (3, float, 3.0),
    (0.1, float, 0.1),
    (np.float64(0.1), float, 0.1),
    (np.float32(0.5), float, 0.5),
    (np.int32(2), float, 2.0),
    (Fraction(1, 4), float, 0.25),
    ("a", str, "a"),
    (np.str_("a"), str, "a"),
    (Path("a/b"), str, "a/b"),
    (OwnPath(), str, "own/path"),
    (Path(os.fsdecode(b"\xe9")), str, os.fsdecode(b"\xe9")),
    (Word.ONE, str, "one"),
    ("a/b", Path, Path("a/b")),
    ("a/b", PurePosixPath, PurePosixPath("a/b")),
    ("adamw", Literal["sgd", "adamw"], "adamw"),
    (np.int64(3), Literal[1, 3], 3),
    ([1, 0.5], tuple[float, ...], (1.0, 0.5)),
    ((1, 2), tuple[float, float], (1.0, 2.0)),
    ([], tuple[str, ...], ()),
    ((Path("a"), "b"), tuple[str, ...], ("a", "b")),
    ([[1, 2], [3, 4]], tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
    ({"a": 1}, dict[str, float], {"a": 1.0}),
    (OrderedDict(a=Path("x")), dict[str, str], {"a": "x"}),
    (None, int | None, None),
    (None, Optional[float], None),  # noqa: UP045 - the old notation
    (2, float | None, 2.0),
    (2, int | float, 2),
    (2.5, Union[int, float], 2.5),  # noqa: UP007
    ("auto", int | Literal["auto"], "auto"),
    (Path("x"), str | dict[str, str], "x"),
    (3, Annotated[int, "in pixels"], 3),
    (None, None, None),
    ([1], list[int], [1]),
    ((1,), Sequence[int], (1,)),
    ({1}, set[int], {1}),
    ("whatever", Any, "whatever"),
    (object, Item, object),
    (3, Closable, 3),
    ({"rows": 1}, Shape, {"rows": 1}),
]


@pytest.mark.parametrize(("value", "kind", "expected"), FITTING, ids=str)
def test_a_value_is_written_in_the_type_of_its_field(value, kind, expected):
    found = fit(value, kind, "field")
    assert found == expected
    assert type(found) is (type(expected) if not isinstance(value, OrderedDict) else dict)
    if isinstance(expected, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ((1.0, 2.0), tuple[float, ...]),
        ({"a": 1}, dict[str, int]),
        ("text", str),
        (Model(), Model),
        (len, Callable[[str], int]),
        (3, int | str),
    ],
)
def test_what_fits_already_stays_the_same_object(value, kind):
    assert fit(value, kind, "field") is value


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (30.0, int, " = 30.0 must be a whole number: write 30"),
        (np.float32(30), int, ": write 30"),
        (30.5, int, " = 30.5 must be a whole number"),
        (math.nan, int, " = nan must be a whole number"),
        (math.inf, int, " = inf must be a whole number"),
        (True, int, " = True must be a whole number"),
        (None, int, " = None must be a whole number"),
        ("30", int, ' = "30" is text: write 30'),
        (" 3_000 ", int, "is text: write 3_000"),
        ("many", int, ' = "many" is text, and must be a whole number'),
        ("3e1", int, ' = "3e1" is text, and must be a whole number'),
        (torch.tensor(3), int, "must be a whole number"),
        ([3], int, " = [3] must be a whole number"),
        (1, bool, " = 1 must be True or False: write True"),
        (0.0, bool, ": write False"),
        ("yes", bool, ' = "yes" must be True or False'),
        (2, bool, " = 2 must be True or False"),
        (True, float, " = True must be a number"),
        (np.bool_(True), float, "must be a number"),
        (math.nan, float, " = nan must be a finite number"),
        (-math.inf, float, " = -inf must be a finite number"),
        (np.float32("inf"), float, "must be a finite number"),
        (10**400, float, "must be a finite number"),
        (1j, float, " = 1j must be a number"),
        ("0.3", float, ' = "0.3" is text: write 0.3'),
        ("nan", float, ' = "nan" is text, and must be a number'),
        (np.zeros(2), float, " = array([0., 0.]) must be a number"),
        (3, str, ' = 3 must be text: write "3"'),
        (b"a", str, " = b'a' must be text"),
        (Path, str, " = <class Path> must be text"),
        ("a\0b", str, "holds a NUL character"),
        (3, Path, " = 3 must be a path"),
        ("adam", Literal["sgd", "adamw"], ' = "adam" must be "sgd" or "adamw"; perhaps you meant "adamw"'),
        ("SGD", Literal["sgd", "adamw"], 'perhaps you meant "sgd"'),
        ("gpu", Literal["cpu", "cuda"], ' = "gpu" must be "cpu" or "cuda"; perhaps you meant "cuda"'),
        (["sgd"], Literal["sgd"], ' = ["sgd"] must be "sgd"'),
        (True, Literal[1, 3], " = True must be 1 or 3"),
        (3.0, Literal[1, 3], " = 3.0 must be 1 or 3: write 3"),
        ("a", tuple[str, ...], ' = "a" must be a tuple of texts: write ("a",)'),
        (Path("a"), tuple[str, ...], ': write ("a",)'),
        (0.5, tuple[float, float], " = 0.5 must be a tuple of 2 numbers"),
        ((1, 2, 3), tuple[float, float], " = (1, 2, 3) must be a tuple of 2 numbers, and not 3"),
        ({1, 2}, tuple[int, ...], "must be a tuple of whole numbers"),
        ((1, "x"), tuple[float, ...], '[1] = "x" is text, and must be a number'),
        (((1, 2), (3,)), tuple[tuple[int, int], ...], "[1] = (3,) must be a tuple of 2 whole numbers, and not 1"),
        ([("a", 1)], dict[str, int], ' = [("a", 1)] must be a dict such as {"name": 1}'),
        ({1: 1}, dict[str, int], " has the key 1, which must be text"),
        ({"a": "b"}, dict[str, int], '["a"] = "b" is text, and must be a whole number'),
        ("x", int | None, ' = "x" is text, and must be a whole number'),
        (3, str | dict[str, str], ' = 3 must be text or a dict such as {"name": "text"}'),
        ("aut", int | Literal["auto"], ' = "aut" must be a whole number or "auto"; perhaps you meant "auto"'),
        (3, Callable[[int], int], " = 3 must be a function"),
        (Optim, Optim, " = <class Optim>: write Optim(), with brackets"),
        (Model(), Optim, " = Model(…) must be an Optim: write Optim(…)"),
        ("B", Model, ' = "B" must be a Model: write MODELS["B"]'),
        ((1,), list[int], " = (1,) must be a list"),
        (3, None, " = 3 must be None"),
        (3, dataclasses.Field, " = 3 must be a Field"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_refused_in_one_sentence(value, kind, reason):
    with pytest.raises(MisfitError) as caught:
        fit(value, kind, "field")
    text = str(caught.value)
    assert text.startswith("field")
    assert reason in text
    assert "\n" not in text


def test_json_gives_tuples_and_floats_back():
    optim = Optim(betas=json.loads(json.dumps((0.8, 0))), lr=json.loads("1"), freeze=json.loads('["blocks.*"]'))
    assert optim == Optim(betas=(0.8, 0.0), lr=1.0, freeze=("blocks.*",))
    assert hash(optim) == hash(Optim(betas=(0.8, 0.0), lr=1.0, freeze=("blocks.*",)))
