import pytest

from polyvit_fast.data.image.modality import Image


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_area_ratio": 0.0}, r"min_area_ratio = 0.0 must be above 0 and at most 1"),
        ({"crop_ratio": 1.5}, r"crop_ratio = 1.5 must be above 0 and at most 1"),
        ({"colour_jitter": 2.0}, r"colour_jitter must lie in \[0, 1\]"),
        ({"hue_jitter_degrees": -1.0}, r"hue_jitter_degrees in \[0, 180\]"),
        ({"rand_augment_magnitude": 11.0}, r"rand_augment_magnitude must lie in \[0, 10\]"),
        ({"random_erasing_prob": 1.5}, r"random_erasing_prob must lie in \[0, 1\]"),
        ({"random_erasing_aspect_ratio": 0.0}, "random_erasing_aspect_ratio above 0"),
        (
            {"random_erasing_area_ratios": (0.4, 0.02)},
            "random_erasing_area_ratios = 0.4 0.02 must be two fractions of the grid, the smaller",
        ),
        ({"max_pixels": 0}, "max_pixels and std must be positive"),
        ({"std": (1.0, 0.0, 1.0)}, "max_pixels and std must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Image(**fields)


def test_shape_of_the_tokens():
    image = Image(size=384)
    assert (image.grid, image.tubelet, image.num_tokens) == ((1, 384, 384, 3), (1, 16, 16), 577)
    assert image.normalisation == ((127.5,) * 3, (127.5,) * 3)
    with pytest.raises(ValueError, match="rows = 100 does not divide by the tubelet's 16"):
        Image(size=100).check_grid()


@pytest.mark.parametrize("counts", [(1,), (4,), (4, 3)])
def test_a_picture_has_one_view(counts):
    with pytest.raises(ValueError, match="a picture has one view in evaluation, the whole of it or its centre"):
        Image().with_views(*counts)
