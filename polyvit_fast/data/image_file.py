"""What image files need before DALI sees them: GIF it cannot decode, and some damaged or odd files it would decode wrongly, silently."""

from __future__ import annotations

import io
import re
import struct

from polyvit_fast.media import Media, MediaError

SIGNATURES = {"JPEG": rb"\xff\xd8", "PNG": rb"\x89PNG", "WebP": rb"RIFF....WEBP", "BMP": rb"BM", "TIFF": rb"II\*\0|MM\0\*", "PPM": rb"P6"}
"""How files of each kind begin."""


def read_for_dali(media: Media, max_pixels: int) -> bytes:
    """A file that DALI decodes or refuses, never mistakes. Raises MediaError when it is truncated or of a kind that is not supported."""
    content = media.read()
    if content.startswith(b"GIF8"):
        return _gif_as_ppm(content, max_pixels)
    if content.startswith(b"\xff\xd8") and not _has_jpeg_end(content):
        raise MediaError("truncated: the JPEG's end is missing")
    if content.startswith((b"II*\0", b"MM\0*")):
        _check_tiff(content)
    return content


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise MediaError when a picture is larger than `max_pixels`."""
    if height * width > max_pixels:
        raise MediaError(f"it has {width} x {height} pixels, more than max_pixels = {max_pixels}")


def kind_of(content: bytes) -> str:
    """A key of `SIGNATURES`, or nothing for another kind."""
    return next((kind for kind, signature in SIGNATURES.items() if re.match(signature, content, re.DOTALL)), "")


def specimen(kind: str) -> bytes:
    """A picture of 8 × 8 pixels, whole and of the plainest sort: whatever cannot decode it decodes none of its kind."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


def _gif_as_ppm(content: bytes, max_pixels: int) -> bytes:
    """The first frame of a GIF, which DALI cannot decode, as a file that it can."""
    from PIL import GifImagePlugin

    try:
        check_size(*_gif_size(content), max_pixels)
        with GifImagePlugin.GifImageFile(io.BytesIO(content)) as picture:
            return b"P6 %d %d 255\n" % picture.size + picture.convert("RGB").tobytes()
    except MediaError:
        raise
    except Exception as error:  # on damaged files Pillow raises many kinds
        raise MediaError(f"not a GIF that can be decoded ({error})") from error


def _gif_size(content: bytes) -> tuple[int, int]:
    """(height, width) that hold both the screen and the first frame, which may be the larger one. Raises IndexError when cut."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while content[at] == 0x21:  # extensions: chains of blocks that begin with their length
        at += 2
        while content[at]:
            at += content[at] + 1
        at += 1
    left, top, frame_width, frame_height = struct.unpack_from("<4H", content, at + 1)
    return max(height, top + frame_height), max(width, left + frame_width)


def _has_jpeg_end(content: bytes) -> bool:
    """Whether an end mark follows the first scan; without this, a crop from the part that is there would hide the truncation."""
    at = 2
    while content[at : at + 1] == b"\xff":
        marker = content[at + 1 : at + 2]
        if marker == b"\xda":
            return content.endswith(b"\xff\xd9") or content.find(b"\xff\xd9", at) >= 0
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return at < len(content)  # no marker where one should be: the decoder will tell


def _check_tiff(content: bytes) -> None:
    """Refuse grey with alpha, which DALI mixes up, and floating-point numbers, which it takes to end at 1."""
    order = "<" if content.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (num_tags,) = struct.unpack_from(f"{order}H", content, start)
        tags = {}
        for at in range(start + 2, start + 2 + 12 * num_tags, 12):
            tag, _, count, value = struct.unpack_from(f"{order}HHIH", content, at)
            if tag in (258, 277, 339) and count > 2:  # four bytes hold two numbers; more stand elsewhere
                (value,) = struct.unpack_from(f"{order}H", content, *struct.unpack_from(f"{order}I", content, at + 8))
            tags[tag] = value
    except struct.error:
        raise MediaError("truncated or damaged: its table of tags cannot be read") from None
    bits, samples, kind = tags.get(258, 1), tags.get(277, 1), tags.get(339, 1)
    if bits > 16 or samples not in (1, 3, 4) or kind != 1:
        kinds = {1: "unsigned", 2: "signed", 3: "floating-point"}
        found = f"{samples} {kinds.get(kind, 'unknown')} numbers of {bits} bits a pixel"
        raise MediaError(f"a TIFF with {found}; 1, 3 or 4 unsigned numbers of up to 16 bits are supported")
