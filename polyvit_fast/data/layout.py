"""The outermost structure of a media file: where it ends by its own sizes, and where an appended recording begins.

FFmpeg reads what is there: it reports neither that the end of a file is missing nor, in these formats, that another file was appended.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader

from polyvit_fast.media import MediaError

EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_OBJECTS = frozenset(  # the data and the four kinds of index
    bytes.fromhex(name)
    for name in (
        "3626b2758e66cf11a6d900aa0062ce6c",
        "90080033b1e5cf1189f400a0c90349cb",
        "d329e2d6da35d111903400a0c90349be",
        "f803b1fead12644c840f2a1d2f7ad48c",
        "d03fb73c4a0c0348953dedf7b6228f0c",
    )
)
PNG = b"\x89PNG\r\n\x1a\n"
MXF = b"\x06\x0e\x2b\x34"
BOXES = frozenset(b"ftyp styp moov mdat moof mfra sidx ssix free skip wide uuid meta emsg prft pdin pnot PICT udta".split())
"""The boxes at the top level of MP4 and MOV files; anything else does not belong to the file."""
MOOF_BYTES = 1 << 20
FARTHEST = 1 << 62  # the largest offset that a file can seek to; damaged sizes lead beyond


@dataclass(frozen=True)
class Layout:
    """The size of a file and offsets in it, in bytes."""

    size: int
    end: int = 0
    """Where the file ends by its own sizes; 0 where they do not say."""
    joints: tuple[int, ...] = ()
    """Where appended recordings begin; of those that FFmpeg does not read, only the first."""
    read_on: bool = False
    """Whether FFmpeg reads the appended recordings too."""


def read_layout(file: BufferedReader) -> Layout:
    """The layout from the outermost headers. The file is left at its start. Raises MediaError for MP4 without a table of contents."""
    size = file.seek(0, 2)
    head = _at(file, 0, 16)
    if head[4:8] in BOXES:
        end, joints = _boxes(file, size)
    elif head[:4] == b"RIFF":
        end, joints = _riff(file)
    elif head[:4] == EBML:
        end, joints = _matroska(file, size)
    elif head == ASF_HEADER:
        end, joints = _asf(file)
    elif head[:3] == b"FLV":
        end, joints = _flv(file)
    elif head[:4] == b"DKIF":
        end, joints = _ivf(file)
    elif head[:4] == MXF:
        end, joints = _mxf(file), ()
    elif head[:8] == PNG:
        end, joints = _png(file)
    elif head[:4] == b"OggS":
        end, joints = _ogg(file)
    elif head[:4] == b"GIF8":
        end, joints = _gif(file)
    else:
        end, joints = 0, ()
    file.seek(0)
    return Layout(size, end, joints, read_on=head[:4] == EBML)


def _at(file: BufferedReader, offset: int, count: int) -> bytes:
    file.seek(min(offset, FARTHEST))
    return file.read(count)


def _boxes(file: BufferedReader, size: int) -> tuple[int, tuple[int, ...]]:
    """MP4 and MOV. Fragments state the time at which they start, which must not run backwards."""
    at, end, seen, started = 0, 0, set(), {}
    while at + 8 <= size:
        header = _at(file, at, 16)
        length, kind, start = int.from_bytes(header[:4], "big"), header[4:8], 8
        if length == 1:
            length, start = int.from_bytes(header[8:], "big"), 16
        if kind not in BOXES or (length < start and length):
            break
        if kind in seen & {b"ftyp", b"moov"}:
            return end, (at,)
        seen.add(kind)
        if kind == b"moof" and length <= MOOF_BYTES:
            for track, time in _fragment_times(_at(file, at + start, length - start)):
                if time < started.get(track, 0):
                    return end, (at,)
                started[track] = time
        if not length:  # up to the end of the file
            break
        at += length
        end = at
    if b"mdat" in seen and not seen & {b"moov", b"moof"} and end <= size:
        raise MediaError("truncated: its table of contents (moov) is missing, as when a recording was interrupted")
    return end, ()


def _fragment_times(moof: bytes) -> list[tuple[int, int]]:
    """(track, time of its first sample) of a movie fragment."""
    times = []
    for kind, track_fragment in _children(moof):
        children = dict(_children(track_fragment)) if kind == b"traf" else {}
        if b"tfdt" in children and b"tfhd" in children:
            time = children[b"tfdt"]
            wide = time[:1] == b"\1"
            times.append((int.from_bytes(children[b"tfhd"][4:8], "big"), int.from_bytes(time[4 : 12 if wide else 8], "big")))
    return times


def _children(box: bytes) -> list[tuple[bytes, bytes]]:
    at, children = 0, []
    while at + 8 <= len(box):
        length = int.from_bytes(box[at : at + 4], "big")
        if length < 8:
            break
        children.append((box[at + 4 : at + 8], box[at + 8 : at + length]))
        at += length
    return children


def _riff(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    """AVI. Further chunks of OpenDML follow the first one; whether frames are missing shows in their number, not in bytes."""
    at = 0
    while len(header := _at(file, at, 12)) == 12 and header[:4] == b"RIFF":
        if at and header[8:] == b"AVI ":
            return 0, (at,)
        length = int.from_bytes(header[4:8], "little")
        at += 8 + length + length % 2
    return 0, ()


def _matroska(file: BufferedReader, size: int) -> tuple[int, tuple[int, ...]]:
    at, end, joints = 0, 0, []
    while at < size:
        head = _at(file, at, 12)
        if head[:4] not in (EBML, SEGMENT) or len(head) < 5 or not head[4]:
            break
        if at and head[:4] == EBML:
            joints.append(at)
        count = 9 - head[4].bit_length()
        if len(head) < 4 + count:
            break
        length = int.from_bytes(head[4 : 4 + count], "big") - (1 << 7 * count)
        if length == (1 << 7 * count) - 1:  # unknown: it was written to a pipe
            break
        at += 4 + count + length
        end = at
    return end, tuple(joints)


def _asf(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    at = max(24, int.from_bytes(_at(file, 16, 8), "little"))
    while len(header := _at(file, at, 24)) == 24 and header[:16] in ASF_OBJECTS:
        length = int.from_bytes(header[16:], "little")
        if length < 24:  # a broadcast, whose length was not known
            return 0, ()
        at += length
    return at, (at,) if header[:16] == ASF_HEADER else ()


def _png(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    at, kind = 8, b""
    while kind != b"IEND" and len(header := _at(file, at, 8)) == 8:
        at, kind = at + 12 + int.from_bytes(header[:4], "big"), header[4:]
    return at, (at,) if _at(file, at, 8) == PNG else ()


def _mxf(file: BufferedReader) -> int:
    at = 0
    while (head := _at(file, at, 25))[:4] == MXF and len(head) > 16:
        count = head[16] & 0x7F if head[16] & 0x80 else 0
        at += 17 + count + (int.from_bytes(head[17 : 17 + count], "big") if count else head[16])
    return at


def _flv(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    at = int.from_bytes(_at(file, 5, 4), "big") + 4
    while len(header := _at(file, at, 11)) == 11 and header[0] in (8, 9, 18) and header[8:] == bytes(3):
        at += 11 + int.from_bytes(header[1:4], "big") + 4
    return at - 4, (at,) if header[:3] == b"FLV" else ()


def _ivf(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    """The header may state how many frames follow."""
    header = _at(file, 0, 32)
    at, count = 32, int.from_bytes(header[24:28], "little")
    for _ in range(count or 1 << 32):
        frame = _at(file, at, 12)
        if len(frame) < 12 or frame[:4] == b"DKIF":
            break
        at += 12 + int.from_bytes(frame[:4], "little")
    return at if count else 0, (at,) if _at(file, at, 4) == b"DKIF" else ()


def _ogg(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    """Page after page; the first pages of all streams are at the start."""
    at, end, begun = 0, 0, False
    while len(page := _at(file, at, 27)) == 27 and page[:4] == b"OggS":
        first = bool(page[5] & 2)
        if first and begun:
            return end, (at,)
        begun = not first
        segments = file.read(page[26])
        at += 27 + page[26] + sum(segments)
        end = at
    return end, ()


def _gif(file: BufferedReader) -> tuple[int, tuple[int, ...]]:
    file.seek(0)
    content = file.read()
    at = 13 + _table_bytes(content, 10)
    while at < len(content) and content[at] != 0x3B:
        if content[at] == 0x2C:  # a picture
            at += 11 + _table_bytes(content, at + 9)
        elif content[at] == 0x21:  # an extension
            at += 2
        else:
            return at, ()
        while at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
    at += 1
    return at, (at,) if content[at : at + 4] == b"GIF8" else ()


def _table_bytes(content: bytes, flags: int) -> int:
    return 3 << (content[flags] & 7) + 1 if flags < len(content) and content[flags] & 0x80 else 0
