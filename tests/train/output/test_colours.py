"""Each task has one colour, which readers can tell from the others."""

import numpy as np
import pytest

from polyvit_fast.train.output.colours import COLOURS, task_colour, to_rgb

SIGHT = {  # linear RGB as people without red or green cones see it: Machado, Oliveira and Fernandes 2009
    "usual": np.eye(3),
    "without red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "without green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colours: np.ndarray) -> np.ndarray:
    values = colours / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b*, in which a distance of 2 is just seen."""
    xyz = rgb @ TO_XYZ.T / TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(np.maximum(xyz, 0)), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize(("count", "least"), [(10, 17), (20, 14)])
@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_far_apart_for_every_reader(count, least, sight):
    seen = np.clip(linear(np.array([to_rgb(task_colour(index)) for index in range(count)])) @ SIGHT[sight].T, 0, 1)
    perceived = to_lab(seen)
    distances = np.linalg.norm(perceived[:, None] - perceived[None], axis=2)
    assert distances[~np.eye(count, dtype=bool)].min() > least


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_stands_out_from_white_and_from_black(colour):
    luminance = linear(np.array(to_rgb(colour))) @ TO_XYZ[1]
    assert 1.05 / (luminance + 0.05) > 2.1
    assert (luminance + 0.05) / 0.05 > 2.5


def test_colours_repeat_after_the_last():
    assert task_colour(0) == "#0072B2"
    assert to_rgb(task_colour(0)) == (0, 0x72, 0xB2)
    assert [task_colour(index) for index in range(2 * len(COLOURS))] == [*COLOURS, *COLOURS]
