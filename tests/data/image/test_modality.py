import json

import numpy as np
import PIL.Image
import pytest
from torchvision_without_extension import declare_operators

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.media import Media
from polyvit_fast.randomness import generator

declare_operators()  # timm imports torchvision


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_area_ratio": 0.0}, r"min_area_ratio = 0.0 must be in \(0, 1\]"),
        ({"crop_ratio": 1.5}, r"crop_ratio = 1.5 must be in \(0, 1\]"),
        ({"colour_jitter": 2.0}, r"colour_jitter = 2.0 must be in \[0, 1\]"),
        ({"hue_jitter_degrees": -1.0}, "hue_jitter_degrees = -1.0 must not be negative"),
        ({"rand_augment_magnitude": 11.0}, "rand_augment_magnitude = 11.0 must be at most 10"),
        ({"random_erasing_prob": 1.5}, r"random_erasing_prob = 1.5 must be in \[0, 1\]"),
        ({"random_erasing_aspect_ratio": 0.0}, r"random_erasing_aspect_ratio = 0.0 must be in \(0, 1\]"),
        (
            {"random_erasing_area_ratios": (0.4, 0.02)},
            "random_erasing_area_ratios = 0.4 0.02 must be two fractions of the grid, the smaller",
        ),
        ({"max_pixels": 0}, "max_pixels = 0 must be at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, r"std\[1\] = 0.0 must be positive"),
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


def encode(folder, height, width) -> str:
    """A JPEG with soft shapes and without subsampling, of which all decoders make the same."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(rows / 17 + n) * np.cos(columns / (13 + n)) for n in range(3)], -1)
    path = str(folder / f"{height}x{width}.jpg")
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95, subsampling=0)
    return path


@pytest.mark.parametrize("image", [Image(size=64), Image(size=64, eval_crop="centre", crop_ratio=0.8)], ids=["resize", "centre"])
@pytest.mark.parametrize("size", [(120, 170), (90, 70), (65, 200)], ids=str)
def test_other_libraries_see_the_pixels_of_an_evaluation(image, size, tmp_path):
    """Their own code, with the settings that they are given, within rounding; where the square lies elsewhere by up to a pixel, nearly."""
    from timm.data import create_transform
    from transformers import AutoImageProcessor

    path = encode(tmp_path, *size)
    grid = build_decoder(image, batch=1, train=False, num_threads=1)([Media(path)], [generator(0, "x")])[0, 0, 0].double()
    found = image.preprocessing
    numbers = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found.hugging_face | numbers))
    picture = PIL.Image.open(path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    timms = create_transform(input_size=(3, 64, 64), **found.timm, mean=(0.0,) * 3, std=(1.0,) * 3)(picture)
    for pixels in (theirs, timms):
        difference = (pixels.movedim(0, -1).double() * 255 - grid).abs()
        assert pixels.shape == (3, 64, 64)
        assert difference.mean() < (0.3 if image.eval_crop == "resize" else 3)
        assert difference.max() <= (2 if image.eval_crop == "resize" else 12)
    assert (found.input_name, found.dtype) == ("pixels", "uint8")
