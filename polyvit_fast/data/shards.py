"""WebDataset shards: tar files in which the members of one key (their name up to the first dot) are one sample.

A shard's headers are read once, into a small index file beside it; samples are then read by their place, in any order. Nothing is
unpacked to disk. Members are refused that could mean something else than their bytes: links, devices, names that leave the folder.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO
from uuid import uuid4

from polyvit_fast.config import Source, Task
from polyvit_fast.data.classes import check_labels
from polyvit_fast.media import Media, Sample

MEDIA_SUFFIXES = (
    {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"}
    | {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv"}
    | {"wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac", "aif", "aiff", "au", "wma"}
)
INDEX_VERSION = 1
MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Samples in uncompressed tar files: one media member and its class in `.cls` (a number) or `.json` ("label" or "labels")."""

    paths: tuple[str, ...]
    """Tar files; a name may be a pattern like train-*.tar or hold {0000..0063} or {a,b}."""
    media_suffix: str = ""
    """Of the member to decode, for instance mp4, where samples hold several media members."""

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f'paths = {self.paths!r} must be a tuple of file names or patterns, such as ("train-*.tar",)')

    def samples(self, task: Task) -> Sequence[Sample]:
        """Shard by shard in the order given, each in the order of its members. Raises ValueError that names shard and member."""
        shards = [shard for pattern in self.paths for shard in _expand(pattern)]
        if len(set(shards)) < len(shards):
            raise ValueError(f"shard {next(s for s in shards if shards.count(s) > 1)} appears twice in paths")
        return [self._sample(shard, example, task) for shard in shards for example in read_index(shard)]

    def _sample(self, shard: str, example: Example, task: Task) -> Sample:
        where = f"shard {shard}, sample {example.key}"
        wanted = self.media_suffix.lower().lstrip(".")
        media = [m for m in example.media if not wanted or m.member.lower().endswith(f".{wanted}")]
        if len(media) != 1:
            kind = f".{wanted}" if wanted else "media"
            held = ", ".join(m.member for m in example.media) or "none"
            raise ValueError(f"{where}: it must hold one {kind} member but holds {held}; set media_suffix to choose one of several")
        if example.labels is None:
            raise ValueError(f'{where}: it has no class; it needs a .cls member, or "label" or "labels" in a .json member')
        check_labels(example.labels, task, where)
        return Sample(media[0], example.labels)


@dataclass
class Example:
    """The members of one key: its media, and its classes when they are told."""

    key: str
    labels: tuple[int, ...] | None = None
    media: list[Media] = field(default_factory=list)


def read_index(shard: str) -> list[Example]:
    """The samples of a tar file, from its index file when that is up to date, else from the tar itself. Raises ValueError as to why not."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise ValueError(f"shard {shard}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"shard {shard}: not a regular file")
    state = {"version": INDEX_VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    path = f"{shard}.index.json"
    examples = _load(path, shard, state)
    if examples is None:
        examples = _scan(shard)
        _save(path, examples, state)
    return examples


def _load(path: str, shard: str, state: dict[str, int]) -> list[Example] | None:
    """The examples in an index file; None when there is none for this state of the shard."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            index = json.load(file)
        if {name: index[name] for name in state} != state:
            return None
        examples = []
        for key, labels, members in index["examples"]:
            media = [Media(shard, int(offset), int(size), str(name)) for name, offset, size in members]
            if any(m.offset < 0 or m.size is None or m.size < 0 or m.offset + m.size > state["size"] for m in media):
                return None
            examples.append(Example(str(key), None if labels is None else tuple(map(int, labels)), media))
        return examples
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _save(path: str, examples: list[Example], state: dict[str, int]) -> None:
    """Write an index file whole or not at all. A folder that cannot be written is no fault: the next run scans again."""
    rows = [(example.key, example.labels, [(m.member, m.offset, m.size) for m in example.media]) for example in examples]
    temporary = f"{path}.{uuid4().hex}.tmp"
    with suppress(OSError):
        try:
            with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as file:
                json.dump(state | {"examples": rows}, file, ensure_ascii=False, allow_nan=False)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)


def _scan(shard: str) -> list[Example]:
    examples: dict[str, Example] = {}
    seen: set[str] = set()
    with open(shard, "rb") as file:
        for member in _members(shard, file):
            where = f"shard {shard}, member {member.name!r}"
            _refuse_unsafe(member, where)
            folder, _, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not member.isreg() or not stem or not dot:
                continue
            if member.name in seen:
                raise ValueError(f"{where}: it appears twice")
            seen.add(member.name)
            key = f"{folder}/{stem}" if folder else stem
            kind = suffix.rpartition(".")[2].lower()
            if kind in MEDIA_SUFFIXES:
                examples.setdefault(key, Example(key)).media.append(Media(shard, member.offset_data, member.size, member.name))
            elif suffix.lower() in ("cls", "json"):
                labels = _read_labels(file, member, suffix.lower(), where)
                example = examples.setdefault(key, Example(key))
                if labels is not None and (example.labels is None or suffix.lower() == "cls"):
                    example.labels = labels
    return list(examples.values())


def _members(shard: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The tar's headers, in order. Raises ValueError when the file is no tar, or ends or breaks before its end mark."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - a million of them would take a gigabyte
                yield member
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard {shard}: not an uncompressed tar file, or a truncated one ({error})") from None
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"shard {shard}: truncated: the tar's end mark is missing")
    if block.strip(b"\0"):
        raise ValueError(f"shard {shard}: damaged: no valid header at byte {end}")


def _refuse_unsafe(member: tarfile.TarInfo, where: str) -> None:
    if member.name.startswith(("/", "\\")) or "\0" in member.name or ".." in re.split(r"[/\\]", member.name):
        raise ValueError(f"{where}: its name is absolute or leaves the folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{where}: it is a link, a device or a sparse file; only plain files are allowed")


def _read_labels(file: BinaryIO, member: tarfile.TarInfo, kind: str, where: str) -> tuple[int, ...] | None:
    """The classes that a .cls or .json member tells; None for JSON that tells none."""
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{where}: {member.size} bytes are too many for a label")
    file.seek(member.offset_data)
    text = file.read(member.size).decode(errors="replace")
    try:
        content = int(text) if kind == "cls" else json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: {text[:40]!r} is not {'a class number' if kind == 'cls' else 'JSON'}") from None
    if isinstance(content, dict):
        content = content.get("labels", content.get("label"))
        if content is None:
            return None
    labels = content if isinstance(content, list) else [content]
    if not all(type(label) is int for label in labels):
        raise ValueError(f"{where}: {content!r} is not a class number or a list of them")
    return tuple(dict.fromkeys(labels))


def _expand(pattern: str) -> list[str]:
    """File names of a pattern with {0..9}, {a,b}, * and ?. Raises ValueError when there are none."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces:
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        return [name for choice in _choices(braces[1]) for name in _expand(before + choice + after)]
    if os.path.exists(pattern):
        return [pattern]
    names = sorted(glob.glob(pattern))
    if not names:
        raise ValueError(f"shard {pattern}: no such file")
    return names


def _choices(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    return [str(number).zfill(len(numbers[1])) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
