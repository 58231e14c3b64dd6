"""What a JPEG lacks: its end, whole scans, restart intervals, or codes, for which libjpeg shows grey with a mere warning.

The markers show the first three at once (`read_frame`). Missing codes show only in decoding: `check_codes` has libjpeg decode, and when
DALI decodes, `capture_stderr` catches its warnings and `check_warnings` judges them.
"""

from __future__ import annotations

import io
import os
import random
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from polyvit_fast.media import MediaError

START, END = b"\xff\xd8", b"\xff\xd9"
GREY = [128, 128, 128]
PILLOW_ERRORS = (
    *(
        OSError,
        RuntimeError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        KeyError,
        ArithmeticError,
        MemoryError,
        struct.error,
        zlib.error,
    ),
    Warning,  # where the user has turned warnings into errors
)
"""What Pillow raises on damaged files."""

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_AFTER_CODES = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_DAMAGE = re.compile(r"premature end|bad (Huffman|arithmetic) code|found marker 0x\w+ instead of RST", re.IGNORECASE)
_EXTRA = re.compile(r"(\d+) extraneous bytes before marker 0x(\w\w)")
_HARMLESS_EXTRA = 4  # bytes that some cameras write before a marker; more are padding if all are equal, else stray codes
_FILLER = bytes(byte % 255 for byte in random.Random(0).randbytes(64))


@dataclass(frozen=True)
class Frame:
    """How a JPEG's picture is coded."""

    coding: int
    """The last digit of the frame header's marker: 0 and 1 are sequential, 2 progressive, 3 lossless; with 8 more, arithmetic."""
    height: int
    width: int
    sampling: dict[int, tuple[int, int]]
    """(horizontal, vertical) of each component, by its number."""

    @property
    def lossless(self) -> bool:
        """Without blocks of coefficients."""
        return self.coding % 8 == 3

    def num_units(self, components: bytes) -> int:
        """How many units (blocks or groups of blocks) a scan of these components has."""
        across, down = (max(factors) for factors in zip(*self.sampling.values(), strict=True))
        # A scan of one component has no blocks beyond the picture's edge.
        own_across, own_down = self.sampling[components[0]] if len(components) == 1 else (1, 1)
        return -(-self.height * own_down // (8 * down)) * -(-self.width * own_across // (8 * across))


@dataclass(frozen=True)
class Scan:
    """Where codes lie, and which: the bits from `low_bit` up of coefficients `first` to `last` of `components`."""

    start: int
    end: int
    components: bytes
    first: int
    last: int
    low_bit: int
    interval: int
    """Units between two restart markers; 0: there are none."""


def read_frame(content: bytes, max_pixels: int) -> Frame | None:
    """The frame of a JPEG; None when its header cannot be read, which the decoder will report.

    Raises MediaError when its end, a scan or a restart marker is missing.
    """
    try:
        frame, scans = _read_markers(content, quick=True)
        if frame is None:
            return None
        _check_scans(content, frame, scans)
        suspect = len(frame.sampling) > 3 or frame.lossless or (frame.coding == 2 and not _is_complete(frame, scans))
    except (struct.error, IndexError, KeyError, ValueError, ZeroDivisionError):
        return None
    if suspect and frame.height * frame.width <= max_pixels:
        check_codes(content)
    return frame


def check_codes(content: bytes) -> None:
    """Raise MediaError when codes are missing. It decodes twice; arithmetic codes are not judged, as they may be left out.

    The second time, other bytes follow the codes of each scan: a decoder that has all codes does not read them, else the picture changes.
    """
    try:
        frame, scans = _read_markers(content)
    except (struct.error, IndexError):
        return
    if frame is None or frame.coding > 8:
        return
    filled, at = [], 0
    for scan in scans:
        codes = _RESTART.sub(lambda marker: _FILLER + marker[0], content[scan.start : scan.end])
        filled += [content[at : scan.start], codes, _FILLER]
        at = scan.end
    try:
        complete = _pixels(content) == _pixels(b"".join([*filled, content[at:]]))
    except PILLOW_ERRORS:
        return  # not a kind that Pillow's libjpeg decodes
    if not complete:
        raise MediaError("truncated or damaged: data of the JPEG is missing, for which the decoder would show grey")


def check_grey(content: np.ndarray, last_pixel: list[int]) -> None:
    """As `check_codes`, if a crop from a JPEG ends in the grey that libjpeg shows from the first missing code to the picture's end."""
    if last_pixel == GREY and content[:2].tobytes() == START:
        check_codes(content.tobytes())


@contextmanager
def capture_stderr() -> Iterator[list[str]]:
    """The lines that are written to standard error inside, complete at the end. Only for a process that does nothing else."""
    lines: list[str] = []
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def check_warnings(content: bytes, warnings: list[str]) -> None:
    """Raise MediaError when a warning of libjpeg means that the JPEG is damaged."""
    if not content.startswith(START):
        return
    for line in warnings:
        extra = _EXTRA.search(line)
        if _DAMAGE.search(line) or (extra and not _is_padding(content, int(extra[1]), int(extra[2], 16))):
            raise MediaError(f"truncated or damaged: libjpeg says: {line.strip()}")
    if warnings:  # libjpeg reports only its first warning
        check_codes(content)


def _read_markers(content: bytes, *, quick: bool = False) -> tuple[Frame | None, list[Scan]]:
    """The frame and the scans. With `quick`, the end of a file with a single scan is taken for the scan's end, which is not searched for.

    Raises MediaError when there is no end mark, struct.error or IndexError when a header is too short.
    """
    frame, scans, interval, at = None, [], 0, 2
    while marker := _MARKER.search(content, at):
        kind, at = marker[0][1], marker.end()
        if kind == 0xD9:
            return frame, scans
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:  # markers without a segment
            continue
        size = int.from_bytes(content[at : at + 2], "big")
        segment = content[at + 2 : at + size]
        at += size
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width, count = struct.unpack_from(">xHHB", segment)
            parts = [struct.unpack_from("BB", segment, 6 + 3 * i) for i in range(count)]
            frame = Frame(kind & 15, height, width, {name: (sampling >> 4, sampling & 15) for name, sampling in parts})
        elif kind == 0xDD:
            (interval,) = struct.unpack_from(">H", segment)
        elif kind == 0xDA and at < len(content):
            components, (first, last, bits) = segment[1 : 1 + 2 * segment[0] : 2], struct.unpack("3B", segment[-3:])
            if quick and frame and frame.coding < 2 and len(components) == len(frame.sampling) and content.endswith(END):
                return frame, [Scan(at, len(content) - 2, components, first, last, bits & 15, interval)]
            if not (after := _AFTER_CODES.search(content, at)):
                break
            at, start = after.start(), at
            scans.append(Scan(start, at, components, first, last, bits & 15, interval))
    raise MediaError("truncated: the JPEG's end is missing")


def _check_scans(content: bytes, frame: Frame, scans: list[Scan]) -> None:
    """Raise MediaError when a component or a restart marker is missing, for which libjpeg also shows grey."""
    begun = [scan.components for scan in scans if frame.coding % 8 != 2 or scan.first == 0]
    if not set(frame.sampling) <= set(b"".join(begun)):
        raise MediaError("truncated: the JPEG ends before its last scan")
    for scan in scans:
        if scan.interval and not frame.lossless:
            found = [marker[1] & 7 for marker in _RESTART.findall(content, scan.start, scan.end)]
            expected = [i % 8 for i in range(-(-frame.num_units(scan.components) // scan.interval) - 1)]
            if found[: len(expected)] != expected:
                raise MediaError(f"truncated or damaged: of {len(expected)} restart markers in the JPEG some are missing")


def _is_complete(frame: Frame, scans: list[Scan]) -> bool:
    """Whether the scans of a progressive JPEG hold all bits of all coefficients; without the last scans it is coarser."""
    low_bits = {name: [1] * 64 for name in frame.sampling}
    for scan in scans:
        for name in scan.components:
            low_bits[name][scan.first : scan.last + 1] = [scan.low_bit] * (scan.last + 1 - scan.first)
    return not any(map(any, low_bits.values()))


def _is_padding(content: bytes, count: int, marker: int) -> bool:
    """Whether `count` unused bytes before a marker may be intended: they are few, all equal, or not among the codes."""
    if count <= _HARMLESS_EXTRA:
        return True
    _, scans = _read_markers(content)
    ends = [match.start() for scan in scans for match in _RESTART.finditer(content, scan.start, scan.end)]
    ends = [end for end in [*ends, *(scan.end for scan in scans)] if content[end + 1] == marker]
    return not ends or any(len(set(content[end - count : end])) == 1 for end in ends)


def _pixels(content: bytes) -> bytes:
    from PIL import JpegImagePlugin

    with JpegImagePlugin.JpegImageFile(io.BytesIO(content)) as picture:
        return picture.tobytes()
