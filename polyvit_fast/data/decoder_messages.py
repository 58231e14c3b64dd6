"""What libraries write to standard error about damaged files, kept off the terminal and reported in our words.

libjpeg, libpng, libtiff and nvImageCodec name no file, may write thousands of lines about one, and have no switch for it that can be
reached. FFmpeg writes nothing where it is called by PyAV, which switches that off.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING

from polyvit_fast.media import Media, printable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from polyvit_fast.config import Decoder

KINDS = {
    "JPEG": r"(Corrupt JPEG data|Premature end of JPEG|Invalid JPEG file|Unsupported marker type|Inconsistent progression"
    r"|(Huffman|Quantization|Arithmetic) table .* was not defined)|\[(ERROR|WARNING)\] *\[\w*jpeg\w*\]",
    "PNG": r"libpng (error|warning): |\[(ERROR|WARNING)\] *\[\w*png\w*\]",
    "FFmpeg": r"\[[\w,]+ @ (0x)?[0-9a-f]+\] ",
    "TIFF": r"(\w*(Decode|Setup)\w*|TIFF\w+|\w*JPEGLib|tempfile\.tif): |\[(ERROR|WARNING)\] *\[\w*tiff\w*\]",
}
"""How the messages about each kind of file begin."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CHUNK_BYTES = 1 << 16
PIPE_BYTES = 1 << 20
"""What libraries write beyond that, before it is read, is lost."""
_WAKE = b"\0"
# Reads 1, a pipe that ends with this process, and passes on what is left in 0 then: the last words of a crash.
_RESCUE = ["/bin/sh", "-c", "read _ <&1; exec cat >&2"]


class DecoderMessages:
    """Standard error as a pipe: lines of `KINDS` are kept for `take`, all others go where they would have gone, at once."""

    def __init__(self) -> None:
        self.lock, self.stopped = threading.Lock(), False
        self.found: dict[str, str] = {}
        self.unfinished = b""
        self.real = os.dup(2)
        self.reads, self.writes = os.pipe()
        # A library that keeps Python's lock while it writes more than the pipe holds would wait for ever for the thread that reads it.
        os.set_blocking(self.writes, False)
        with suppress(OSError):
            fcntl.fcntl(self.writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        other_end, self.alive = os.pipe()
        # In a session of its own, for Ctrl-C is not meant for it.
        self.rescue = subprocess.Popen(_RESCUE, stdin=self.reads, stdout=other_end, start_new_session=True)
        os.close(other_end)
        os.dup2(self.writes, 2)
        self.thread = threading.Thread(target=self._pass_on, daemon=True, name="decoder messages")
        self.thread.start()

    def take(self) -> dict[str, str]:
        """The kinds of files about which something was written since the last call, each with the first line."""
        with self.lock:
            self._read()
            found, self.found = self.found, {}
        return found

    def close(self) -> None:
        """Give standard error back."""
        os.dup2(self.real, 2)
        self.stopped = True
        with suppress(OSError):  # a full pipe wakes the thread as well
            os.write(self.writes, _WAKE)
        self.thread.join()
        with self.lock:
            self._read()
        self._write(self.unfinished)
        for descriptor in (self.writes, self.alive):
            os.close(descriptor)
        try:
            self.rescue.wait(1.0)
        except subprocess.TimeoutExpired:  # another process still has the pipe as its standard error
            self.rescue.kill()
            self.rescue.wait()
        os.close(self.reads)
        os.close(self.real)

    def _pass_on(self) -> None:
        while not self.stopped:
            select.select([self.reads], [], [])
            with self.lock:
                self._read()

    def _read(self) -> None:
        """Sort the lines that are in the pipe, without waiting for more."""
        while select.select([self.reads], [], [], 0)[0]:
            *lines, self.unfinished = (self.unfinished + os.read(self.reads, _CHUNK_BYTES).replace(_WAKE, b"")).split(b"\n")
            for line in lines:
                text = _COLOURS.sub("", line.decode(errors="replace")).strip()
                kind = next((kind for kind, begin in KINDS.items() if re.match(begin, text)), None)
                if kind:
                    self.found.setdefault(kind, text.rstrip("."))
                else:
                    self._write(line + b"\n")

    def _write(self, content: bytes) -> None:
        """Pass on what is no decoder's. Where its reader is gone, it is lost: that is no reason to stop."""
        with suppress(OSError):
            while content:
                content = content[os.write(self.real, content) :]


_current: DecoderMessages | None = None
_streams: list[TextIOWrapper] = []
"""Python's own streams to what standard error was. They stay open: whoever was given one, such as a handler of `logging`, may keep it."""


@contextmanager
def catch_decoder_messages() -> Iterator[None]:
    """Inside, libraries' messages about damaged files are kept for `describe_messages`; Python's own go to standard error as ever.

    Nothing is caught where there is no standard error or no shell.
    """
    global _current
    stderr, own, messages = sys.stderr, None, None
    with suppress(OSError):
        own = _open_stream()
        messages = None if _current else DecoderMessages()
    if messages is None:
        yield
        return
    _current, sys.stderr = messages, own or stderr
    try:
        yield
    finally:
        _current, sys.stderr = None, stderr
        messages.close()


def _open_stream() -> TextIOWrapper | None:
    """A stream to standard error that a later pipe does not divert; None when Python's leads elsewhere, as in a notebook."""
    stderr = sys.stderr
    try:
        if stderr is None or stderr.fileno() != 2:
            return None
        stderr.flush()
    except (OSError, ValueError):
        return None
    for stream in _streams:
        if os.path.sameopenfile(stream.fileno(), 2):
            return stream
    _streams.append(open(os.dup(2), "w", buffering=1, encoding=stderr.encoding, errors="backslashreplace"))  # noqa: SIM115
    return _streams[-1]


def decode_or_forget(decoder: Decoder, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
    """The grids. Of files that cannot be decoded the error says more than what libraries wrote, which is forgotten."""
    try:
        return decoder(media, rngs)
    except Exception:
        if _current:
            _current.take()
        raise


def describe_messages(reported: set[str], media: Sequence[Media], decode: Callable[[int], object]) -> Iterator[str]:
    """A text for each kind of file that libraries wrote about while these were decoded together, unless it is in `reported`, to which it is
    added. `decode` decodes one of the files alone, by which the one at fault is found.
    """
    found = _current.take() if _current else {}
    for kind in found.keys() - reported:
        reported.add(kind)
        name = _find_file(kind, media, decode) or f"one of {len(media)} files, of which {printable(media[0].name)} is the first,"
        yield (
            f"{name} may be damaged ({kind} library: {found[kind]}), and is used as it was decoded. "
            "Others like it are not named here: `polyvit-fast check` judges every file"
        )


def _find_file(kind: str, media: Sequence[Media], decode: Callable[[int], object]) -> str:
    for index, one in enumerate(media):
        try:
            decode(index)
        except Exception:  # reported when its turn comes
            continue
        if _current and kind in _current.take():
            return printable(one.name)
    return ""
