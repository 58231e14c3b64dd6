"""Where the bytes of a media file lie: a file of its own, or a member of a tar shard."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass


class MediaError(Exception):
    """A media file that cannot be used: the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Media:
    """One media file: all of `path`, or the `size` bytes from `offset` of a tar shard that hold `member`."""

    path: str
    offset: int = 0
    size: int | None = None
    member: str = ""

    @property
    def name(self) -> str:
        """What messages call it: `path`, or `shard.tar:member`."""
        return f"{self.path}:{self.member}" if self.member else self.path

    def open(self) -> io.BufferedReader:
        """A seekable stream over exactly these bytes. Raises MediaError when the file is missing, special or empty."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            raise MediaError("the file is missing") from None
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
        return file if self.size is None else io.BufferedReader(_Span(file, self.offset, size))

    def read(self) -> bytes:
        """All bytes. Raises MediaError as `open` does."""
        with self.open() as stream:
            return stream.read()


@dataclass(frozen=True)
class Sample:
    """One example: its media and the indices of its classes (one, or any number for a multi-label task)."""

    media: Media
    labels: tuple[int, ...]


class _Span(io.RawIOBase):
    """Bytes `offset` to `offset + size` of an open file, as a file of its own."""

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
        wanted = max(0, min(len(buffer), self.size - self.position))
        self.file.seek(self.offset + self.position)
        content = self.file.read(wanted)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()
