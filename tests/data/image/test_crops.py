import numpy as np
import pytest
from image_files import decode_images
from PIL import Image as Pillow

from polyvit_fast.data.image.modality import Image


def boxes(image, path, height, width, count):
    """(top, left, height, width, mirrored) of random crops, read from the pixels of a picture whose colours are its coordinates."""
    y, x = np.mgrid[:height, :width]
    Pillow.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8)).save(path)
    grids = decode_images(image, *[path] * count, train=True).squeeze((1, 2)).double()
    rows, columns = grids[..., 0].mean(2), grids[..., 1].mean(1)
    steps = image.size - 1
    pixel_rows, pixel_columns = (rows[:, -1] - rows[:, 0]) / steps, (columns[:, -1] - columns[:, 0]) / steps
    heights, widths = pixel_rows * image.size, pixel_columns.abs() * image.size
    tops, lefts = rows.mean(1) + 0.5 - heights / 2, columns.mean(1) + 0.5 - widths / 2
    return tops, lefts, heights, widths, pixel_columns < 0


def test_inception_crops_have_the_wanted_distribution(tmp_path):
    tops, lefts, heights, widths, mirrored = boxes(Image(size=32), tmp_path / "a.png", 200, 240, 600)
    assert tops.min() > -1.5
    assert lefts.min() > -1.5
    assert (tops + heights).max() < 201.5
    assert (lefts + widths).max() < 241.5
    areas, ratios = heights * widths / (200 * 240), widths / heights
    assert areas.min() == pytest.approx(0.05, abs=0.02)
    assert areas.max() > 0.85
    assert ratios.min() == pytest.approx(3 / 4, abs=0.06)
    assert ratios.max() == pytest.approx(4 / 3, abs=0.06)
    assert ratios.log().mean() == pytest.approx(0, abs=0.04)
    assert (tops / (200 - heights)).mean() == pytest.approx(0.5, abs=0.06)
    assert mirrored.double().mean() == pytest.approx(0.5, abs=0.07)


def test_resize_crops_are_squares_of_one_size(tmp_path):
    tops, lefts, heights, widths, mirrored = boxes(
        Image(size=32, crop="resize_crop", flip=False, crop_ratio=0.5), tmp_path / "a.png", 200, 240, 200
    )
    assert heights.sub(100).abs().max() < 2
    assert widths.sub(100).abs().max() < 2
    assert tops.min() < 5
    assert tops.max() > 95
    assert lefts.max() > 135
    assert not mirrored.any()
