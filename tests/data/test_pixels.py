import numpy as np
import pytest
import torch

from polyvit_fast.data.pixels import to_levels, to_numpy, to_rgb


def test_arrays_and_tensors_become_numpys():
    array = np.arange(6).reshape(2, 3)
    assert to_numpy(array) is array
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        np.testing.assert_array_equal(to_numpy(torch.from_numpy(array).to(dtype)), array)
    assert to_numpy([1, 2]) is None
    assert to_numpy("a") is None


def test_floats_are_rounded_to_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(to_levels(levels.astype(dtype) / 255, "?"), levels)
    np.testing.assert_array_equal(to_levels(np.array([0.0019, 0.0020, 1.0]), "?"), [0, 1, 255])


def test_channels_are_found_on_either_side():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(to_rgb(pixels, "?"), pixels)
    np.testing.assert_array_equal(to_rgb(np.moveaxis(pixels, -1, 1), "?"), pixels)
    for axis in (-1, -3):
        grey = to_rgb(np.expand_dims(pixels[..., 0], axis), "?")
        assert all((grey[..., channel] == pixels[..., 0]).all() for channel in range(3))
    with pytest.raises(ValueError, match=r"has no axis of 1, 3 or 4 channels, first or last; wanted that"):
        to_rgb(pixels[..., :2], "wanted that")
