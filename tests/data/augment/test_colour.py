import colorsys

import numpy as np
import pytest

from polyvit_fast.data.augment.colour import jitter_colours, recolour
from polyvit_fast.randomness import generator

PICTURE = np.random.default_rng(0).integers(60, 190, (9, 13, 3)).astype(np.uint8)


def changed(**changes):
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue_degrees": 0.0}
    return recolour(PICTURE, **(values | changes)).astype(float)


def luma(picture):
    return picture @ np.array([0.299, 0.587, 0.114])


def test_nothing_changes_nothing():
    assert np.array_equal(changed(), PICTURE)


@pytest.mark.parametrize("factor", [0.5, 1.2])
def test_brightness_multiplies(factor):
    assert np.abs(changed(brightness=factor) - PICTURE * factor).max() <= 0.51


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_contrast_multiplies_the_distance_from_middle_grey(factor):
    assert np.abs(changed(contrast=factor) - (128 + (PICTURE.astype(float) - 128) * factor)).max() <= 0.51


def test_saturation_multiplies_the_distance_from_the_pictures_own_grey():
    grey = luma(PICTURE)[..., None]
    assert np.abs(changed(saturation=0.0) - grey).max() <= 0.51
    assert np.abs(changed(saturation=0.4) - (grey + 0.4 * (PICTURE - grey))).max() <= 0.51


def test_hue_turns_and_keeps_the_brightness():
    red = np.full((1, 1, 3), (150, 100, 100), np.uint8)
    for degrees in (-120, -40, 60, 120):
        turned = recolour(red, 1.0, 1.0, 1.0, float(degrees))[0, 0] / 255
        assert abs(luma(turned) - luma(red[0, 0] / 255)) < 0.01
        # YIQ's angle and HSV's hue differ by up to some 15 degrees; their directions are opposite.
        hue = colorsys.rgb_to_hsv(*turned)[0] * 360
        assert abs((hue + degrees + 180) % 360 - 180) < 20


def test_all_frames_of_a_clip_change_alike():
    clip = np.stack([PICTURE, PICTURE[::-1], PICTURE])
    jittered = jitter_colours(clip, generator("colour"), 0.4, 30.0)
    assert np.array_equal(jittered[0], jittered[2])
    assert np.array_equal(jittered[0], jittered[1][::-1])
    assert np.array_equal(jittered[0], jitter_colours(PICTURE, generator("colour"), 0.4, 30.0))
    assert not np.array_equal(jittered[0], PICTURE)


def test_factors_lie_in_the_range_that_was_asked_for():
    grey = np.full((4, 4, 3), 100, np.uint8)
    # Contrast moves grey 100 towards 128 or away from it, brightness multiplies afterwards.
    values = [jitter_colours(grey, generator("range", i), 0.2, 0.0)[0, 0, 0] for i in range(500)]
    low, high = 0.8 * (128 - 28 * 1.2), 1.2 * (128 - 28 * 0.8)
    assert low - 1 < min(values) < low + 8
    assert high - 8 < max(values) < high + 1
