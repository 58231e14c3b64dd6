"""A modality that says nothing of its files describes nothing."""

from grids import SMALL

from polyvit_fast.config import Preprocessing


def test_the_default_says_nothing():
    found = SMALL["picture"].preprocessing
    assert found == Preprocessing()
    assert (found.input_name, found.dtype, found.is_mono) == ("grid", "float32", False)
    assert (found.steps, found.hugging_face, found.timm, found.differences) == ((), {}, {}, ())
