"""Files that are written whole or not at all, and the full path of one."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def absolute(path: str | Path) -> str:
    """A path from the root, for a message about a file that is not there: a relative one starts from the folder of the command."""
    return os.path.join(os.getcwd(), path)  # not abspath, which would drop "link/.."


def write_atomically(path: str | Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part. Raises OSError, and then leaves nothing behind.

    Text is UTF-8; the lone surrogates of file names that are none come back as the bytes that they stand for. A `durable` file is on the
    disk when the call returns, and survives a power failure.
    """
    temporary = f"{path}.{uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
