"""Files that are written whole or not at all, folders that are there only with something in them, and paths from the root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Inside, the folder is there. What this made of it and of its parents is gone again at the end, unless something was put in.

    Raises OSError when it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something
                path.rmdir()
