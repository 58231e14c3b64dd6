"""What a sound file says of itself, where DALI decodes it: its rate, its channels, and how long it is.

libsndfile, by which DALI decodes, takes a file that ends early for a shorter one, so what it promises is compared here with what it holds.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from polyvit_fast.data.audio.container import LEAST_HELD, Part, check_container, check_joint, format_cut
from polyvit_fast.data.audio.formats import READ_ON, Body, choose_reader, find_second
from polyvit_fast.media import Media, MediaError

FFMPEG_TOO = {b"RIFF", b"RF64", b"BW64", b"riff", b"FORM", b".snd", b"caff"}  # which goes on where libsndfile finds no samples
MAX_FLAC_BITS = 24  # in libsndfile
FLAC_STARTS = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")  # with further blocks of metadata and without
SHORT_BYTES = 1 << 17  # more than the headers of Vorbis and one page have


@dataclass(frozen=True)
class SoundHeader:
    """What a file says of itself that DALI decodes."""

    sample_rate_hz: int
    channels: int
    samples: int
    """That are there."""
    num_bytes: int
    """Of the file."""
    tag_bytes: int = 0
    """Of a tag (ID3v2) in front, which must not reach DALI."""
    end: int | None = None
    """In bytes of the file; what follows must not reach DALI either."""


def read_header(media: Media) -> SoundHeader | None:
    """The header of a file that DALI decodes, None of any other.

    Raises MediaError when the file holds less than it promises, or a second one.
    """
    with media.open() as file:
        tag_bytes = _read_tag(file)
        part, end = Part(file, tag_bytes), None
        if part.start.startswith(b"fLaC"):
            for start in FLAC_STARTS:
                check_joint(part, part.find(start, 42))
            known = _read_flac(part)
        elif read := choose_reader(part):
            body = read(part)
            check_joint(part, find_second(part, read, body))
            known = _check(part, body) if body else None
            if body and body.size is not None and read in READ_ON:
                end = tag_bytes + int(body.start + body.size) + READ_ON[read]
        else:
            check_container(part)
            known = _read_short_vorbis(part)
    return SoundHeader(*known, part.num_bytes, tag_bytes, end) if known else None


def _read_tag(file: io.BufferedReader) -> int:
    """The bytes of an ID3v2 tag in front, 0 without one."""
    start = file.read(10)
    if not start.startswith(b"ID3") or len(start) < 10:
        return 0
    size = sum((byte & 127) << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if start[5] & 16 else 0)


def _check(part: Part, body: Body) -> tuple[int, int, int] | None:
    """(rate, channels, samples) where libsndfile decodes them. Raises MediaError where fewer are held than promised."""
    rate = round(body.rate) if math.isfinite(body.rate) else 0
    held = max(0, part.num_bytes - body.start)
    if body.size is not None:
        held = min(held, body.size)
        if held < LEAST_HELD * body.size:
            raise MediaError(format_cut(held, body.size, rate * body.sample_bytes))
    samples = int(held / body.sample_bytes) if body.sample_bytes > 0 else 0
    empty = not (samples and rate and body.channels)
    return None if not body.known or (empty and part.start[:4] in FFMPEG_TOO) else (rate, body.channels, samples)


def _read_flac(part: Part) -> tuple[int, int, int] | None:
    """From the first block (RFC 9639, section 8.2)."""
    packed = int.from_bytes(part.start[18:26], "big")
    samples = packed & ((1 << 36) - 1)  # none: written to a pipe
    known = samples and (packed >> 36 & 31) < MAX_FLAC_BITS and part.num_bytes >= 26
    return (packed >> 44, (packed >> 41 & 7) + 1, samples) if known else None


def _read_short_vorbis(part: Part) -> tuple[int, int, int] | None:
    """Of an Ogg Vorbis file with a single page of sound, whose end FFmpeg does not find."""
    first = part.start.find(b"\x01vorbis", 0, 60)
    if not part.start.startswith(b"OggS") or first < 0 or part.num_bytes > SHORT_BYTES:
        return None
    content, at, ends = part.read(0, part.num_bytes), 0, []
    while content.startswith(b"OggS", at) and at + 27 < len(content):
        ends.append(int.from_bytes(content[at + 6 : at + 14], "little", signed=True))
        at += 27 + content[at + 26] + sum(content[at + 27 : at + 27 + content[at + 26]])
    sound = [end for end in ends if end > 0]
    channels, rate = part.unpack("<BI", first + 11)
    return (rate, channels, sound[0]) if len(sound) == 1 else None
