"""What people call a file, as items that a decoder reads: paths, bytes, open files, arrays, and lists of these."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from polyvit_fast.config import Modality
from polyvit_fast.data.arrays import read_value
from polyvit_fast.media import Media, MediaError, MemoryMedia

Skip = Callable[[str, Exception], None]
"""What to do with a broken input, given its name and the reason."""
NAME = "input"
"""What messages call an input without a name of its own; those of a list are input[0], input[1] and so on."""


@dataclass(frozen=True)
class Item:
    """One input: a medium to be decoded, or a grid `[view, frames, rows, columns, channels]`."""

    name: str
    content: Media | Tensor


def list_items(inputs: Any, modality: Modality, skip: Skip) -> Iterator[Item]:
    """The items of one input or of a list of inputs, in order, each made when it is asked for.

    An array may hold several. A damaged value is given to `skip`, with its name. Raises ValueError for what is no input of the modality.
    """
    if not _is_several(inputs):
        yield from _read(inputs, NAME, modality, skip)
        return
    for number, value in enumerate(inputs):
        yield from _read(value, f"{NAME}[{number}]", modality, skip)


def _is_several(inputs: Any) -> bool:
    """Whether it is a list of inputs, in whichever form: a pair of an array and a number, such as its sample rate, is a single one."""
    if isinstance(inputs, tuple):
        return not (len(inputs) == 2 and hasattr(inputs[0], "__array__") and isinstance(inputs[1], Real))
    return isinstance(inputs, list | Iterator) and not hasattr(inputs, "read")


def _read(value: Any, name: str, modality: Modality, skip: Skip) -> Iterator[Item]:
    if isinstance(value, str | os.PathLike):
        yield Item(os.fspath(value), _find_file(os.fspath(value)))
    elif isinstance(value, Media):
        yield Item(value.name, value)
    elif isinstance(value, bytes | bytearray | memoryview):
        yield Item(name, MemoryMedia(name, content=bytes(value)))
    elif hasattr(value, "read") and not hasattr(value, "getexif"):
        yield _read_stream(value, name)
    else:
        try:
            contents = read_value(modality, value, name)
        except MediaError as error:
            skip(name, error)
            return
        for number, content in enumerate(contents):
            yield Item(name if len(contents) == 1 else f"{name}[{number}]", content)


def _find_file(path: str) -> Media:
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give a list of its files, or use polyvit-fast predict, which looks for them")
    return Media(path)


def _read_stream(stream: Any, name: str) -> Item:
    """The rest of an open file, which has a name if it is one on a disk."""
    content, own = stream.read(), getattr(stream, "name", None)
    if not isinstance(content, bytes):
        raise ValueError(f"{own or name}: a file open for text; open it for bytes, with open(path, 'rb')")
    name = own if isinstance(own, str) else name
    return Item(name, MemoryMedia(name, content=content))
