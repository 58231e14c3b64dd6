import io
import re
import struct
import sys
from contextlib import suppress
from random import Random

import numpy as np
import pytest
from image_kinds import GREY, GREY_ALPHA, KINDS, LEVELS_16, RGB, saved, tiff
from long_forms import every
from PIL import ExifTags, ImageOps
from PIL import Image as Pillow

from polyvit_fast.data.image import file as module
from polyvit_fast.data.image.file import PILLOW_KINDS, check_size, read_for_dali
from polyvit_fast.media import Media, MediaError

LIMIT = 10**6


def picture(height=40, width=60, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    return Pillow.fromarray(np.stack([4 * x, 5 * y, 2 * (x + y)], -1).astype(np.uint8)).convert(mode)


def read(tmp_path, content, max_pixels=LIMIT):
    (tmp_path / "file").write_bytes(content)
    return read_for_dali(Media(str(tmp_path / "file")), max_pixels)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P"), ("WEBP", "RGB")])
def test_good_files_that_dali_decodes_stay_as_they_are(tmp_path, kind, mode):
    content = saved(picture(mode=mode), kind)
    for more in (b"", b"appended" * 1000):
        assert read(tmp_path, content + more) == content + more


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"save_all": True, "append_images": [picture(40, 60).rotate(180)]}])
def test_a_gif_becomes_its_first_frame_without_loss(tmp_path, options):
    content = saved(picture(mode="P"), "GIF", **options)
    converted = read(tmp_path, content)
    with Pillow.open(io.BytesIO(content)) as gif, Pillow.open(io.BytesIO(converted)) as ppm:
        assert ppm.format == "PPM"
        assert np.array_equal(np.asarray(ppm), np.asarray(gif.convert("RGB")))


def test_the_size_of_a_gif_is_that_of_screen_and_first_frame(tmp_path):
    content = bytearray(saved(picture(mode="P"), "GIF", comment=b"a comment " * 50))
    with pytest.raises(MediaError, match="60 x 40 pixels, more than max_pixels = 2399"):
        read(tmp_path, bytes(content), max_pixels=2399)
    frame = content.index(b",\0\0\0\0" + struct.pack("<HH", 60, 40))
    content[frame + 1 : frame + 9] = struct.pack("<4H", 1000, 2000, 60, 40)
    with pytest.raises(MediaError, match="1060 x 2040 pixels, more than max_pixels = 1000000"):
        read(tmp_path, bytes(content))
    content[frame + 1 : frame + 9] = struct.pack("<4H", 1000, 2000, 60000, 40000)
    with pytest.raises(MediaError, match="it has more pixels than its header states, or than Pillow decodes"):
        read(tmp_path, bytes(content))


CUT = [name for name in KINDS if not name.startswith("jpeg") and "orientation" not in name and "plain" not in name]


@pytest.mark.parametrize("name", every(2, CUT))
def test_a_cut_file_is_never_another_picture(tmp_path, name):
    whole = read(tmp_path, KINDS[name], 2 * LIMIT)
    random = Random(name)
    length = len(KINDS[name])
    cuts = {length - 1, length - 30, length // 2, length // 10, 100, 20, 3, *(random.randrange(length) for _ in range(10))}
    right = 0
    for cut in cuts:
        try:
            content = read(tmp_path, KINDS[name][:cut], 2 * LIMIT)
        except MediaError as error:
            right += bool(re.search("truncated|not an image that can be decoded(; it begins with|: it is)|the file is empty", str(error)))
        else:
            right += content == whole  # what is missing is no part of the picture
    assert right == len(cuts)


@pytest.mark.parametrize("name", every(3, [name for name in KINDS if "orientation" not in name]))
def test_damaged_bytes_give_a_picture_or_a_reason(tmp_path, name):
    random = Random(name)
    for _ in range(20):
        content = bytearray(KINDS[name])
        for _ in range(random.randrange(1, 4)):
            content[int(random.random() ** 3 * len(content))] = random.choice([0, 255, 128, random.randrange(256)])
        with suppress(MediaError):
            assert read(tmp_path, bytes(content))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + saved(picture(10, 10), "JPEG")}])
def test_a_jpeg_needs_its_end(tmp_path, options):
    content = saved(picture(), "JPEG", **options)
    scan = content.rindex(b"\xff\xda")
    for length in (3, 100, scan, scan + 30, len(content) - 2):
        with pytest.raises(MediaError, match="truncated: the JPEG's end is missing"):
            read(tmp_path, content[:length])
    for more in (b"\0", b"appended" * 1000):
        assert read(tmp_path, content + more) == content + more


def test_fill_bytes_between_the_markers_of_a_jpeg(tmp_path):
    content = saved(picture(), "JPEG")
    filled = content[:2] + b"\xff" * 5 + content[2:]
    assert read(tmp_path, filled) == filled
    with pytest.raises(MediaError, match="truncated"):
        read(tmp_path, filled[:-2])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (saved(picture(mode="F"), "TIFF"), "TIFF of floating-point numbers"),
        (saved(picture(mode="I"), "TIFF"), "TIFF of signed numbers"),
        (tiff(GREY.astype(np.uint32), photometric=1), "TIFF of 32-bit numbers"),
        (tiff(GREY.astype(np.int8), photometric=1, tags={339: [2]}), "TIFF of signed numbers"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "PPM of floating-point numbers"),
    ],
)
def test_numbers_without_a_known_range_are_refused(tmp_path, content, found):
    with pytest.raises(MediaError, match=f"{found}, whose range it does not state; unsigned ones of up to 16 bits are supported"):
        read(tmp_path, content)


SIXTEEN_BITS = {
    "TIFF": (tiff(LEVELS_16, photometric=1), LEVELS_16),
    "big-endian TIFF": (tiff(LEVELS_16, photometric=1, order=">"), LEVELS_16),
    "inverted TIFF": (tiff(LEVELS_16, photometric=0), 65535 - LEVELS_16),
    "PGM": (b"P5 64 48 65535\n" + LEVELS_16.astype(">u2").tobytes(), LEVELS_16),
    "JPEG 2000": (saved(Pillow.fromarray(LEVELS_16), "JPEG2000"), LEVELS_16),
    "PGM up to 1000": (b"P5 64 48 1000\n" + (LEVELS_16 // 66).astype(">u2").tobytes(), LEVELS_16 // 66 * 65.535),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_rounded_to_eight(tmp_path, name):
    content, levels = SIXTEEN_BITS[name]
    with Pillow.open(io.BytesIO(read(tmp_path, content))) as ppm:
        assert np.abs(np.asarray(ppm) - (levels / 257)[..., None]).max() <= 0.51


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(picture(), "EPS"), "not an image that can be decoded: it is an EPS drawing"),
        (b"SIMPLE  =                    T".ljust(2880) + bytes(2880), "not an image that can be decoded: it is a picture in FITS"),
        (
            tiff(GREY_ALPHA.astype(np.uint16), photometric=1, tags={338: [2]}),
            "of a sort that is not supported: its TIFF header .*unknown pixel mode",
        ),
        (tiff(RGB, big=True, order=">"), "of a sort that is not supported: its TIFF header"),
        (tiff(RGB, photometric=2, tags={254: [1]}), "its first picture is a thumbnail of another one, as in a camera's raw file"),
        (KINDS["pcx-p"][:-10], "truncated: the palette at the end of the PCX is missing"),
        (KINDS["png-rgb"][:-12], "truncated: the PNG's end is missing"),
        (KINDS["icns"][: len(KINDS["icns"]) * 97 // 100], r"truncated: the ICNS has \d+ of its \d+ bytes"),
        (KINDS["icns"][:-1], r"truncated: the ICNS has \d+ of its \d+ bytes"),
        (KINDS["jp2-tiles"][:710], "truncated: the JPEG 2000's end is missing"),  # between two tiles
        (KINDS["j2k"][:-2], "truncated: the JPEG 2000's end is missing"),
        (KINDS["webp"][:-5], r"truncated: the WebP has \d+ of its \d+ bytes"),
        (KINDS["ppm"][:-5], "truncated or damaged: its header is good, its pixels cannot be decoded"),
        (b"<html>404 not found</html>", "not an image that can be decoded: it is an HTML page, perhaps from a download that failed"),
        (bytes(1000), "not an image that can be decoded: it is nothing but zeros"),
    ],
)
def test_what_is_refused_says_why(tmp_path, content, reason):
    with pytest.raises(MediaError, match=reason):
        read(tmp_path, content)


def heic(pixels=RGB, **options):
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(Pillow.fromarray(pixels)).save(file, quality=-1, chroma=444, matrix_coefficients=0, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", every(2, range(1, 9)))
def test_a_heic_picture_is_read_without_loss_and_upright(tmp_path, orientation):
    """The file holds the turn itself, and what its EXIF tag says is the same turn."""
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = Pillow.fromarray(RGB)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    with Pillow.open(io.BytesIO(read(tmp_path, heic(exif=exif.tobytes())))) as ppm:
        assert np.array_equal(np.asarray(ppm), np.asarray(ImageOps.exif_transpose(turned)))


def test_a_cut_heic_picture_is_never_another_one(tmp_path):
    content = heic()
    for cut in (1, 30, len(content) // 2, len(content) - 200):
        with pytest.raises(MediaError, match="truncated"):
            read(tmp_path, content[:-cut])
    with pytest.raises(MediaError, match=f"pixels, more than max_pixels = {RGB[..., 0].size - 1}"):
        read(tmp_path, content, RGB[..., 0].size - 1)


def test_without_its_package_a_heic_picture_says_what_it_needs(tmp_path, monkeypatch):
    content = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        MediaError, match=r"it is a HEIC picture, for which pillow-heif is not installed: pip install 'polyvit-fast\[heic\]'"
    ):
        read(tmp_path, content)


def test_no_kind_that_pillow_decodes_was_forgotten():
    refused = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FITS", "SPIDER", "MCIDAS", "IMT", "IM"}
    Pillow.init()
    assert {*Pillow.OPEN, "HEIF"} == {*PILLOW_KINDS, "JPEG", "PNG", "WEBP"} | refused


def test_a_defect_is_no_broken_file(tmp_path, monkeypatch):
    for defect in (AttributeError, NameError, TypeError, ImportError):

        def fail(*args, defect=defect):
            raise defect("a defect")

        monkeypatch.setattr(module, "_turn_upright", fail)
        with pytest.raises(defect, match="a defect"):
            read(tmp_path, KINDS["gif"])


def test_the_limit_counts_pixels():
    check_size(1000, 1000, LIMIT)
    with pytest.raises(MediaError, match="it has 1001 x 1000 pixels, more than max_pixels = 1000000"):
        check_size(1000, 1001, LIMIT)
