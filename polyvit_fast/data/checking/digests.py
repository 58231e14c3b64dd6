"""Files by their contents: which have changed since an earlier check, and which samples are the same file under two names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyvit_fast.media import Media, MediaError, Sample

Split = Literal["train", "val", "test"]
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
    """The SHA-256 of each name in a file in the format of `sha256sum`; empty when it is missing. Other lines are skipped."""
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
class EqualPair:
    """Two samples of one task whose bytes are equal."""

    split: Split
    name: str
    labels: tuple[int, ...]
    other_split: Split
    other_name: str
    other_labels: tuple[int, ...]


@dataclass(frozen=True)
class CheckedSplit:
    """A split that was checked completely: its samples, and the SHA-256 of the bytes of each good one."""

    samples: Sequence[Sample]
    digests: Sequence[str]
    """Empty where a file is broken."""


def find_leaks(train: CheckedSplit, held_out: CheckedSplit, split: Split = "val") -> Iterator[EqualPair]:
    """Held-out samples whose bytes are in the training split too, each with the first training sample that it equals."""
    first: dict[str, int] = {}
    for index, digest in enumerate(train.digests):
        first.setdefault(digest, index)
    for index, digest in enumerate(held_out.digests):
        if digest and digest in first:
            yield _pair(split, held_out.samples[index], "train", train.samples[first[digest]])


def find_contradictions(split: Split, checked: CheckedSplit) -> Iterator[EqualPair]:
    """Samples of a split whose bytes are those of an earlier one with other labels."""
    first: dict[str, int] = {}
    for index, digest in enumerate(checked.digests):
        earlier = first.setdefault(digest, index) if digest else index
        if set(checked.samples[earlier].labels) != set(checked.samples[index].labels):
            yield _pair(split, checked.samples[index], split, checked.samples[earlier])


def _pair(split: Split, sample: Sample, other_split: Split, other: Sample) -> EqualPair:
    return EqualPair(split, sample.media.name, sample.labels, other_split, other.media.name, other.labels)
