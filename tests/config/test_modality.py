import pytest
from tiny_runs import Tile, tile_task


def test_a_tubelet_must_divide_the_grid():
    with pytest.raises(ValueError, match="tile: rows = 20 does not divide by the tubelet's 8; change one of the two"):
        tile_task(modality=Tile(size=20))


def test_token_count_includes_the_class_token():
    assert Tile(size=24).num_tokens == 10


def test_views_of_a_modality_that_has_no_others():
    with pytest.raises(ValueError, match="tile: evaluation has one view, which cannot be changed"):
        Tile().with_views(2)
