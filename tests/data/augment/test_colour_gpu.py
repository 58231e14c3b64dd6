import numpy as np
import pytest
import torch

from polyvit_fast.data.augment import colour
from polyvit_fast.data.augment.colour import GREY, Colours, draw_colours
from polyvit_fast.data.augment.colour_gpu import bt709_map, colour_map, mirror, recolour
from polyvit_fast.randomness import generator

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 30, 41, 3)).astype(np.uint8)


def test_a_batch_equals_its_pictures_in_numpy():
    drawn = [Colours(), GREY, *(draw_colours(generator("colours", i), 0.5, 40.0) for i in range(5))]
    expected = np.stack([colour.recolour(picture, *one) for picture, one in zip(PICTURES, drawn, strict=True)])
    result = recolour(torch.from_numpy(PICTURES), [colour_map(one) for one in drawn]).numpy()
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert np.array_equal(result[0], PICTURES[0])
    assert not np.array_equal(result[2], result[3])


def test_one_map_serves_a_whole_clip():
    clip = torch.from_numpy(PICTURES)
    together = recolour(clip, [colour_map(GREY)])
    assert torch.equal(together, torch.cat([recolour(frame[None], [colour_map(GREY)]) for frame in clip]))


def ycbcr_to_rgb(ycbcr, red, blue):
    """ITU-R BT.601-7 and BT.709-6, section 3: limited range."""
    y, cb, cr = np.moveaxis((ycbcr - np.array([16, 128, 128])) / np.array([219, 224, 224]), -1, 0)
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return 255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)


def test_colours_of_bt709_come_back():
    ycbcr = np.random.default_rng(0).integers([90, 100, 100], [160, 156, 156], (1, 50, 50, 3))
    wrong, right = ycbcr_to_rgb(ycbcr, 0.299, 0.114), ycbcr_to_rgb(ycbcr, 0.2126, 0.0722)
    assert min(wrong.min(), right.min()) > 0
    assert max(wrong.max(), right.max()) < 255
    corrected = recolour(torch.from_numpy(wrong.round().astype(np.uint8)), [bt709_map()]).numpy()
    assert np.abs(wrong - right).max() > 9
    assert np.abs(corrected - right).max() < 1.5


@pytest.mark.parametrize("which", [[False] * 3, [True] * 3, [True, False, True]])
def test_only_the_chosen_are_mirrored(which):
    result = mirror(torch.from_numpy(PICTURES[:3]), which).numpy()
    for picture, original, turned in zip(result, PICTURES, which, strict=False):
        assert np.array_equal(picture, original[:, ::-1] if turned else original)
