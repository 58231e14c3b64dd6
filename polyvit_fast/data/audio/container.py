"""Whether a file holds all that its container says: MP4, Matroska, Ogg, WMA, AVI, FLV and MP3, which FFmpeg decodes as far as they go.

The sizes that a container states are exact, where the length that FFmpeg tells may be a guess. A container that was written to a pipe
states none, and is taken as it is.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from polyvit_fast.data.layout import ASF_HEADER, BOXES, EBML, read_layout
from polyvit_fast.media import Media, MediaError

START_BYTES = 4096  # more than any header of fixed size is long
LEAST_HELD = 0.99  # of the promised bytes: some programs count their own header or a tag
PIPED = 0x7FFF0000  # programs that write to a pipe promise at least so many bytes, as they cannot know
SEARCHED_BYTES = 1 << 20  # at a time
MAX_PARTS = 1000  # a file of zeros would be millions of them
OGG_PAGE_BYTES = 65_307  # the largest
INFO, DURATION, CLUSTER = 0x1549A966, 0x4489, 0x1F43B675


class Part:
    """An open file from a place on: what is before it is another's, as a tag's."""

    def __init__(self, file: io.BufferedReader, offset: int = 0) -> None:
        self.file, self.offset = file, offset
        self.num_bytes = max(0, file.seek(0, io.SEEK_END) - offset)
        self.start = b""
        self.start = self.read(0, START_BYTES)

    def read(self, at: int, size: int) -> bytes:
        """So many bytes, zeros after the end."""
        if at + size <= len(self.start):
            return self.start[at : at + size]
        there = max(0, min(size, self.num_bytes - at))
        if there:
            self.file.seek(self.offset + at)
        return self.file.read(there).ljust(size, b"\0")

    def unpack(self, form: str, at: int) -> tuple[Any, ...]:
        """Numbers and bytes as `struct.unpack` gives them."""
        return struct.unpack(form, self.read(at, struct.calcsize(form)))

    def find(self, first: bytes, at: int, third: bytes = b"") -> int | None:
        """From a place on, where a file begins: with its first bytes, and those from the eighth on."""
        for start in range(at, self.num_bytes, SEARCHED_BYTES):
            piece = self.read(start, SEARCHED_BYTES + START_BYTES)
            found = piece.find(first)
            while 0 <= found < SEARCHED_BYTES:
                if piece.startswith(third, found + 8):
                    return start + found
                found = piece.find(first, found + 1)
        return None


def check_container(part: Part) -> None:
    """Raise MediaError when a file ends before its container does, or goes on with another one that FFmpeg does not read."""
    start, num_bytes = part.start, part.num_bytes
    if start.startswith(b"#!AMR"):
        check_joint(part, part.find(b"#!AMR", 1))
    if start.startswith(b"OggS"):
        _check_ogg(part)
        return
    if not part.offset and (start[4:8] in BOXES or start.startswith((EBML, ASF_HEADER, b"FLV"))):
        layout = read_layout(part.file)
        check_joint(part, None if layout.read_on else next(iter(layout.joints), None))
        promised = layout.end
    elif start.startswith(b"RIFF") and start.startswith(b"AVI ", 8):
        promised = _avi_bytes(part)
    else:
        promised = _mp3_bytes(start)
    if start.startswith(b"FLV\1"):  # a cut between two tags shows here alone
        promised = max(promised, _flv_bytes(part))
    if num_bytes < LEAST_HELD * promised:
        raise MediaError(format_cut(num_bytes, promised, 0))


def check_joint(part: Part, at: int | None) -> None:
    """Raise MediaError when another file begins at a place."""
    if at is not None:
        byte = part.offset + at
        raise MediaError(f"another recording begins at byte {byte}, where a second file was joined to it: split it there")


def states_duration(media: Media) -> bool:
    """Whether a Matroska file says how long it is; where it does not, FFmpeg divides its size by a bit rate."""
    with media.open() as file:
        part = Part(file)
        _, at, _ = _element(part, _element(part, 0)[2])  # of the segment
        for _ in range(MAX_PARTS):
            name, begin, end = _element(part, at)
            if name == DURATION:
                return True
            if name in (0, CLUSTER):
                return False
            at = begin if name == INFO else end
    return False


def format_cut(held: float, promised: float, per_second: float) -> str:
    """The message for a sound that has too little, in seconds where bytes (or samples) can be turned into them, else in bytes."""
    if not per_second:
        return f"truncated: it has {held:.0f} of the {promised:.0f} bytes that its header promises"
    seconds, stated = held / per_second, promised / per_second
    digits = 1 if stated >= 1 and f"{seconds:.1f}" != f"{stated:.1f}" else 3
    return f"truncated: it ends after {seconds:.{digits}f} of the {stated:.{digits}f} seconds that its header promises"


def _check_ogg(part: Part) -> None:
    """The last page must be whole and say that it is the last (RFC 3533, section 6)."""
    first = max(0, part.num_bytes - 2 * OGG_PAGE_BYTES)
    end = part.read(first, part.num_bytes - first)
    at = end.rfind(b"OggS\0")
    if at < 0:
        return
    page = end[at:]
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 or len(page) < 27 + page[26] + sum(lengths):
        raise MediaError("truncated: it ends in the middle of an Ogg page")
    if not page[5] & 4:
        raise MediaError("truncated: the page that ends an Ogg stream is missing")


def _element(part: Part, at: int) -> tuple[int, int, int]:
    """(name, begin, end) of what an EBML element holds (RFC 8794, section 4); an unknown size is 2**56 and more."""
    head = part.read(at, 16)
    name_bytes = 9 - head[0].bit_length()
    size_bytes = 9 - head[min(name_bytes, 8)].bit_length()
    if name_bytes > 4 or size_bytes > 8:
        return 0, at, at
    begin = at + name_bytes + size_bytes
    size = int.from_bytes(head[name_bytes : name_bytes + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
    unknown = size == (1 << 7 * size_bytes) - 1
    return int.from_bytes(head[:name_bytes], "big"), begin, begin + (1 << 56 if unknown else size)


def _avi_bytes(part: Part) -> int:
    at = 0
    for _ in range(MAX_PARTS):  # large ones have more than one RIFF
        name, size = part.unpack("<4sI", at)
        if name != b"RIFF" or not 0 < size < PIPED:
            break
        at += 8 + size + size % 2
    return at


def _flv_bytes(part: Part) -> int:
    """What the tag in front, onMetaData, says, where it does: a name, a type byte and a double."""
    at = part.start.find(b"filesize\0")
    size = part.unpack(">d", at + 9)[0] if at > 0 else 0.0
    return int(size) if 0 < size < 1 << 55 else 0


def _mp3_bytes(start: bytes) -> int:
    """What the tables of LAME and Xing, or of Fraunhofer, count in the first frame."""
    if int.from_bytes(start[:2], "big") & 0xFFE0 != 0xFFE0:
        return 0
    for mark in (b"Xing", b"Info"):
        at = start[:200].find(mark)
        if at > 0:
            flags = int.from_bytes(start[at + 4 : at + 8], "big")
            at += 12 if flags & 1 else 8
            return int.from_bytes(start[at : at + 4], "big") if flags & 2 else 0
    return int.from_bytes(start[46:50], "big") if start[36:40] == b"VBRI" else 0
