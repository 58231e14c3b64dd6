"""What a file that no decoder takes is, by its first bytes, for the message that refuses it."""

from __future__ import annotations

import re
from contextlib import suppress

from polyvit_fast.media import Media, MediaError

HEAD_BYTES = 512
"""The first bytes of a file that `name_kind` looks at."""
HEIC = "a HEIC picture"
HEIC_BRANDS = rb"(hei[cmsx]|hev[cmsx])"

Kinds = tuple[tuple[str, bytes], ...]
"""What messages call each kind of file, and what it begins with."""
REMAINS: Kinds = (
    ("an HTML page, perhaps from a download that failed", rb"\s*<(!doctype html|html)"),
    ("a Git LFS pointer; `git lfs pull` gets the file itself", rb"version https://git-lfs"),
    ("nothing but zeros, perhaps from a copy that was cut short", rb"\0{64,}\Z"),
)
"""What a download or a copy leaves under the name of a file."""
PICTURES: Kinds = (
    (HEIC, rb"....ftyp(" + HEIC_BRANDS + rb"|(mif1|msf1)....(....)*?" + HEIC_BRANDS + rb")"),
    ("an AVIF picture", rb"....ftyp(avif|avis)"),
    ("a JPEG XL picture", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("a JPEG picture", rb"\xff\xd8\xff"),
    ("a PNG picture", rb"\x89PNG"),
    ("a WebP picture", rb"RIFF....WEBP"),
    ("a GIF picture", rb"GIF8[79]a"),
    ("a TIFF picture", rb"II[*+]\0|MM\0[*+]"),
    ("a camera's raw file", rb"....ftypcrx |FUJIFILMCCD-RAW|IIU\0|IIR[OS]|MMOR|FOVb"),
    ("a picture in OpenEXR, whose levels have no fixed range", rb"v/1\x01"),
    ("a picture in Radiance HDR, whose levels have no fixed range", rb"#\?(RADIANCE|RGBE)"),
    ("a picture in FITS, whose levels have no fixed range", rb"SIMPLE  ="),
    ("a picture in PFM, whose levels have no fixed range", rb"P[Ff]\s"),
    ("a PAM picture", rb"P7\s"),
)
RECORDINGS: Kinds = (
    ("an MP4 or QuickTime file", rb"....(ftyp|moov|mdat|wide|free)"),
    ("a Matroska or WebM file", rb"\x1aE\xdf\xa3"),
    ("an AVI video", rb"RIFF....AVI "),
    ("a WAV sound", rb"(RIFF|RIFX|RF64)....WAVE"),
    ("a FLAC sound", rb"fLaC"),
    ("an Ogg file", rb"OggS"),
    ("an MP3 sound", rb"ID3"),
    ("a RealMedia file", rb"\.RMF"),
    ("a Flash animation", rb"[FCZ]WS"),
    ("a playlist, which names other files", rb"#EXTM3U|\[playlist\]"),
)
DOCUMENTS: Kinds = (
    ("an EPS drawing", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("an SVG drawing", rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg"),
    ("a WMF drawing", rb"\xd7\xcd\xc6\x9a"),
    ("a PDF document", rb"%PDF-"),
    ("a ZIP archive", rb"PK\x03\x04"),
    ("a gzip archive", rb"\x1f\x8b"),
    ("an xz archive", rb"\xfd7zXZ\0"),
    ("a Zstandard archive", rb"\x28\xb5\x2f\xfd"),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c"),
    ("a RAR archive", rb"Rar!\x1a\x07"),
    ("a tar archive", rb".{257}ustar"),
    ("a NumPy array", rb"\x93NUMPY"),
    ("an HDF5 file", rb"\x89HDF"),
    ("a Parquet file", rb"PAR1"),
)
KINDS = (*REMAINS, *PICTURES, *RECORDINGS, *DOCUMENTS)


def name_kind(head: bytes) -> str:
    """What a file is that begins with these bytes, such as "an HTML page"; empty when that is unknown."""
    head = head[:HEAD_BYTES]
    return next((name for name, pattern in KINDS if re.match(pattern, head, re.DOTALL | re.IGNORECASE)), "")


def describe_picture(head: bytes) -> str:
    """How a message goes on that refuses a file as a picture: with what it is, or else its first bytes."""
    kind = name_kind(head)
    return f": it is {kind}" if kind else f"; it begins with {head[:16]!r}"


def check_no_document(head: bytes) -> None:
    """Raise MediaError when a file is none that holds a video, though FFmpeg might find a picture in it."""
    kind = name_kind(head)
    if kind in dict(DOCUMENTS):
        raise MediaError(f"not a video that can be opened: it is {kind}")


def describe_recording(media: Media) -> str:
    """How a message goes on that refuses a file as a video or sound: with what it is, if that is something else."""
    with suppress(MediaError, OSError), media.open() as stream:
        kind = name_kind(stream.read(HEAD_BYTES))
        return f": it is {kind}" if kind and kind not in dict(RECORDINGS) else ""
    return ""
