from dataclasses import replace

import pytest
from tiny_runs import Tile, tile_task

from polyvit_fast.data.audio.modality import Audio


def test_a_tubelet_must_divide_the_grid():
    with pytest.raises(ValueError, match="tile: rows = 20 does not divide by the tubelet's 8; change one of the two"):
        tile_task(modality=Tile(size=20))


def test_token_count_includes_the_class_token():
    assert Tile(size=24).num_tokens == 10


def test_views_of_a_modality_that_has_no_others():
    with pytest.raises(ValueError, match="tile: evaluation has one view, which cannot be changed"):
        Tile().with_views(2)


def test_token_count_of_overlapping_patches_is_asts():
    # arXiv 2104.01778, section 2: 12 (100 t - 16) / 10 patches; of 1,024 frames 12 x 101.
    modality = Audio(clip_seconds=10.24, patch_stride=10, num_class_tokens=2, pool="class_tokens")
    assert (modality.tubelets, modality.num_tokens) == ((1, 101, 12), 1214)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_tokens": 3}, "num_class_tokens = 3 must be 0, 1 or 2"),
        ({"num_class_tokens": 0}, "pool = cls needs a class token; set num_class_tokens = 1, or pool = mean"),
        ({"num_class_tokens": 0, "pool": "class_tokens"}, "pool = class_tokens needs a class token"),
    ],
)
def test_heads_must_have_something_to_read(changes, message):
    with pytest.raises(ValueError, match=message):
        tile_task(modality=replace(Tile(), **changes))


def test_patches_must_not_leave_gaps():
    with pytest.raises(ValueError, match="patch_stride = 17 must lie between 0 and patch = 16"):
        Audio(patch_stride=17)
