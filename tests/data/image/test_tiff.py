import io
import struct

import pytest
from generators import rngs
from image_files import photo
from image_kinds import KINDS, saved
from PIL import Image as Pillow

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.image.tiff import check_complaints, check_strips
from polyvit_fast.media import Media, MediaError

LIMIT = 10**6
PHOTO = photo(160, 200)
WHOLE = {
    "jpeg": saved(PHOTO, "TIFF", compression="jpeg"),
    "jpeg-grey": saved(PHOTO.convert("L"), "TIFF", compression="jpeg"),
    "jpeg-ycbcr": saved(PHOTO.convert("YCbCr"), "TIFF", compression="jpeg"),
    "jpeg-strips": saved(PHOTO, "TIFF", compression="jpeg", tiffinfo={278: 16}),
    "tiff_adobe_deflate": saved(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "tiff_deflate": saved(PHOTO, "TIFF", compression="tiff_deflate"),
    **{kind: saved(PHOTO, "TIFF", compression=kind) for kind in ("lzma", "zstd", "tiff_lzw", "packbits")},
    **{kind: saved(PHOTO.convert("1"), "TIFF", compression=kind) for kind in ("group3", "group4", "tiff_ccitt")},
}


@pytest.fixture(scope="module")
def thorough():
    return build_decoder(Image(size=32).thorough(), batch=2, train=False, num_threads=1)


def refusal(decoder, path, content):
    path.write_bytes(content)
    try:
        decoder([Media(str(path))], rngs(1))
    except MediaError as error:
        return str(error)
    return ""


def damaged(content, put):
    """With other bytes over the last two thirds of its last strip."""
    with Pillow.open(io.BytesIO(content)) as picture:
        start, size = picture.tag_v2[273][-1], picture.tag_v2[279][-1]
    at, end = start + size // 3, start + size
    return content[:at] + put(end - at) + content[end:]


def end_and_zeros(length):
    return b"\xff\xd9".ljust(length, b"\0")


@pytest.mark.parametrize("name", WHOLE)
def test_damage_that_libtiff_fills_up_is_refused_without_a_stray_word(tmp_path, thorough, capfd, name):
    path = tmp_path / "a.tif"
    assert refusal(thorough, path, WHOLE[name]) == ""
    for put in (end_and_zeros, bytes):
        assert "truncated" in refusal(thorough, path, damaged(WHOLE[name], put))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("group3", "truncated or damaged: libtiff says: Fax3Decode1D: Bad code word"),
        ("lzma", "truncated or damaged: libtiff says: LZMADecode: Decoding error at scanline"),
        ("jpeg", "truncated or damaged: data of the JPEG is missing"),
        ("tiff_ccitt", "truncated or damaged: the TIFF has zeros where fax codes should be"),
        ("tiff_adobe_deflate", "truncated or damaged: a strip or tile of the TIFF"),
    ],
)
def test_the_reason_is_the_librarys(tmp_path, thorough, name, reason):
    assert refusal(thorough, tmp_path / "a.tif", damaged(WHOLE[name], end_and_zeros)).startswith(reason)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("tiff")])
def test_good_files_are_good(tmp_path, thorough, name):
    assert refusal(thorough, tmp_path / "a.tif", KINDS[name]) == ""


def test_large_strips_of_one_colour_are_good(tmp_path, thorough):
    black = Pillow.new("RGB", (2000, 2000))
    for kind in ("tiff_adobe_deflate", "jpeg", "group4"):
        content = saved(
            black.convert("1") if kind == "group4" else black, "TIFF", compression=kind, tiffinfo={278: 2000}, strip_size=1 << 30
        )
        assert refusal(thorough, tmp_path / "a.tif", content) == ""


def test_a_checksum_of_deflate_counts(tmp_path, thorough):
    content = bytearray(WHOLE["tiff_adobe_deflate"])
    with Pillow.open(io.BytesIO(content)) as picture:
        end = picture.tag_v2[273][0] + picture.tag_v2[279][0]
    content[end - 1] ^= 1
    assert "incorrect data check" in refusal(thorough, tmp_path / "a.tif", bytes(content))


@pytest.mark.parametrize("kind", ["tiff_ccitt", "group4"])
def test_zeros_behind_the_codes_are_no_damage(tmp_path, thorough, kind):
    content = WHOLE[kind]
    with Pillow.open(io.BytesIO(content)) as picture:
        tags = {tag: picture.tag_v2[tag] for tag in (273, 279)}
    (start,), (size,) = tags[273], tags[279]
    codes = content[start : start + size] + bytes(50)
    field = struct.pack("<HHII", 273, 4, 1, start)
    assert field in content
    padded = content.replace(field, struct.pack("<HHII", 273, 4, 1, len(content)))
    field = struct.pack("<HHII", 279, 4, 1, size)
    assert field in padded
    padded = padded.replace(field, struct.pack("<HHII", 279, 4, 1, len(codes))) + codes
    assert refusal(thorough, tmp_path / "a.tif", padded) == ""


def test_the_guilty_one_of_a_batch_is_refused(tmp_path, thorough):
    (tmp_path / "good.tif").write_bytes(WHOLE["group3"])
    (tmp_path / "bad.tif").write_bytes(damaged(WHOLE["group3"], end_and_zeros))
    good, bad = (Media(str(tmp_path / name)) for name in ("good.tif", "bad.tif"))
    assert len(thorough([good, good], rngs(2))) == 2
    for pair in ([good, bad], [bad, good]):
        with pytest.raises(MediaError, match="Bad code word"):
            thorough(pair, rngs(2))


@pytest.mark.parametrize(
    "line",
    [
        "TIFFReadDirectory: Warning, Unknown field with tag 60000 (0xea60) encountered.",
        '_TIFFVSetField: tempfile.tif: Bad value 0 for "ResolutionUnit" tag.',
        "Fax3Decode1D: Warning, Line length mismatch at line 0 of strip 0",
        "lib/PIL/TiffImagePlugin.py:982: UserWarning: Corrupt EXIF data.",
    ],
)
def test_what_is_harmless_is_let_pass(line):
    check_complaints(WHOLE["group3"], [line])


def test_other_kinds_are_left_alone():
    for name in ("png-rgb", "jpeg-4:2:0", "gif"):
        check_complaints(KINDS[name], ["Fax4Decode: Bad code word at line 66 of strip 0 (x 27)."])
        check_strips(KINDS[name], LIMIT)
