import numpy as np
import pytest
from PIL import Image as Pillow
from scipy import ndimage

from polyvit_fast.data.augment import rand_augment as module
from polyvit_fast.data.augment.rand_augment import OPERATIONS, rand_augment
from polyvit_fast.randomness import generator

GREY_WEIGHTS = [0.299, 0.587, 0.114]


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[:40, :48]
    waves = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + 2 * y) / 9)], -1)
    noise = np.random.default_rng(0).normal(0, 10, (40, 48, 3))
    return (110 + 70 * waves + noise).clip(20, 230).astype(np.uint8)


def apply(operation, picture, strength):
    return np.asarray(operation(Pillow.fromarray(picture), strength)).astype(float)


def blend(other, picture, factor):
    return (other + factor * (picture.astype(float) - other)).clip(0, 255)


def equalized(channel):
    """Levels by rank: the usual cumulative histogram, as Pillow and AutoAugment define it."""
    histogram = np.bincount(channel.ravel(), minlength=256)
    step = (histogram.sum() - histogram[np.nonzero(histogram)[0][-1]]) // 255
    table = (step // 2 + np.concatenate([[0], histogram.cumsum()[:-1]])) // step
    return table.clip(0, 255)[channel]


def expected(name, x, s):
    """Each operation written down in numpy."""
    grey = np.round(x @ GREY_WEIGHTS)[..., None]
    smooth = np.stack([ndimage.convolve(x[..., c].astype(float), np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13) for c in range(3)], -1)
    low, high = x.min((0, 1)), x.max((0, 1))
    return {
        "_identity": lambda: x,
        "_autocontrast": lambda: (x - low) * (255 / (high - low)),
        "_equalize": lambda: np.stack([equalized(x[..., c]) for c in range(3)], -1),
        "_solarize": lambda: np.where(x < round(256 * (1 - abs(s))), x, 255 - x),
        "_posterize": lambda: x & (256 - 2 ** round(4 * abs(s))),
        "_colour": lambda: blend(grey, x, 1 + 0.9 * s),
        "_contrast": lambda: blend(np.round(grey.mean()), x, 1 + 0.9 * s),
        "_brightness": lambda: blend(0.0, x, 1 + 0.9 * s),
        "_sharpness": lambda: blend(smooth, x, 1 + 0.9 * s),
    }[name]()


@pytest.mark.parametrize("strength", [0.9, -0.9, 0.3, 0.0])
@pytest.mark.parametrize(
    "name", ["_identity", "_autocontrast", "_equalize", "_solarize", "_posterize", "_colour", "_contrast", "_brightness"]
)
def test_colour_operations_follow_their_formulas(picture, name, strength):
    result = apply(getattr(module, name), picture, strength)
    assert np.abs(result - expected(name, picture, strength)).max() <= 1.5


@pytest.mark.parametrize("strength", [0.9, -0.9])
def test_sharpness_follows_its_formula_inside_the_border(picture, strength):
    result = apply(module._sharpness, picture, strength)
    assert np.abs(result - expected("_sharpness", picture, strength))[1:-1, 1:-1].max() <= 1.5


@pytest.mark.parametrize("strength", [0.8, -0.5])
def test_translations_shift_and_fill_with_grey(picture, strength):
    moved = apply(module._translate_x, picture, strength)
    columns = np.floor(np.arange(48) + 0.5 + 150 / 331 * strength * 48).astype(int)
    inside = (columns >= 0) & (columns < 48)
    assert np.array_equal(moved[:, inside], picture[:, columns[inside]])
    assert (moved[:, ~inside] == 128).all()
    assert 0 < inside.sum() < 48
    turned = apply(module._translate_y, picture.swapaxes(0, 1).copy(), strength)
    assert np.array_equal(turned.swapaxes(0, 1), moved)


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_shears_shift_each_row_by_its_height(picture, strength):
    sheared = apply(module._shear_x, picture, strength)
    for row in (0, 17, 39):
        columns = np.floor(np.arange(48) + 0.5 + 0.3 * strength * (row + 0.5)).astype(int)
        inside = (columns >= 0) & (columns < 48)
        assert np.array_equal(sheared[row, inside], picture[row, columns[inside]])
        assert (sheared[row, ~inside] == 128).all()
    turned = apply(module._shear_y, picture.swapaxes(0, 1).copy(), strength)
    assert np.array_equal(turned.swapaxes(0, 1), sheared)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_rotation_turns_about_the_centre(strength):
    y, x = np.mgrid[:65, :65]
    blob = (200 * np.exp(-((x - 47) ** 2 + (y - 32) ** 2) / 20)).astype(np.uint8)[..., None].repeat(3, -1)
    turned = apply(module._rotate, blob, strength)
    turned[turned == 128] = 0  # the filled corners
    mass = turned[..., 0] / turned[..., 0].sum()
    angle = np.degrees(np.arctan2(-((y - 32) * mass).sum(), ((x - 32) * mass).sum()))
    assert angle == pytest.approx(30 * strength, abs=1)


def test_one_of_the_papers_fourteen_operations_is_drawn_each_time(picture):
    assert len(OPERATIONS) == 14
    outcomes = {apply(op, picture, s).astype(np.uint8).tobytes(): op for op in OPERATIONS for s in (0.9, -0.9)}
    drawn = [outcomes[rand_augment(picture, generator("draw", i), 1, 9.0).tobytes()] for i in range(1400)]
    counts = [drawn.count(op) for op in OPERATIONS]
    assert min(counts) > 65
    assert max(counts) < 135


def test_operations_follow_one_another(picture):
    rng = generator("two")
    once = rand_augment(picture, rng, 1, 9.0)
    assert np.array_equal(rand_augment(picture, generator("two"), 2, 9.0), rand_augment(once, rng, 1, 9.0))
    assert np.array_equal(rand_augment(picture, generator("two"), 0, 9.0), picture)


def test_magnitude_zero_changes_nothing_but_the_histogram(picture):
    plain = {apply(op, picture, 0.0).astype(np.uint8).tobytes() for op in (module._identity, module._autocontrast, module._equalize)}
    assert {rand_augment(picture, generator(i), 1, 0.0).tobytes() for i in range(60)} == plain
