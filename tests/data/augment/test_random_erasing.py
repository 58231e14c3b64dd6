import numpy as np
import pytest
import torch

from polyvit_fast.data.augment.random_erasing import Erasing, draw_erasing

PAPER = ((0.02, 0.4), 0.3)


def draw(count, prob=1.0, size=64, limits=PAPER):
    return [draw_erasing(np.random.default_rng(seed), prob, size, *limits) for seed in range(count)]


def test_rectangles_are_those_of_the_paper():
    found = draw(3000)
    areas = np.array([erasing.noise[..., 0].size / 64**2 for erasing in found])
    aspects = np.array([erasing.noise.shape[0] / erasing.noise.shape[1] for erasing in found])
    assert 0.015 < areas.min() < 0.03
    assert 0.37 < areas.max() < 0.41
    assert areas.mean() == pytest.approx(0.21, abs=0.015)  # uniform, but for what is too long to fit
    assert aspects.min() > 0.27
    assert aspects.max() < 3.7
    assert (aspects > 1).mean() == pytest.approx(0.74, abs=0.06)  # uniform between 0.3 and 3.3: (3.3 - 1) / 3, less what is too high
    for erasing in found:
        rows, columns, channels = erasing.noise.shape
        assert channels == 3
        assert 0 <= erasing.top <= 64 - rows
        assert 0 <= erasing.left <= 64 - columns
    covered = np.zeros((64, 64))
    for erasing in found:
        covered[erasing.top : erasing.top + erasing.noise.shape[0], erasing.left : erasing.left + erasing.noise.shape[1]] += 1
    assert covered.min() > 0


def test_noise_has_all_levels_equally_often():
    levels = np.concatenate([erasing.noise.ravel() for erasing in draw(100)])
    counts = np.bincount(levels, minlength=256)
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


def test_it_happens_as_often_as_asked_and_follows_the_generator():
    assert np.mean([erasing is not None for erasing in draw(2000, prob=0.25)]) == pytest.approx(0.25, abs=0.04)
    first, again = draw(20), draw(20)
    assert all(np.array_equal(a.noise, b.noise) and (a.top, a.left) == (b.top, b.left) for a, b in zip(first, again, strict=True))


def test_what_never_fits_is_left_out():
    assert draw(3, limits=((1.0, 1.0), 0.001)) == [None] * 3


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_the_rectangle_and_nothing_else_is_overwritten(make):
    picture = make(np.zeros((6, 7, 3), np.uint8))
    noise = np.arange(1, 19, dtype=np.uint8).reshape(2, 3, 3)
    Erasing(3, 2, noise).apply(picture)
    expected = np.zeros((6, 7, 3), np.uint8)
    expected[3:5, 2:5] = noise
    assert np.array_equal(np.asarray(picture), expected)
