import io
import struct

import numpy as np
import pytest
from PIL import Image as Pillow

from polyvit_fast.data.image_file import check_size, read_for_dali
from polyvit_fast.media import Media, MediaError

LIMIT = 10**6


def picture(height=40, width=60, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    return Pillow.fromarray(np.stack([4 * x, 5 * y, 2 * (x + y)], -1).astype(np.uint8)).convert(mode)


def saved(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def read(tmp_path, content, max_pixels=LIMIT):
    (tmp_path / "file").write_bytes(content)
    return read_for_dali(Media(str(tmp_path / "file")), max_pixels)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "P"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK")]
)
def test_good_files_stay_as_they_are(tmp_path, kind, mode):
    content = saved(picture(mode=mode), kind)
    assert read(tmp_path, content) == content


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
    content[frame + 1 : frame + 9] = struct.pack("<4H", 1000, 2000, 60000, 40000)
    with pytest.raises(MediaError, match="61000 x 42000 pixels, more than max_pixels = 1000000"):
        read(tmp_path, bytes(content))


@pytest.mark.parametrize("length", [6, 12, 700, 790])
def test_a_cut_gif_is_refused(tmp_path, length):
    with pytest.raises(MediaError, match="not a GIF that can be decoded"):
        read(tmp_path, saved(picture(mode="P"), "GIF")[:length])


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
    ("image", "found"),
    [
        (picture(mode="LA"), "2 unsigned numbers of 8 bits a pixel"),
        (picture(mode="F"), "1 floating-point numbers of 32 bits a pixel"),
        (picture(mode="I"), "1 signed numbers of 32 bits a pixel"),
    ],
)
def test_tiffs_that_dali_mistakes_are_refused(tmp_path, image, found):
    with pytest.raises(MediaError, match=f"a TIFF with {found}; 1, 3 or 4 unsigned numbers of up to 16 bits are supported"):
        read(tmp_path, saved(image, "TIFF"))


@pytest.mark.parametrize(("mark", "order"), [(b"II*\0", "<"), (b"MM\0*", ">")])
def test_tags_of_a_tiff_in_both_byte_orders(tmp_path, mark, order):
    def tiff(kind):
        tags = [(258, 3, 3, 100), (277, 3, 1, 3), (339, 3, 3, 106)]
        entries = [struct.pack(f"{order}HHI", *tag[:3]) + struct.pack(f"{order}I" if tag[2] > 1 else f"{order}Hxx", tag[3]) for tag in tags]
        table = mark + struct.pack(f"{order}IH", 8, 3) + b"".join(entries)
        return table.ljust(100, b"\0") + struct.pack(f"{order}6H", 16, 16, 16, kind, kind, kind)

    assert read(tmp_path, tiff(1)) == tiff(1)
    with pytest.raises(MediaError, match="3 floating-point numbers of 16 bits"):
        read(tmp_path, tiff(3))
    with pytest.raises(MediaError, match="its table of tags cannot be read"):
        read(tmp_path, tiff(1)[:30])


def test_the_limit_counts_pixels():
    check_size(1000, 1000, LIMIT)
    with pytest.raises(MediaError, match="it has 1001 x 1000 pixels, more than max_pixels = 1000000"):
        check_size(1000, 1001, LIMIT)
