"""Where the bytes of a media file lie: a file of its own, a member of a tar shard, or memory."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


def _suffixes(text: str) -> frozenset[str]:
    return frozenset(text.split())


PICTURES = _suffixes(
    "jpg jpeg jpe jfif jif pjpeg pjp mpo png apng webp gif bmp dib tif tiff jp2 j2k j2c jpc jpf jpx jph avif avifs heic heif hif jxl "
    "pbm pgm ppm pnm pam pfm tga icb vda vst ico cur icns pcx dcx sgi rgb rgba bw ras dds psd qoi xbm xpm msp blp pcd ftc ftu gbr pxr "
    "fli flc"
)
VIDEOS = _suffixes(
    "mp4 m4v mp4v mov qt mkv mk3d webm avi divx mpg mpeg mpe m1v m2v mpv ts m2ts mts m2t tod mod vob evo flv f4v wmv asf ogg ogv ogm "
    "ogx 3gp 3gpp 3g2 3gp2 mxf ivf y4m rm rmvb dv nut gxf wtv amv nsv mj2 mjpg mjpeg h261 h263 h264 264 avc h265 265 hevc h266 266 "
    "vvc av1 obu fli flc gif apng"
)
SOUNDS = _suffixes(
    "wav wave rf64 w64 bwf flac ogg oga opus spx mp3 mp2 mp1 mpa m4a m4b m4r aac adts loas aif aiff aifc au snd caf wma mka weba ac3 "
    "eac3 ec3 dts thd amr awb ape wv tta tak mpc ra voc sph nist ircam avr pvf htk svx 8svx paf sds sd2 gsm vox dsf dff shn qcp"
)
"""The endings of file names (after the last dot, in lower case) of pictures, videos and sounds; some kinds of file may hold two."""
MEDIA_SUFFIXES = PICTURES | VIDEOS | SOUNDS


class MediaError(Exception):
    """A media file that cannot be used: the message is the reason, without the file's name."""


DEFECTS = (AttributeError, NameError, TypeError, ImportError, AssertionError, LookupError, NotImplementedError)
"""What a decoder raises because of a bug in its code. It says nothing about the file."""


@dataclass(frozen=True)
class Media:
    """One media file: all of `path`, or the `size` bytes from `offset` of a tar shard that hold `member`."""

    path: str
    offset: int = 0
    size: int | None = None
    member: str = ""

    @property
    def name(self) -> str:
        """Its name in messages: `path`, or `shard.tar:member`."""
        return f"{self.path}:{self.member}" if self.member else self.path

    def open(self) -> io.BufferedReader:
        """A seekable stream of exactly these bytes. Raises MediaError when the file is missing, special or empty."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            where = "" if os.path.isabs(self.path) else f": {os.path.join(os.getcwd(), self.path)}"
            raise MediaError(f"the file is missing{where}") from None
        except OSError as error:
            raise MediaError(f"the file cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("not a regular file")
        size = status.st_size - self.offset if self.size is None else self.size
        if size <= 0:
            raise MediaError("the file is empty")
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise MediaError(f"the file cannot be read: {error.strerror}") from None
        return file if self.size is None else io.BufferedReader(_FileSlice(file, self.offset, size))

    def read(self) -> bytes:
        """All bytes. Raises MediaError as `open` does."""
        with self.open() as stream:
            return stream.read()

    @contextmanager
    def find_path(self) -> Iterator[str]:
        """Inside, the path of a file that holds these bytes from `offset` on, for a library that reads no Python stream."""
        yield self.path


@dataclass(frozen=True)
class MemoryMedia(Media):
    """A media file whose bytes are in memory; its `path` is only what messages call it."""

    content: bytes = field(default=b"", repr=False)

    def open(self) -> io.BufferedReader:
        """A seekable stream of these bytes. Raises MediaError when there are none."""
        end = None if self.size is None else self.offset + self.size
        content = self.content[self.offset : end]  # the whole of it is no copy
        if not content:
            raise MediaError("the file is empty")
        return io.BufferedReader(io.BytesIO(content))  # pyright: ignore[reportArgumentType] - it is read like any raw stream

    @contextmanager
    def find_path(self) -> Iterator[str]:
        """Inside, a file without a name that holds these bytes, on no disk."""
        descriptor = os.memfd_create("media")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(self.content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)


def printable(text: str) -> str:
    """The text on one line that any terminal or log can hold: control characters and what is not UTF-8 become \\n, \\xe9 and so on."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else character.encode("unicode_escape").decode()


@dataclass(frozen=True)
class Sample:
    """One example: its media and the indices of its classes (one, or any number for a multi-label task)."""

    media: Media
    labels: tuple[int, ...]


class _FileSlice(io.RawIOBase):
    """Bytes `offset` to `offset + size` of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.size - self.position))
        self.file.seek(self.offset + self.position)
        content = self.file.read(count)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()
