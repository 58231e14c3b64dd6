"""The members of tar shards and their offsets, from one pass over the headers, whose result is kept in a small index file.

Members are refused that could mean something other than their bytes: links, devices, names that leave the folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from polyvit_fast.data.sources.shard_labels import MAX_BYTES, Labels, parse_labels
from polyvit_fast.files import absolute, write_atomically
from polyvit_fast.media import Media, printable

INDEX_VERSION = 2  # of the index file; a file of another version is written again
LABEL_SUFFIXES = ("cls", "json")
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}
VOLUME_LABEL = b"V"  # a tape's name, which GNU tar writes on request: no file
META = re.compile(r"__[^/]*__($|/)")  # members about the shard, which WebDataset skips
CHUNK_BYTES = 1 << 20


@dataclass
class ShardExample:
    """The members of one key."""

    key: str
    labels: Labels | None = None
    """Its classes, where a member states them: numbers or names."""
    label_member: str = ""
    """The member that states the classes; empty: there is none."""
    label_fault: str = ""
    """Why that member cannot be used."""
    media: list[Media] = field(default_factory=list)
    """All other members; the source chooses the media file among them."""


def suffix_of(member: str) -> str:
    """All behind the first dot of a member's base name, in lower case: what does not belong to its key."""
    return member.rpartition("/")[2].partition(".")[2].lower()


def read_index(shard: str) -> list[ShardExample]:
    """The members of a tar file by key, from its index file if that is up to date, else from the tar itself.

    Raises ValueError with the shard and the reason why it cannot be used.
    """
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ValueError(f"shard {absolute(shard)}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"shard {shard}: not a regular file")
    state = {"version": INDEX_VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    path = f"{shard}.index.json"
    examples = _load(path, shard, state)
    if examples is None:
        try:
            examples = _scan(shard)
        except OSError as error:
            raise ValueError(f"shard {absolute(shard)}: {error.strerror}") from None
        _save(path, examples, state)
    return examples


def _load(path: str, shard: str, state: dict[str, int]) -> list[ShardExample] | None:
    """The examples in an index file; None when there is none for this state of the shard."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            index = json.load(file)
        if {name: index[name] for name in state} != state:
            return None
        examples = []
        for key, labels, label_member, label_fault, members in index["examples"]:
            media = [Media(shard, int(offset), int(size), str(name)) for name, offset, size in members]
            if any(m.offset < 0 or m.size is None or m.size < 0 or m.offset + m.size > state["size"] for m in media):
                return None
            if labels is not None and any(type(label) not in (int, str) for label in labels):
                return None
            examples.append(ShardExample(str(key), None if labels is None else tuple(labels), str(label_member), str(label_fault), media))
        return examples
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _save(path: str, examples: list[ShardExample], state: dict[str, int]) -> None:
    """Write an index file. That its folder cannot be written is no error: the next run scans the shard again."""
    rows = [(e.key, e.labels, e.label_member, e.label_fault, [(m.member, m.offset, m.size) for m in e.media]) for e in examples]
    with suppress(OSError):
        write_atomically(path, json.dumps(state | {"examples": rows}, ensure_ascii=False, allow_nan=False))


def _scan(shard: str) -> list[ShardExample]:
    examples: dict[str, ShardExample] = {}
    seen: set[str] = set()
    archives: dict[tuple[str, bool], int] = {}
    with open(shard, "rb") as file:
        for archive, member in _members(shard, file):
            where = f"shard {shard}, member {member.name!r}"
            _refuse_unsafe(member, where)
            folder, _, base = member.name.rpartition("/")
            stem, dot, _ = base.partition(".")
            if not member.isreg() or not stem or not dot or META.match(member.name):
                continue
            if member.name in seen:
                raise ValueError(f"{where}: it appears twice")
            seen.add(member.name)
            key, is_label = f"{folder}/{stem}" if folder else stem, suffix_of(member.name) in LABEL_SUFFIXES
            if archives.setdefault((key, is_label), archive) != archive:
                fault = f"sample {printable(key)} is in two of the archives that are concatenated in this file"
                raise ValueError(f"{where}: {fault}; give the samples of one of them other names")
            example = examples.setdefault(key, ShardExample(key))
            if is_label:
                _take_label(example, file, member, where)
            else:
                example.media.append(Media(shard, member.offset_data, member.size, member.name))
    return list(examples.values())


def _take_label(example: ShardExample, file: BinaryIO, member: tarfile.TarInfo, where: str) -> None:
    """Store the classes that a member states. A .cls member takes precedence over a .json member."""
    kind = suffix_of(member.name)
    if suffix_of(example.label_member) == kind:
        raise ValueError(f"{where}: {example.label_member!r} states the classes of the same sample")
    if kind == "json" and example.label_member:
        return
    example.label_member, example.labels, example.label_fault = member.name, None, ""
    file.seek(member.offset_data)
    try:
        example.labels = parse_labels(file.read(min(member.size, MAX_BYTES + 1)), kind)
    except ValueError as error:
        example.label_fault = str(error)


def _members(shard: str, file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """(number of the archive, header) of every member, in order: `cat a.tar b.tar` makes a file of two archives.

    Raises ValueError when the file is no tar, ends or is damaged before an end mark, or has something else behind one.
    """
    start: int | None = 0
    archive, name = 0, ""
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - a million of them would take a gigabyte
                    name = member.name
                    yield archive, member
                end = tar.offset
        except tarfile.TarError as error:
            kind = "truncated" if "end of data" in str(error) else "damaged"
            reason = f"{kind} at member {name!r} or behind it ({error})" if name else _refusal(file, error)
            raise ValueError(f"shard {shard}: {reason}") from None
        if archive and end == start:
            raise ValueError(f"shard {shard}: damaged: behind the tar's end mark, at byte {end}, is something that is no tar header")
        start, archive = _find_next_archive(shard, file, end), archive + 1


def _refusal(file: BinaryIO, error: Exception) -> str:
    """Why a file without a single valid header is no tar."""
    file.seek(0)
    head = file.read(8)
    kind = next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), "")
    if kind:
        return f"not an uncompressed tar file but one of {kind}: samples are read at their offsets, so unpack it first"
    return f"not an uncompressed tar file, or a truncated one ({error})"


def _find_next_archive(shard: str, file: BinaryIO, end: int) -> int | None:
    """The first byte behind an end mark that is not zero; None when there is none. Raises ValueError when there is no end mark."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"shard {shard}: truncated: the tar's end mark is missing")
    if block.strip(b"\0"):
        raise ValueError(f"shard {shard}: damaged: no valid header at byte {end}")
    position = end + len(block)
    while chunk := file.read(CHUNK_BYTES):
        if content := chunk.lstrip(b"\0"):
            return position + len(chunk) - len(content)
        position += len(chunk)
    return None


def _refuse_unsafe(member: tarfile.TarInfo, where: str) -> None:
    if member.name.startswith(("/", "\\")) or "\0" in member.name or ".." in re.split(r"[/\\]", member.name):
        raise ValueError(f"{where}: its name is absolute or leaves the folder")
    if member.type == VOLUME_LABEL:
        return
    if member.type not in tarfile.SUPPORTED_TYPES:
        raise ValueError(f"{where}: it is of tar's kind {member.type.decode(errors='replace')!r}; only plain files are allowed")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{where}: it is a link, a device or a sparse file; only plain files are allowed")
