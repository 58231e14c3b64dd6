"""The sample rate, channels and length of a sound file that DALI decodes.

DALI decodes through libsndfile, which takes a truncated file for a shorter one. So what a file promises is compared here with what it
holds.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from polyvit_fast.data.audio.container import MIN_HELD_RATIO, FileTail, check_container, check_joint, format_cut
from polyvit_fast.data.audio.formats import READ_ON, Body, choose_reader, find_second
from polyvit_fast.media import Media, MediaError

FFMPEG_TOO = {
    b"RIFF",
    b"RF64",
    b"BW64",
    b"riff",
    b"FORM",
    b".snd",
    b"caff",
}  # FFmpeg reads these too, and goes on where libsndfile finds no samples
MAX_FLAC_BITS = 24  # in libsndfile
FLAC_STARTS = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")  # with and without further blocks of metadata
SHORT_BYTES = 1 << 17  # more than the headers of Vorbis and one page


@dataclass(frozen=True)
class SoundHeader:
    """The header of a file that DALI decodes."""

    sample_rate_hz: int
    channels: int
    samples: int
    """Samples that the file really holds."""
    num_bytes: int
    """Bytes of the file, without the tag in front."""
    tag_bytes: int = 0
    """Bytes of a tag (ID3v2) in front, which DALI must not see."""
    end: int | None = None
    """The byte of the file where the sound ends; DALI must not see what follows either."""


def read_header(media: Media) -> SoundHeader | None:
    """The header of a file that DALI decodes, None of any other.

    Raises MediaError when the file holds less than it promises, or a second one.
    """
    with media.open() as file:
        tag_bytes = _read_tag(file)
        tail, end = FileTail(file, tag_bytes), None
        if tail.start.startswith(b"fLaC"):
            for start in FLAC_STARTS:
                check_joint(tail, tail.find(start, 42))
            known = _read_flac(tail)
        elif read := choose_reader(tail):
            body = read(tail)
            check_joint(tail, find_second(tail, read, body))
            known = _check(tail, body) if body else None
            if body and body.size is not None and read in READ_ON:
                end = tag_bytes + int(body.start + body.size) + READ_ON[read]
        else:
            check_container(tail)
            known = _read_short_vorbis(tail)
    return SoundHeader(*known, tail.num_bytes, tag_bytes, end) if known else None


def _read_tag(file: io.BufferedReader) -> int:
    """The bytes of an ID3v2 tag in front, 0 without one."""
    start = file.read(10)
    if not start.startswith(b"ID3") or len(start) < 10:
        return 0
    size = sum((byte & 127) << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if start[5] & 16 else 0)


def _check(tail: FileTail, body: Body) -> tuple[int, int, int] | None:
    """(rate, channels, samples) where libsndfile decodes them. Raises MediaError when there are fewer than promised."""
    rate = round(body.rate) if math.isfinite(body.rate) else 0
    held = max(0, tail.num_bytes - body.start)
    if body.size is not None:
        held = min(held, body.size)
        if held < MIN_HELD_RATIO * body.size:
            raise MediaError(format_cut(held, body.size, rate * body.sample_bytes))
    samples = int(held / body.sample_bytes) if body.sample_bytes > 0 else 0
    empty = not (samples and rate and body.channels)
    return None if not body.known or (empty and tail.start[:4] in FFMPEG_TOO) else (rate, body.channels, samples)


def _read_flac(tail: FileTail) -> tuple[int, int, int] | None:
    """(rate, channels, samples) from the first block (RFC 9639, section 8.2), None where FFmpeg is to decode."""
    packed = int.from_bytes(tail.start[18:26], "big")
    samples = packed & ((1 << 36) - 1)  # 0: written to a pipe
    known = samples and (packed >> 36 & 31) < MAX_FLAC_BITS and tail.num_bytes >= 26
    return (packed >> 44, (packed >> 41 & 7) + 1, samples) if known else None


def _read_short_vorbis(tail: FileTail) -> tuple[int, int, int] | None:
    """(rate, channels, samples) of an Ogg Vorbis file with a single page of sound, whose end FFmpeg does not find."""
    first = tail.start.find(b"\x01vorbis", 0, 60)
    if not tail.start.startswith(b"OggS") or first < 0 or tail.num_bytes > SHORT_BYTES:
        return None
    content, at, ends = tail.read(0, tail.num_bytes), 0, []
    while content.startswith(b"OggS", at) and at + 27 < len(content):
        ends.append(int.from_bytes(content[at + 6 : at + 14], "little", signed=True))
        at += 27 + content[at + 26] + sum(content[at + 27 : at + 27 + content[at + 26]])
    sound = [end for end in ends if end > 0]
    channels, rate = tail.unpack("<BI", first + 11)
    return (rate, channels, sound[0]) if len(sound) == 1 else None
