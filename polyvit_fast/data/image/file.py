"""Image files in a form that DALI decodes correctly: JPEG, PNG and WebP as they are, other kinds decoded by Pillow beforehand."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyvit_fast.data.file_kinds import HEIC, describe_picture, name_kind
from polyvit_fast.data.image.jpeg import END, PILLOW_ERRORS, START, read_frame
from polyvit_fast.media import Media, MediaError

SIGNATURES = {"JPEG": rb"\xff\xd8", "PNG": rb"\x89PNG", "WebP": rb"RIFF....WEBP", "PPM": rb"P6"}
"""The first bytes of each kind of file that DALI is given."""
PIXELS_FAILURE = "truncated or damaged: its header is good, its pixels cannot be decoded"
SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 254, 258, 262, 339  # tags of a TIFF
CODESTREAM = b"\xff\x4f\xff\x51"  # with which a JPEG 2000 codestream begins
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2))
"""The operation that turns a picture upright, by EXIF orientation."""
PILLOW_KINDS = (
    *("BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "QOI", "ICO", "CUR", "ICNS", "PSD", "DDS", "FTEX"),
    *("BLP", "SGI", "SUN", "PCX", "DCX", "PIXAR", "MSP", "XBM", "XPM", "XVTHUMB", "GBR", "FLI", "PCD", "TGA"),
)
"""Pillow's names of the kinds that it decodes, in the order in which they are tried: the last two have no short signature.

Left out are kinds that run a program or that Pillow only identifies (EPS, WMF, BUFR, GRIB, HDF5, MPEG), that hold a file of any other
kind (IPTC) or measurements of unknown range (FITS, SPIDER, MCIDAS, IMT), and one that Pillow is about to drop (IM).
"""


def read_for_dali(media: Media, max_pixels: int) -> bytes:
    """A file that DALI decodes correctly or refuses. Raises MediaError when it is truncated or its kind is not supported."""
    content = media.read()
    if content.startswith(START):
        frame = read_frame(content, max_pixels)
        # DALI takes four colours for inverted ones even where the file does not say so.
        return _as_ppm(content, ["JPEG"], max_pixels) if frame and len(frame.sampling) > 3 else content
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(content)
        return content
    if re.match(SIGNATURES["WebP"], content, re.DOTALL):
        _check_webp(content)
        return content
    return _as_ppm(content, PILLOW_KINDS, max_pixels)


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise MediaError when a picture is larger than `max_pixels`."""
    if height * width > max_pixels:
        raise MediaError(f"it has {width} x {height} pixels, more than max_pixels = {max_pixels}")


def kind_of(content: bytes) -> str:
    """The key of `SIGNATURES` that fits, empty for another kind."""
    return next((kind for kind, signature in SIGNATURES.items() if re.match(signature, content, re.DOTALL)), "")


def make_specimen(kind: str) -> bytes:
    """A good and simple file with 8 × 8 pixels: a decoder that refuses it decodes no file of its kind."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


def _check_png(content: bytes) -> None:
    """Raise MediaError when the end is missing. What lies inside is protected by checksums."""
    at = 8
    while at + 12 <= len(content):
        if content[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    raise MediaError("truncated: the PNG's end is missing")


def _check_webp(content: bytes) -> None:
    size = 8 + int.from_bytes(content[4:8], "little")
    if len(content) < size:
        raise MediaError(f"truncated: the WebP has {len(content)} of its {size} bytes")


def picture_to_ppm(picture: Any, max_pixels: int, content: bytes = b"") -> bytes:
    """A picture of Pillow, upright, as a PPM file; `content` is the file that it was opened from.

    Raises MediaError when it is too large, damaged or of colours that are not known.
    """
    from PIL import Image

    try:
        check_size(picture.height, picture.width, max_pixels)
        tags = getattr(picture, "tag_v2", {})
        _check_levels(content, picture, tags)
        upright = _turn_upright(picture)
        if upright.mode[0] == "I":
            pixels = _rgb_of_16_bits(upright, tags)
        else:
            pixels = (upright if upright.mode == "RGB" else upright.convert("RGB")).tobytes()
    except Image.DecompressionBombError as error:  # Pillow's own limit, for pictures inside a file
        raise MediaError(f"it has more pixels than its header states, or than Pillow decodes ({error})") from error
    except PILLOW_ERRORS as error:
        raise MediaError(f"{PIXELS_FAILURE} ({error})") from error
    return pixels_to_ppm(upright.size, pixels)


def pixels_to_ppm(size: tuple[int, int], pixels: bytes) -> bytes:
    """A PPM file of RGB pixels, row by row; `size` is (width, height)."""
    return b"P6 %d %d 255\n" % size + pixels


def _as_ppm(content: bytes, kinds: Sequence[str], max_pixels: int) -> bytes:
    """The first picture in a file of one of these kinds, upright, as a PPM file."""
    from PIL import Image

    try:
        picture = _open(content, kinds)
        _check_length(content, picture.format)
    except Image.DecompressionBombError as error:
        raise MediaError(f"it has more pixels than its header states, or than Pillow decodes ({error})") from error
    except PILLOW_ERRORS as error:
        raise MediaError(f"{PIXELS_FAILURE} ({error})") from error
    return picture_to_ppm(picture, max_pixels, content)


def _open(content: bytes, kinds: Sequence[str]) -> Any:
    """The picture after its header was read. Raises MediaError when it is of none of these kinds, or its header is damaged."""
    from PIL import Image

    Image.init()
    if name_kind(content) == HEIC:
        _learn_heic()
    damaged = ""
    for kind in kinds:
        if kind not in Image.OPEN:
            continue
        open_picture, accepts = Image.OPEN[kind]
        try:
            accepted = accepts is None or accepts(content[:16])
            if accepted is True:
                return open_picture(io.BytesIO(content), "")
            damaged = damaged or accepted or ""  # a text says that Pillow was built without a library
        except PILLOW_ERRORS as error:
            if accepts:
                damaged = damaged or f"truncated, damaged or of a sort that is not supported: its {kind} header cannot be read ({error})"
    raise MediaError(damaged or f"not an image that can be decoded{describe_picture(content)}")


def _learn_heic() -> None:
    """Have Pillow decode HEIC from now on. Raises MediaError when the package that does so is not installed."""
    try:
        import pillow_heif
    except ModuleNotFoundError:
        raise MediaError(
            f"it is {HEIC}, for which pillow-heif is not installed: pip install 'polyvit-fast[heic]', or convert it to JPEG"
        ) from None
    pillow_heif.register_heif_opener(thumbnails=False)


def _check_length(content: bytes, kind: str) -> None:
    """Raise MediaError when the end of a file is missing and Pillow would show a smaller picture, or one with holes."""
    size = int.from_bytes(content[4:8], "big")
    if kind == "ICNS" and len(content) < size:
        raise MediaError(f"truncated: the ICNS has {len(content)} of its {size} bytes")
    if kind == "JPEG2000" and content.find(END, content.find(CODESTREAM)) < 0:
        raise MediaError("truncated: the JPEG 2000's end is missing")


def _check_levels(content: bytes, picture: Any, tags: Mapping[int, Any]) -> None:
    """Raise MediaError when the file does not state which colours its numbers are. `tags` are those of a TIFF."""
    if tags.get(SUBFILE_TYPE, 0) & 1:  # the first picture of a camera's DNG, NEF or ARW, which all begin like a TIFF
        raise MediaError("its first picture is a thumbnail of another one, as in a camera's raw file: convert it to JPEG or PNG")
    if picture.format == "PCX" and picture.mode == "L" and content[-769:-768] != b"\x0c":
        raise MediaError("truncated: the palette at the end of the PCX is missing")
    kind = tags.get(SAMPLE_FORMAT, (1,))[0]
    if kind != 1 or picture.mode == "F" or (picture.mode == "I" and picture.format != "PPM"):
        what = picture.format or "picture"
        found = "floating-point" if picture.mode == "F" else "signed" if kind == 2 else "32-bit"
        raise MediaError(f"a {what} of {found} numbers, whose range it does not state; unsigned ones of up to 16 bits are supported")


def _turn_upright(picture: Any) -> Any:
    """The picture, decoded and turned as its EXIF tag says."""
    from PIL import ExifTags, Image

    picture.load()
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except PILLOW_ERRORS:  # a damaged tag does not make a damaged picture
        orientation = None
    return picture.transpose(Image.Transpose[TURNS[orientation]]) if orientation in TURNS else picture


def _rgb_of_16_bits(picture: Any, tags: Mapping[int, Any]) -> bytes:
    """Levels of 16 bits, or as many as a TIFF has, rounded to 8: Pillow's own conversion clips them at 255."""
    top = (1 << tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    levels = (np.asarray(picture).astype(np.uint32) * 255 + top // 2) // top
    grey = (255 - levels if tags.get(PHOTOMETRIC) == 0 else levels).astype(np.uint8)
    return grey[..., None].repeat(3, -1).tobytes()
