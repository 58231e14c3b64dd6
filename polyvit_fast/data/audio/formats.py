"""Where the samples of a sound file lie and how large they are, in the formats that DALI decodes through libsndfile.

Each reader returns what one kind of header states, and does not check it. The layouts are those in libsndfile's sources.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from polyvit_fast.data.audio.container import PIPED, FileTail, format_cut
from polyvit_fast.media import MediaError

MAX_BLOCKS = 10_000
MAX_CHUNKS = 100  # a file of zeros looks like millions of empty ones
EXTENSIBLE = 0xFFFE  # the code is the first number of a GUID with one of these ends: Microsoft's, and that of ambisonics
GUID_ENDS = ((0, 0x10, bytes.fromhex("800000aa00389b71")), (0x0721, 0x11D3, bytes.fromhex("8644c8c1ca000000")))
ADPCM_MS, ADPCM_IMA, GSM, ADPCM_NMS, G721 = 2, 0x11, 0x31, 0x38, 0x40  # codes of WAV
G721_BYTES, GSM_BYTES, NMS_BYTES = 1 / 2, 65 / 320, {2: 42 / 160, 3: 62 / 160, 4: 82 / 160}  # per sample
AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 23: 1 / 2, 25: 3 / 8, 26: 5 / 8, 27: 1}  # encoding: bytes per sample
AIFC_BYTES = {b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8, b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1, b"raw ": 1}
AIFC_BYTES |= {b"ima4": 34 / 64, b"GSM ": 33 / 160}
AIFC_INTEGERS = {b"NONE", b"twos", b"in24", b"in32", b"sowt", b"42n1", b"23ni"}  # as many bytes as the bits need
IRCAM_BYTES = {0x2: 2, 0x4: 4, 0x10001: 1, 0x20001: 1, 0x40004: 4}
MAT4_BYTES = {0: 8, 10: 4, 20: 4, 30: 2}
MAT5_BYTES = {2: 1, 3: 2, 5: 4, 7: 4, 9: 8}


class Body(NamedTuple):
    """What a header states about the samples."""

    rate: float
    channels: int
    sample_bytes: float
    start: int
    size: float | None
    """The bytes that the header promises, None where it promises none."""
    known: bool = True
    """Whether libsndfile decodes them."""


def _walk(tail: FileTail, at: int, form: str, samples: bytes) -> dict[bytes, tuple[int, int]]:
    """(start, size) of the chunks from offset `at` on, by name; of two with the same name the first.

    Raises MediaError when the file ends inside a chunk before the one that is called `samples`.
    """
    chunks: dict[bytes, tuple[int, int]] = {}
    head, name = struct.calcsize(form), b""
    for _ in range(MAX_CHUNKS):
        if at + head > tail.num_bytes:
            break
        name, size = tail.unpack(form, at)
        chunks.setdefault(name, (at + head, size))
        if size < 0:
            break
        at += head + size + (size % 2 if head == 8 else 0)
    if samples not in chunks and at > tail.num_bytes + 1 and re.fullmatch(rb"[ -~]{4}", name):
        raise MediaError(format_cut(tail.num_bytes, at, 0))
    return chunks


def _promised_bytes(tail: FileTail, at: int, size: int) -> int | None:
    """The bytes that a header promises, None where its writer could not know."""
    return size if 0 < size < PIPED or at + size <= tail.num_bytes else None


def _read_wav(tail: FileTail) -> Body | None:
    order = ">" if tail.start.startswith(b"RIFX") else "<"
    chunks = _walk(tail, 12, order + "4sI", b"data")
    if b"fmt " not in chunks or b"data" not in chunks:
        return None
    at, size = chunks[b"data"]
    if tail.start[:4] in (b"RF64", b"BW64") and b"ds64" in chunks:
        size = tail.unpack("<Q", chunks[b"ds64"][0] + 8)[0]
    if (not size and not tail.start.startswith(b"RIFX")) or size >= 1 << 62:
        return None  # the recording was never finished: FFmpeg reads on to the end
    return _as_wav(order, tail.read(chunks[b"fmt "][0], 40), at, _promised_bytes(tail, at, size), tail.start[:4])


def _as_wav(order: str, fmt: bytes, at: int, size: int | None, kind: bytes) -> Body:
    code, channels, rate, byte_rate, block, bits, _, extra = struct.unpack_from(order + "HHIIHHHH", fmt)
    if code == EXTENSIBLE:
        code, *guid_end = struct.unpack_from(order + "IHH8s", fmt, 24)
        if tuple(guid_end) not in GUID_ENDS or (kind == b"riff" and code != 1):  # in W64 libsndfile takes all samples for integers
            code = 0
    sample_bytes = {
        1: channels * -(-bits // 8) if bits <= 32 else 0,
        3: channels * bits // 8 if bits in (32, 64) else 0,
        6: channels,
        7: channels,
        ADPCM_MS: block / extra if extra and channels in (1, 2) else 0,
        ADPCM_IMA: block / extra if extra and channels in (1, 2) else 0,
        GSM: GSM_BYTES if (channels, block, extra) == (1, 65, 320) else 0,
        ADPCM_NMS: NMS_BYTES.get(bits, 0) if channels == 1 and kind in (b"RIFF", b"RIFX") else 0,
        G721: channels * G721_BYTES if kind != b"riff" else 0,
    }.get(code, 0)
    known = sample_bytes > 0 and kind != b"BW64"
    return Body(rate, channels, sample_bytes or (byte_rate / rate if rate else 0), at, size, known)


def _read_w64(tail: FileTail) -> Body | None:
    at, chunks = 40, {}
    for _ in range(MAX_CHUNKS):
        name, size = tail.unpack("<16sQ", at)
        chunks.setdefault(name[:4], (at + 24, size - 24))
        if not 24 <= size < 1 << 62 or at + 24 > tail.num_bytes:
            break
        at += size + -size % 8
    if b"fmt " not in chunks or b"data" not in chunks:
        return None
    at, size = chunks[b"data"]
    return _as_wav("<", tail.read(chunks[b"fmt "][0], 40), at, _promised_bytes(tail, at, size), b"riff") if size > 0 else None


def _read_aiff(tail: FileTail) -> Body | None:
    chunks = _walk(tail, 12, ">4sI", b"SSND")
    if b"COMM" not in chunks or b"SSND" not in chunks:
        return None
    channels, samples, bits, exponent, mantissa = tail.unpack(">HIHHQ", chunks[b"COMM"][0])
    kind = tail.read(chunks[b"COMM"][0] + 18, 4) if chunks[b"COMM"][1] >= 22 else b"NONE"
    rate = math.ldexp(mantissa, (exponent & 0x7FFF) - 16_446) if exponent & 0x7FFF < 16_500 else 0
    at, size = chunks[b"SSND"]
    at, size = at + 8 + int.from_bytes(tail.read(at, 4), "big"), size - 8  # size -8: written to a pipe
    promised = size if size > 0 else None
    if kind == b"DWVW":  # its samples have no fixed size
        return Body(rate, channels, (promised or tail.num_bytes - at) / samples if samples else 0, at, promised)
    integer_bytes = channels * -(-bits // 8) if kind in AIFC_INTEGERS and bits <= 32 else 0
    sample_bytes = channels * AIFC_BYTES.get(kind, 0) or integer_bytes
    return Body(rate, channels, sample_bytes, at, promised, sample_bytes > 0)


def _read_svx(tail: FileTail) -> Body | None:
    chunks = _walk(tail, 12, ">4sI", b"BODY")
    if b"VHDR" not in chunks or b"BODY" not in chunks:
        return None
    rate, _, compression = tail.unpack(">HBB", chunks[b"VHDR"][0] + 12)
    if compression:
        raise MediaError("its compression is not supported")
    stereo = b"CHAN" in chunks and tail.read(chunks[b"CHAN"][0], 4) == b"\0\0\0\6"
    at, size = chunks[b"BODY"]
    return Body(rate, 1 + stereo, (1 + stereo) * (2 if tail.start[8:12] == b"16SV" else 1), at, size)


def _read_au(tail: FileTail) -> Body | None:
    at, size, code, rate, channels = tail.unpack((">" if tail.start.startswith(b".snd") else "<") + "5I", 4)
    if not size:
        return None
    sample_bytes = channels * AU_BYTES.get(code, 0)
    return Body(rate, channels, sample_bytes, at, _promised_bytes(tail, at, size), sample_bytes > 0)


def _read_caf(tail: FileTail) -> Body | None:
    chunks = _walk(tail, 8, ">4sq", b"data")
    if b"desc" not in chunks or b"data" not in chunks:
        return None
    rate, kind, flags, packet, _, channels, bits = tail.unpack(">d4s5I", chunks[b"desc"][0])
    at, size = chunks[b"data"]
    if size < 0:
        return None  # written to a pipe, which libsndfile does not know
    if kind == b"alac" and flags in (1, 2, 3, 4) and b"pakt" in chunks:
        samples = tail.unpack(">q", chunks[b"pakt"][0] + 8)[0]
        return Body(rate, channels, (size - 4) / samples if samples > 0 else 0, at + 4, size - 4)
    widths = (32, 64) if flags & 1 else (8, 16, 24, 32)
    linear = kind == b"lpcm" and bits in widths and packet == channels * bits // 8
    known = linear or (kind in (b"alaw", b"ulaw") and bits == 8)
    return Body(rate, channels, channels * bits / 8, at + 4, size - 4, known)


def _read_voc(tail: FileTail) -> Body | None:
    """libsndfile reads only the first block of samples, so files of several are left to FFmpeg."""
    first = Body(0, 1, 1, 0, None)
    at, rate, channels, num_sounds = int.from_bytes(tail.start[20:22], "little"), 0.0, 1, 0
    for _ in range(MAX_BLOCKS):
        block = tail.read(at, 16)
        if at >= tail.num_bytes or block[0] == 0:
            break
        size = int.from_bytes(block[1:4], "little")
        num_sounds += block[0] in (1, 2, 9)
        if block[0] == 8:
            channels = 2 if block[7] else 1
            rate = 256_000_000 / channels / (65_536 - int.from_bytes(block[4:6], "little"))
        elif block[0] == 1 and num_sounds == 1:
            first = Body(rate or 1e6 / (256 - block[4]), channels, channels, at + 6, size - 2, block[5] == 0)
        elif block[0] == 9 and num_sounds == 1:
            hertz, bits, channels, code = struct.unpack_from("<IBBH", block, 4)
            first = Body(hertz, channels, channels * bits / 8, at + 16, size - 12, code in (0, 4, 6, 7))
        at += 4 + size
    if num_sounds > 1 and at >= tail.num_bytes:
        raise MediaError("truncated: the block that ends a VOC file is missing")
    return first._replace(known=first.known and num_sounds == 1) if first.start else None


def _read_nist(tail: FileTail) -> Body | None:
    text = tail.start[:1024].partition(b"end_head")[0]
    coding = re.search(rb"^sample_coding -s\d+ (\S+)", text, re.MULTILINE)
    if coding and coding[1] not in (b"pcm", b"alaw", b"ulaw", b"mu-law"):
        raise MediaError(f"its coding, {coding[1].decode(errors='replace')}, is not supported")
    found = dict(re.findall(rb"^(\w+) -i (\d{1,12})\s", text, re.MULTILINE))
    names = (b"sample_rate", b"channel_count", b"sample_n_bytes", b"sample_count")
    rate, channels, width, samples = (int(found.get(name, 0)) for name in names)
    first = tail.start[8:16].strip()
    sample_bytes = channels * (width or 1)
    return Body(rate, channels, sample_bytes, int(first) if first.isdigit() else 1024, samples * sample_bytes or None)


def _read_mat4(tail: FileTail) -> Body | None:
    order, base = ("<", 0) if tail.start.startswith(bytes(4)) else (">", 1000)
    name_bytes = tail.unpack(order + "I", 16)[0]
    if name_bytes > 64:
        return None
    at = 20 + name_bytes
    rate, kind, channels, samples, _, name_bytes = tail.unpack(order + "d5I", at)
    width = MAT4_BYTES.get(kind - base, 0)
    return Body(rate, channels, channels * width, at + 28 + name_bytes, samples * channels * width, width > 0)


def _read_mat5(tail: FileTail) -> Body | None:
    order = "<" if tail.start[126:128] == b"IM" else ">"
    at, rate = 128, 44_100.0  # where the file states none
    for _ in range(2):  # the rate, then the samples
        shape = tail.unpack(order + "II", at + 32)
        kind, size = tail.unpack(order + "II", at + 40)
        at += 48 if kind >> 16 else 48 + size + -size % 8  # a short name is inside its tag
        kind, size = tail.unpack(order + "II", at)
        if shape != (1, 1):
            return Body(rate, shape[0], shape[0] * MAT5_BYTES.get(kind, 0), at + 8, size, kind in MAT5_BYTES)
        short = kind >> 16
        rate = tail.unpack(order + {2: "H", 4: "I"}.get(short, "I"), at + 4)[0] if short else tail.unpack(order + "d", at + 8)[0]
        at += 8 if short else 16
    return None


def _read_ircam(tail: FileTail) -> Body | None:
    order = "<" if tail.unpack("<I", 8)[0] <= 1024 else ">"
    rate, channels, code = tail.unpack(order + "fII", 4)
    return Body(rate, channels, channels * IRCAM_BYTES.get(code, 0), 1024, None, code in IRCAM_BYTES)


def _read_paf(tail: FileTail) -> Body | None:
    rate, code, channels = tail.unpack((">" if tail.start.startswith(b" ") else "<") + "III", 12)
    return Body(rate, channels, channels * {0: 2, 1: 3.2, 2: 1}.get(code, 0), 2048, None, code < 3)


def _read_pvf(tail: FileTail) -> Body | None:
    found = re.match(rb"PVF1\n(\d{1,9}) (\d{1,9}) (\d{1,9})\n", tail.start)
    if found is None:
        return None
    channels, rate, bits = (int(number) for number in found.groups())
    return Body(rate, channels, channels * bits / 8, found.end(), None)


def _read_avr(tail: FileTail) -> Body | None:
    stereo, bits = tail.unpack(">HH", 12)
    rate, samples = tail.unpack(">II", 22)
    width = (1 + stereo % 2) * bits // 8
    return Body(rate, 1 + stereo % 2, width, 128, samples * width or None)


def _read_mpc2k(tail: FileTail) -> Body | None:
    channels, samples, rate = 1 + (tail.start[21] > 0), tail.unpack("<I", 30)[0], tail.unpack("<H", 40)[0]
    return Body(rate, channels, 2 * channels, 42, samples * 2 * channels or None)


def _read_sds(tail: FileTail) -> Body | None:
    period, samples = (tail.start[at] | tail.start[at + 1] << 7 | tail.start[at + 2] << 14 for at in (7, 10))
    per_block = 120 // ((tail.start[6] + 6) // 7) if 1 < tail.start[6] <= 32 else 0
    blocks = -(-samples // per_block) if per_block else 0
    return Body(1e9 // period if period else 16_000, 1, 127 * blocks / samples if samples else 0, 21, 127 * blocks)


def _read_wve(tail: FileTail) -> Body | None:
    return Body(8000, 1, 1, 32, tail.unpack(">I", 18)[0] or None)


def _read_xi(tail: FileTail) -> Body | None:
    samples, size, _, _, _, flags = tail.unpack("<HIIIHB", 296)
    return Body(44_100, 1, 2 if flags & 16 else 1, 298 + 40 * samples, size or None)


def _read_htk(tail: FileTail) -> Body | None:
    samples, period = tail.unpack(">II", 0)
    return Body(10_000_000 // period if period else 16_000, 1, 2, 12, 2 * samples, 2 * samples + 12 >= tail.num_bytes)


Reader = Callable[[FileTail], Body | None]
READERS: list[tuple[bytes, bytes, Reader]] = [  # first bytes, bytes 8 to 12
    (b"RIFF", b"WAVE", _read_wav),
    (b"RIFX", b"WAVE", _read_wav),
    (b"RF64", b"WAVE", _read_wav),
    (b"BW64", b"WAVE", _read_wav),
    (b"riff\x2e\x91\xcf\x11", b"", _read_w64),
    (b"FORM", b"AIFF", _read_aiff),
    (b"FORM", b"AIFC", _read_aiff),
    (b"FORM", b"8SVX", _read_svx),
    (b"FORM", b"16SV", _read_svx),
    (b".snd", b"", _read_au),
    (b"dns.", b"", _read_au),
    (b"caff", b"desc", _read_caf),
    (b"Creative Voice File\x1a", b"", _read_voc),
    (b"NIST_1A\n", b"", _read_nist),
    (b"\0\0\0\0\1\0\0\0\1\0\0\0", b"", _read_mat4),
    (b"\0\0\x03\xe8\0\0\0\1\0\0\0\1", b"", _read_mat4),
    (b"MATLAB 5.0 MAT-file", b"", _read_mat5),
    (b" paf", b"", _read_paf),
    (b"fap ", b"", _read_paf),
    (b"PVF1\n", b"", _read_pvf),
    (b"2BIT", b"", _read_avr),
    (b"\1\4", b"", _read_mpc2k),
    (b"ALawSoundFile**", b"", _read_wve),
    (b"Extended Instrument:", b"", _read_xi),
]
READ_ON: dict[Reader, int] = {_read_voc: 1}
READ_ON |= dict.fromkeys((_read_w64, _read_svx, _read_nist, _read_mat5, _read_avr, _read_mpc2k, _read_wve), 0)
"""In these formats libsndfile takes all that follows for samples, except this many bytes after them, which it needs."""


def choose_reader(tail: FileTail) -> Reader | None:
    """The reader for the header of a file, None for a format that libsndfile does not know."""
    for first, third, read in READERS:
        if tail.start.startswith(first) and tail.start.startswith(third, 8):
            return read
    if re.match(rb"\xf0\x7e[\x00-\x7f]\x01", tail.start):
        return _read_sds
    if re.match(rb"\x64\xa3[\x00-\x07]\x00|\x00[\x00-\x07]\xa3\x64", tail.start):
        return _read_ircam
    return _read_htk if tail.start.startswith(b"\0\2\0\0", 8) and 2 * int.from_bytes(tail.start[:4], "big") + 12 >= tail.num_bytes else None


def find_second(tail: FileTail, read: Reader, body: Body | None) -> int | None:
    """Where, after the samples, a second file of the same format begins.

    There may be tags in between. Tags may happen to contain a format's first few bytes, so a short signature counts only at the promised
    end.
    """
    end = int(body.start + (body.size or 0)) if body else 12
    starts = [(first, third) for first, third, reader in READERS if reader is read]
    if read is _read_mat4:  # any variable with one number begins as these files do
        starts = [(tail.start[:31], b"")]
    if not starts or any(len(first + third) < 8 for first, third in starts):
        return end if end < tail.num_bytes and choose_reader(FileTail(tail.file, tail.offset + end)) is read else None
    found = (tail.find(first, end, third) for first, third in starts)
    return min((at for at in found if at is not None), default=None)
