"""Whether a sound file holds all that its container promises: MP4, Matroska, Ogg, WMA, AVI, FLV and MP3.

FFmpeg decodes a truncated file as far as it goes, and the length that it reports may be a guess. The sizes that a container states are
exact. A container that was written to a pipe states none, and is accepted as it is.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from polyvit_fast.data.layout import ASF_HEADER, BOXES, EBML, read_layout
from polyvit_fast.media import Media, MediaError

START_BYTES = 4096  # longer than any header of fixed size
MIN_HELD_RATIO = 0.99  # of the promised bytes, into which some programs count their own header or a tag
PIPED = 0x7FFF0000  # programs that write to a pipe cannot know the size, and promise at least so many bytes
SEARCHED_BYTES = 1 << 20  # at a time
MAX_ELEMENTS = 1000  # a file of zeros looks like millions of them
OGG_PAGE_BYTES = 65_307  # of the largest page
INFO, DURATION, CLUSTER = 0x1549A966, 0x4489, 0x1F43B675


class FileTail:
    """An open file from an offset on, which is where a tag in front ends."""

    def __init__(self, file: io.BufferedReader, offset: int = 0) -> None:
        self.file, self.offset = file, offset
        self.num_bytes = max(0, file.seek(0, io.SEEK_END) - offset)
        self.start = b""
        self.start = self.read(0, START_BYTES)

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes from `at` on, filled up with zeros after the end."""
        if at + size <= len(self.start):
            return self.start[at : at + size]
        there = max(0, min(size, self.num_bytes - at))
        if there:
            self.file.seek(self.offset + at)
        return self.file.read(there).ljust(size, b"\0")

    def unpack(self, form: str, at: int) -> tuple[Any, ...]:
        """The values at `at`, as `struct.unpack` gives them."""
        return struct.unpack(form, self.read(at, struct.calcsize(form)))

    def find(self, first: bytes, at: int, third: bytes = b"") -> int | None:
        """The first offset from `at` on where a file begins with `first` and goes on with `third` at its eighth byte."""
        for start in range(at, self.num_bytes, SEARCHED_BYTES):
            chunk = self.read(start, SEARCHED_BYTES + START_BYTES)
            found = chunk.find(first)
            while 0 <= found < SEARCHED_BYTES:
                if chunk.startswith(third, found + 8):
                    return start + found
                found = chunk.find(first, found + 1)
        return None


def check_container(tail: FileTail) -> None:
    """Raise MediaError when a file ends before its container does, or when another file follows that FFmpeg does not read."""
    start, num_bytes = tail.start, tail.num_bytes
    if start.startswith(b"#!AMR"):
        check_joint(tail, tail.find(b"#!AMR", 1))
    if start.startswith(b"OggS"):
        _check_ogg(tail)
        return
    if not tail.offset and (start[4:8] in BOXES or start.startswith((EBML, ASF_HEADER, b"FLV"))):
        layout = read_layout(tail.file)
        check_joint(tail, None if layout.read_on else next(iter(layout.joints), None))
        promised = layout.end
    elif start.startswith(b"RIFF") and start.startswith(b"AVI ", 8):
        promised = _avi_bytes(tail)
    else:
        promised = _mp3_bytes(start)
    if start.startswith(b"FLV\1"):  # a cut between two tags shows nowhere else
        promised = max(promised, _flv_bytes(tail))
    if num_bytes < MIN_HELD_RATIO * promised:
        raise MediaError(format_cut(num_bytes, promised, 0))


def check_joint(tail: FileTail, at: int | None) -> None:
    """Raise MediaError, unless `at` is None: another file begins there."""
    if at is not None:
        byte = tail.offset + at
        raise MediaError(f"another recording begins at byte {byte}, where a second file was appended: split it there")


def states_duration(media: Media) -> bool:
    """Whether a Matroska file states its duration; where it does not, FFmpeg divides its size by a bit rate."""
    with media.open() as file:
        tail = FileTail(file)
        _, at, _ = _element(tail, _element(tail, 0)[2])  # of the segment
        for _ in range(MAX_ELEMENTS):
            name, begin, end = _element(tail, at)
            if name == DURATION:
                return True
            if name in (0, CLUSTER):
                return False
            at = begin if name == INFO else end
    return False


def format_cut(held: float, promised: float, per_second: float) -> str:
    """The message for a truncated sound: in seconds where bytes (or samples) can be converted to them, else in bytes."""
    if not per_second:
        return f"truncated: it has {held:.0f} of the {promised:.0f} bytes that its header promises"
    seconds, stated = held / per_second, promised / per_second
    digits = 1 if stated >= 1 and f"{seconds:.1f}" != f"{stated:.1f}" else 3
    return f"truncated: it ends after {seconds:.{digits}f} of the {stated:.{digits}f} seconds that its header promises"


def _check_ogg(tail: FileTail) -> None:
    """Raise MediaError unless the last page is complete and marked as the last (RFC 3533, section 6)."""
    first = max(0, tail.num_bytes - 2 * OGG_PAGE_BYTES)
    end = tail.read(first, tail.num_bytes - first)
    at = end.rfind(b"OggS\0")
    if at < 0:
        return
    page = end[at:]
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 or len(page) < 27 + page[26] + sum(lengths):
        raise MediaError("truncated: it ends in the middle of an Ogg page")
    if not page[5] & 4:
        raise MediaError("truncated: the page that ends an Ogg stream is missing")


def _element(tail: FileTail, at: int) -> tuple[int, int, int]:
    """(name, begin, end) of the content of an EBML element (RFC 8794, section 4); an unknown size counts as 2**56."""
    head = tail.read(at, 16)
    name_bytes = 9 - head[0].bit_length()
    size_bytes = 9 - head[min(name_bytes, 8)].bit_length()
    if name_bytes > 4 or size_bytes > 8:
        return 0, at, at
    begin = at + name_bytes + size_bytes
    size = int.from_bytes(head[name_bytes : name_bytes + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
    unknown = size == (1 << 7 * size_bytes) - 1
    return int.from_bytes(head[:name_bytes], "big"), begin, begin + (1 << 56 if unknown else size)


def _avi_bytes(tail: FileTail) -> int:
    at = 0
    for _ in range(MAX_ELEMENTS):  # large ones have more than one RIFF
        name, size = tail.unpack("<4sI", at)
        if name != b"RIFF" or not 0 < size < PIPED:
            break
        at += 8 + size + size % 2
    return at


def _flv_bytes(tail: FileTail) -> int:
    """The file size in the first tag, onMetaData (a name, a type byte and a double), 0 where there is none."""
    at = tail.start.find(b"filesize\0")
    size = tail.unpack(">d", at + 9)[0] if at > 0 else 0.0
    return int(size) if 0 < size < 1 << 55 else 0


def _mp3_bytes(start: bytes) -> int:
    """The number of bytes that the table of LAME, Xing or Fraunhofer in the first frame states, 0 without one."""
    if int.from_bytes(start[:2], "big") & 0xFFE0 != 0xFFE0:
        return 0
    for mark in (b"Xing", b"Info"):
        at = start[:200].find(mark)
        if at > 0:
            flags = int.from_bytes(start[at + 4 : at + 8], "big")
            at += 12 if flags & 1 else 8
            return int.from_bytes(start[at : at + 4], "big") if flags & 2 else 0
    return int.from_bytes(start[46:50], "big") if start[36:40] == b"VBRI" else 0
