"""What checks the annotations of all code in these tests finds what is wrong, as jaxtyping itself would."""

from dataclasses import dataclass

import annotations
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from polyvit_fast import config
from polyvit_fast.train.loss import LOSSES


@jaxtyping.jaxtyped(typechecker=annotations.check)
def add(x: Float[Tensor, "rows columns"], y: Float[Tensor, "rows columns"], factor: float = 1.0) -> Float[Tensor, "rows columns"]:
    return (x + factor * y)[: 1 if factor == 7 else None]


@jaxtyping.jaxtyped(typechecker=annotations.check)
def half(number: float, unit: "NotThere | None" = None) -> float:  # a type that only type checkers import
    return "none" if number == 3 else number / 2


@jaxtyping.jaxtyped(typechecker=annotations.check)
@dataclass
class Point:
    x: float


def test_what_is_right_passes():
    assert torch.equal(add(torch.ones(2, 3), torch.ones(2, 3), 2), torch.full((2, 3), 3.0))  # a whole number where a float is wanted
    assert half(5, unit="m") == 2.5
    assert Point(x=1).x == 1


WRONG = {
    "axes of one array": lambda: add(torch.ones(2), torch.ones(2)),
    "axes of two that differ": lambda: add(torch.ones(2, 3), torch.ones(1, 3)),
    "a dtype": lambda: add(torch.ones(2, 3).int(), torch.ones(2, 3)),
    "axes of what is returned": lambda: add(torch.ones(2, 3), torch.ones(2, 3), 7),
    "a number": lambda: half("5"),
    "what is returned": lambda: half(3),
    "a field": lambda: Point(x="1"),
    "a field of the package": lambda: config.Optim(lr="1"),
    "axes in the package": lambda: LOSSES["softmax"](torch.ones(3), torch.zeros(3, dtype=torch.int64), 0.0),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_is_wrong_raises(call):
    with pytest.raises(Exception, match=r"violates type hint|Type-check error"):
        call()


@pytest.mark.usefixtures("unchecked_types")
def test_nothing_is_checked_while_checks_are_off():
    assert half(3) == "none"
    assert add(torch.ones(2), torch.ones(2)).shape == (2,)
