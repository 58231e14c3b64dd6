"""A picture in memory becomes the grid of a lossless file that holds it."""

import io

import numpy as np
import pytest
import torch
from generators import rngs
from image_files import HEIGHT, WIDTH, photo
from image_kinds import saved
from PIL import Image as Pillow
from PIL import ImageOps

from polyvit_fast.data.arrays import read_value
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.media import MediaError, MemoryMedia

CROPS = [Image(size=64, patch=16), Image(size=48, patch=16, eval_crop="centre", crop_ratio=0.7)]
PIXELS = np.asarray(photo())


def decode(image, *media):
    return build_decoder(image, batch=max(1, len(media)), train=False, num_threads=1)(media, rngs(len(media), 0))


def decode_file(image, picture, kind="PNG", **options):
    return decode(image, MemoryMedia("file", content=saved(picture, kind, **options)))


LAYOUTS = {
    "HWC": PIXELS,
    "CHW": PIXELS.transpose(2, 0, 1),
    "mirrored twice, so not contiguous": np.flip(np.flip(PIXELS, 1).copy(), 1),
    "with alpha": np.concatenate([PIXELS, PIXELS[..., :1] // 2], -1),
    "floats": PIXELS / np.float32(255),
    "doubles, channels first": PIXELS.transpose(2, 0, 1) / 255,
    "tensor": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "tensor of floats that needs a gradient": (torch.from_numpy(PIXELS.copy()) / 255).requires_grad_(),
    "Pillow": photo(),
}


@pytest.mark.parametrize("image", CROPS, ids=["whole", "centre"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_in_any_layout_is_that_of_a_file(image, layout):
    [media] = read_value(image, LAYOUTS[layout], "mine")
    assert media.name == "mine"
    torch.testing.assert_close(decode(image, media), decode_file(image, photo()), rtol=0, atol=0)


def test_grey_pictures_have_three_equal_channels():
    grey, image = photo().convert("L"), CROPS[0]
    expected = decode_file(image, grey)
    levels = np.asarray(grey)
    for value in (levels, levels[..., None], levels[None], torch.from_numpy(levels.copy()), grey):
        [media] = read_value(image, value, "mine")
        torch.testing.assert_close(decode(image, media), expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels_first", [False, True])
def test_an_array_of_several_pictures(channels_first):
    pictures = [np.asarray(photo(seed=seed)) for seed in range(3)]
    array = np.stack(pictures)
    media = read_value(CROPS[0], array.transpose(0, 3, 1, 2) if channels_first else array, "mine")
    assert [one.name for one in media] == ["mine[0]", "mine[1]", "mine[2]"]
    files = [MemoryMedia("x", content=saved(Pillow.fromarray(one), "PNG")) for one in pictures]
    torch.testing.assert_close(decode(CROPS[0], *media), decode(CROPS[0], *files), rtol=0, atol=0)


def test_a_picture_of_pillow_is_turned_upright_like_its_file():
    exif = Pillow.Exif()
    exif[0x0112] = 6
    content = saved(photo(), "PNG", exif=exif)
    expected = decode(CROPS[1], MemoryMedia("file", content=content))
    opened = Pillow.open(io.BytesIO(content))
    assert opened.size == (WIDTH, HEIGHT)
    for picture in (opened, ImageOps.exif_transpose(opened)):
        [media] = read_value(CROPS[1], picture, "mine")
        torch.testing.assert_close(decode(CROPS[1], media), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "CMYK", "I;16", "LA"])
def test_other_modes_of_pillow(mode):
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    picture = Pillow.fromarray(grey * 257) if mode == "I;16" else photo().convert(mode)
    [media] = read_value(CROPS[0], picture, "mine")
    expected = decode_file(CROPS[0], picture, "TIFF" if mode == "CMYK" else "PNG")
    torch.testing.assert_close(decode(CROPS[0], media), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            PIXELS.astype(np.float32),
            r"an array of floats from 0 to 254 \(levels\? Divide them by 255, or make them uint8\); wanted is a pic",
        ),
        (
            PIXELS / 127.5 - 1,
            r"floats from -1 to [\d.]+ \(after a normalisation\? The model normalises by itself\); wanted",
        ),
        (PIXELS / 255 * np.nan, "floats from nan to nan; wanted"),
        (PIXELS.astype(np.int64), "an array of int64 does not say which number is white; wanted"),
        (PIXELS.astype(np.uint16), "an array of uint16 does not say"),
        (PIXELS[..., :2], r"shape \[300, 450, 2\] has no axis of 1, 3 or 4 channels, first or last; wanted"),
        (PIXELS[:3], r"shape \[3, 450, 3\] may have its channels first or last; wanted"),
        (PIXELS[:0], r"an array of shape \[0, 450, 3\] is empty"),
        (PIXELS[0, 0], r"an array of shape \[3\] is no picture"),
        (PIXELS[None, None], r"an array of shape \[1, 1, 300, 450, 3\] is no picture"),
        (3, "mine: an input of type int is no picture; wanted"),
        ({"image": PIXELS}, "an input of type dict is no picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_is_wanted(value, reason):
    with pytest.raises(ValueError, match=reason):
        read_value(CROPS[0], value, "mine")


def test_a_picture_of_pillow_that_a_file_could_not_be():
    with pytest.raises(MediaError, match="a picture of floating-point numbers, whose range it does not state"):
        read_value(CROPS[0], Pillow.fromarray(np.zeros((8, 8), np.float32)), "mine")
    with pytest.raises(MediaError, match="it has 450 x 300 pixels, more than max_pixels = 100"):
        read_value(Image(max_pixels=100), photo(), "mine")
    [media] = read_value(Image(max_pixels=100), PIXELS, "mine")
    with pytest.raises(MediaError, match="it has 450 x 300 pixels, more than max_pixels = 100"):
        decode(Image(max_pixels=100), media)
