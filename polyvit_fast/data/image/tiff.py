"""Damaged strips and tiles of a TIFF, for which libtiff fills the gap so that Pillow shows the picture all the same.

libtiff reports most damage (`check_complaints`), but not that of JPEG, Deflate and blank fax codes: there each strip or tile is examined
(`check_strips`). Damaged bytes that happen to be valid codes are not found.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import Any

from polyvit_fast.data.image.jpeg import PILLOW_ERRORS, START, check_codes, read_frame
from polyvit_fast.media import MediaError

COMPRESSION, FILL_ORDER, JPEG_TABLES = 259, 266, 347
STRIPS, TILES = (273, 279), (324, 325)
"""The tags of their offsets and of their sizes."""
JPEG, DEFLATE, FAX = 7, (8, 32946), (2, 4)
CHUNK_BYTES = 1 << 20
BLANK = b"\0\0\0"  # no code of these fax encodings has as many zeros
BLACK_AND_WHITE = bytes(range(0x31, 0xE1, 7))

# Complaints about tags are left out: they do not change the picture, or Pillow refuses it.
_COMPLAINT = re.compile(r"^(\w*Decode\w*|TIFFFill\w*|TIFFRead\w*(Strip|Tile|Scanline)|\w*JPEG\w*|tempfile\.tif): (?!Warning)")


def check_complaints(content: bytes, lines: list[str]) -> None:
    """Raise MediaError when libtiff, decoding this TIFF, has written to standard error that data are damaged."""
    for line in lines if _is_tiff(content) else ():
        if _COMPLAINT.search(line):
            raise MediaError(f"truncated or damaged: libtiff says: {line.strip()}")


def check_strips(content: bytes, max_pixels: int) -> None:
    """Raise MediaError when a strip or tile of the first picture of this TIFF, which Pillow decodes, is damaged."""
    if not _is_tiff(content):
        return
    from PIL import TiffImagePlugin

    try:
        with TiffImagePlugin.TiffImageFile(io.BytesIO(content)) as picture:
            tags = dict(picture.tag_v2)
    except PILLOW_ERRORS:
        return  # another kind of file that begins in the same way
    compression, tables = tags.get(COMPRESSION), tags.get(JPEG_TABLES)
    filled = bytearray(content)
    for start, end in _find_strips(tags):
        part = content[start:end]
        if compression == JPEG and part.startswith(START):
            _check_jpeg(tables[:-2] + part[2:] if isinstance(tables, bytes) else part, max_pixels)
        elif compression in DEFLATE and tags.get(FILL_ORDER, 1) == 1:
            _check_deflate(part)
        elif compression in FAX and BLANK in part:
            blank = part.index(BLANK)
            filled[start + blank : start + len(part)] = (BLACK_AND_WHITE * len(part))[: len(part) - blank]
    # A decoder that does not need these bytes shows the same picture whatever they are.
    if filled != content and _pixels(content) != _pixels(bytes(filled)):
        raise MediaError("truncated or damaged: the TIFF has zeros where fax codes should be")


def _find_strips(tags: dict[int, Any]) -> list[tuple[int, int]]:
    """(start, end) of each strip or tile."""
    starts, sizes = TILES if TILES[0] in tags else STRIPS
    ranges = zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False)
    return [(start, start + size) for start, size in ranges if isinstance(start, int) and isinstance(size, int) and size]


def _is_tiff(content: bytes) -> bool:
    return content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _check_jpeg(part: bytes, max_pixels: int) -> None:
    frame = read_frame(part, max_pixels)
    if frame and frame.height * frame.width <= max_pixels:
        check_codes(part)


def _check_deflate(part: bytes) -> None:
    """Raise MediaError unless the data end with their checksum, which libtiff does not read."""
    stream = zlib.decompressobj()
    try:
        while not stream.eof and stream.decompress(part, CHUNK_BYTES):
            part = stream.unconsumed_tail
    except zlib.error as error:
        raise MediaError(f"truncated or damaged: a strip or tile of the TIFF cannot be decompressed ({error})") from error
    if not stream.eof:
        raise MediaError("truncated or damaged: a strip or tile of the TIFF lacks the end of its compressed data")


def _pixels(content: bytes) -> bytes:
    from PIL import TiffImagePlugin

    with TiffImagePlugin.TiffImageFile(io.BytesIO(content)) as picture:
        try:
            return picture.tobytes()
        except PILLOW_ERRORS:
            return b""
