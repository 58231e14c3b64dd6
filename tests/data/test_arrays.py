from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_runs import Tile

from polyvit_fast.data.arrays import read_value
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.video.modality import Video


@pytest.mark.parametrize("modality", [Image(size=32), Video(size=32, frames=4, tubelet_frames=2), Tile(size=32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_grids_are_taken_as_they_are(modality, dtype):
    grids = torch.randint(0, 256, (3, 2, *modality.grid)).to(dtype)
    found = read_value(modality, grids, "mine")
    assert len(found) == 3
    torch.testing.assert_close(torch.stack(found), grids if dtype == torch.uint8 else grids.float())
    if dtype != torch.bfloat16:
        torch.testing.assert_close(torch.stack(read_value(modality, grids.numpy(), "mine")), torch.stack(found))


@pytest.mark.parametrize("grids", [np.zeros((1, 1, 1, 32, 31, 3)), np.zeros((1, 1, 1, 32, 32, 3), int), np.zeros((0, 1, 1, 32, 32, 3))])
def test_grids_of_another_size_or_dtype_are_refused(grids):
    with pytest.raises(ValueError, match=r"mine: grids of .*; wanted are grids \[samples, views, 1, 32, 32, 3\] as the decoder of image"):
        read_value(Image(size=32), grids, "mine")


def test_a_modality_that_is_not_known_takes_grids_alone():
    with pytest.raises(
        ValueError, match=r"mine: an input of type ndarray cannot be read; wanted are grids \[samples, views, 1, 16, 16, 3\]"
    ):
        read_value(Tile(), np.zeros((16, 16, 3), np.uint8), "mine")


@dataclass(frozen=True, kw_only=True)
class Photo(Image):
    """A class of a user's own."""


def test_a_subclass_is_read_as_its_parent():
    assert len(read_value(Photo(size=32), np.zeros((2, 40, 40, 3), np.uint8), "mine")) == 2
