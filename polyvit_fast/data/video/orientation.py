"""Which way up a frame is shown: the display matrix of a file or stream (ISO/IEC 14496-12, 8.3.2), rounded to the nearest of eight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Orientation:
    """What a player does with a stored picture: mirrors it left to right, then turns it clockwise."""

    mirrored: bool = False
    quarter_turns: int = 0

    @property
    def swaps_sides(self) -> bool:
        """Whether the stored height is the shown width."""
        return self.quarter_turns % 2 == 1

    def apply(self, picture: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "shown_height shown_width 3"]:
        """The picture as it is shown, a view."""
        return np.rot90(picture[:, ::-1] if self.mirrored else picture, -self.quarter_turns)


UPRIGHT = Orientation()


def orientation_of(frame: Any, before: Orientation = UPRIGHT) -> Orientation:
    """The orientation of a decoded frame, given that of the one before, which holds up to the next keyframe (ITU-T H.264, D.2.27)."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return UPRIGHT if frame.key_frame else before
    return nearest(*(int(value) for value in np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]]))


def nearest(a: float, b: float, c: float, d: float) -> Orientation:
    """The orientation of a matrix that shows what is stored at column x and row y at column a x + c y and row b x + d y.

    Angles are rounded to quarter turns; stretching and shearing are ignored.
    """
    determinant = a * d - b * c
    if determinant == 0:  # a matrix of zeros would show nothing
        return UPRIGHT
    if determinant < 0:
        a, b = -a, -b
    return Orientation(determinant < 0, round(math.atan2(b - c, a + d) / (math.pi / 2)) % 4)
