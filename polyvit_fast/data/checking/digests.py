"""Files by their contents: what has changed since an earlier check, and which samples are the same file under two names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyvit_fast.media import Media, MediaError, Sample

Split = Literal["train", "val"]
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # as `sha256sum` writes them, in a line that then begins with a backslash


def sha256(media: Media) -> str:
    """The SHA-256 of a file's bytes in hexadecimal; empty when they cannot be read."""
    try:
        with media.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (MediaError, OSError):
        return ""


def format_digests(digests: Iterable[tuple[str, str]]) -> str:
    """(name, SHA-256) pairs as `sha256sum` writes them."""
    lines = []
    for name, digest in digests:
        escaped = "".join(ESCAPES.get(character, character) for character in name)
        mark = "" if escaped == name else "\\"
        lines.append(f"{mark}{digest}  {escaped}\n" if digest else "")
    return "".join(lines)


def read_digests(path: Path) -> dict[str, str]:
    """The SHA-256 of each name in a file of `sha256sum`'s form; none when it is not there. Lines of another form are passed over."""
    try:
        text = path.read_bytes().decode(errors="surrogateescape")
    except OSError:
        return {}
    digests = {}
    for line in text.split("\n"):
        digest, two, name = line.lstrip("\\").partition("  ")
        if two and line.startswith("\\"):
            name = _unescape(name)
        if two:
            digests[name] = digest
    return digests


def _unescape(text: str) -> str:
    characters, plain = iter(text), {escape[1]: character for character, escape in ESCAPES.items()}
    return "".join(plain.get(following := next(characters, ""), following) if c == "\\" else c for c in characters)


@dataclass(frozen=True)
class Same:
    """Two samples of one task whose bytes are equal."""

    split: Split
    name: str
    labels: tuple[int, ...]
    other_split: Split
    other_name: str
    other_labels: tuple[int, ...]


@dataclass(frozen=True)
class Checked:
    """A split that was checked to its end: its samples, and of each good one the SHA-256 of its bytes."""

    samples: Sequence[Sample]
    digests: Sequence[str]
    """Empty where a file is broken."""


def find_leaks(train: Checked, val: Checked) -> Iterator[Same]:
    """Validation samples whose bytes stand in the training split too, each with the first one that they equal."""
    first: dict[str, int] = {}
    for index, digest in enumerate(train.digests):
        first.setdefault(digest, index)
    for index, digest in enumerate(val.digests):
        if digest and digest in first:
            yield _same("val", val.samples[index], "train", train.samples[first[digest]])


def find_contradictions(split: Split, checked: Checked) -> Iterator[Same]:
    """Samples of a split whose bytes are those of an earlier one with other labels."""
    first: dict[str, int] = {}
    for index, digest in enumerate(checked.digests):
        earlier = first.setdefault(digest, index) if digest else index
        if set(checked.samples[earlier].labels) != set(checked.samples[index].labels):
            yield _same(split, checked.samples[index], split, checked.samples[earlier])


def _same(split: Split, sample: Sample, other_split: Split, other: Sample) -> Same:
    return Same(split, sample.media.name, sample.labels, other_split, other.media.name, other.labels)
