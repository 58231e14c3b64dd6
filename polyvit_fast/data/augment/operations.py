"""RandAugment's random numbers: operations of one strength, drawn from the picture's own generator, whoever then applies them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GREY = (128, 128, 128)  # fills what a shift uncovers
MAX_MAGNITUDE = 10
NUM_OPERATIONS = 14


class Operation(NamedTuple):
    """An index into `OPERATIONS`, and the strength from -1 to 1: the fraction of the operation's range, and its direction."""

    number: int
    strength: float


def draw_operations(rng: np.random.Generator, num_ops: int, magnitude: float) -> list[Operation]:
    """The operations on one picture, in their order."""
    operations = []
    for _ in range(num_ops):
        number = int(rng.integers(NUM_OPERATIONS))
        operations.append(Operation(number, magnitude / MAX_MAGNITUDE * (1 if rng.random() < 0.5 else -1)))
    return operations
