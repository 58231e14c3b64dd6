"""WebDataset shards: tar files in which the members of one key (the path up to the first dot of the base name) are one sample.

A shard's headers are read once, into a small index file next to it. Samples are then read at their offsets, in any order, and nothing is
unpacked to disk.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from polyvit_fast.config import ConfigError, Source, Task
from polyvit_fast.data.sources.classes import check_labels, class_list, shorten
from polyvit_fast.data.sources.shard_index import ShardExample, read_index, suffix_of
from polyvit_fast.files import absolute
from polyvit_fast.media import MEDIA_SUFFIXES, Media, Sample, printable

SHOWN = 5  # members that a message names


@dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Samples in uncompressed tar files: one media member and its class in `.cls` (a number or a name) or `.json` ("label" or "labels")."""

    paths: tuple[str, ...]
    """Tar files; a name may be a pattern like train-*.tar or hold {0000..0063} or {a,b}. Relative paths start from the folder in which
    the command runs."""
    media_suffix: str = ""
    """All behind the first dot of the member to decode, such as mp4 or left.png; empty: each sample's only picture, video or sound."""

    def __post_init__(self) -> None:
        if not all(self.paths or [""]):
            raise ConfigError("paths", f'paths = {self.paths!r} must be file names or patterns, such as ("train-*.tar",)')

    def samples(self, task: Task) -> Sequence[Sample]:
        """Shard by shard in the order given, each in the order of its members. Raises ValueError that names shard and member."""
        names = class_list(task, self) if self.class_names(task) else None
        numbers = {name: number for number, name in enumerate(names or ())}
        return [self._sample(shard, example, task, numbers) for shard, example in self._examples()]

    def class_names(self, task: Task) -> tuple[str, ...] | None:
        """The names in the label members, sorted; None when those are numbers. Raises ValueError when some are names, others numbers."""
        found = [_find_classes(shard, (status := os.stat(shard)).st_size, status.st_mtime_ns) for shard in self._shards()]
        by_name, by_number = ([where for classes in found if (where := classes[kind])] for kind in (1, 2))
        if by_name and by_number:
            raise ValueError(f"{by_name[0]}, but {by_number[0]}: all label members must hold names, or all numbers")
        return tuple(sorted(frozenset().union(*(names for names, _, _ in found)))) if by_name else None

    def describe_classes(self, names: Sequence[str]) -> str:
        """Which shards name the classes."""
        return f"shards {', '.join(self.paths)}: they name {len(names)} classes ({shorten(names)})"

    def _examples(self) -> list[tuple[str, ShardExample]]:
        """(shard, members) of every sample."""
        examples = []
        for shard in self._shards():
            held = [(shard, example) for example in read_index(shard) if self._is_sample(example)]
            if not held:
                raise ValueError(f"shard {shard}: it holds no samples; leave it out of paths")
            examples += held
        return examples

    def _shards(self) -> list[str]:
        shards = [shard for pattern in self.paths for shard in _expand(pattern)]
        if len(set(shards)) < len(shards):
            raise ValueError(f"shard {next(s for s in shards if shards.count(s) > 1)} appears twice in paths")
        return shards

    def _is_sample(self, example: ShardExample) -> bool:
        """Whether the members of a key are, or should be, a sample, and not notes about the shard."""
        return bool(example.label_member or self._candidates(example) or any(_is_media(media) for media in example.media))

    def _candidates(self, example: ShardExample) -> list[Media]:
        """The members that could be the sample's media file."""
        suffix = self.media_suffix.lower().lstrip(".")
        return [media for media in example.media if (suffix_of(media.member) == suffix if suffix else _is_media(media))]

    def _sample(self, shard: str, example: ShardExample, task: Task, numbers: dict[str, int]) -> Sample:
        where = f"shard {shard}, sample {printable(example.key)}"
        media = self._candidates(example)
        if len(media) != 1:
            raise ValueError(f"{where}: {self._refusal(example, media)}")
        if example.label_member:
            where = f"shard {shard}, member {example.label_member!r}"
        if example.label_fault:
            raise ValueError(f"{where}: {example.label_fault}")
        if example.labels is None:
            raise ValueError(f'{where}: it has no class; a sample needs a .cls member, or "label" or "labels" in a .json member')
        labels = tuple(numbers[label] if isinstance(label, str) else label for label in example.labels)
        check_labels(labels, task, where)
        return Sample(media[0], labels)

    def _refusal(self, example: ShardExample, candidates: list[Media]) -> str:
        """Why a sample does not have exactly one media file."""
        members = [media.member for media in candidates or example.media]
        held = ", ".join(map(printable, members[:SHOWN])) + (f" and {len(members) - SHOWN} more" if len(members) > SHOWN else "")
        suffix = self.media_suffix.lower().lstrip(".")
        if suffix:
            advice = (
                f"the suffix is all behind the first dot of a name, here {suffix_of(members[0])}" if members else "its files are missing"
            )
            return f"it must hold one .{suffix} member but holds {held or 'none'}; {advice}"
        advice = "; set media_suffix to choose one of several" if candidates else ""
        if len(candidates) > SHOWN:
            advice = ": a key ends at the first dot, so names must not hold further ones"
        return f"it must hold one media member but holds {held or 'none'}{advice}"


def _is_media(media: Media) -> bool:
    return suffix_of(media.member).rpartition(".")[2] in MEDIA_SUFFIXES


@lru_cache(maxsize=4096)
def _find_classes(shard: str, size: int, mtime_ns: int) -> tuple[frozenset[str], str, str]:
    """(the names in a shard's label members, the position of the first name for messages, that of the first number)."""
    first: dict[type, str] = {}
    names = set()
    for example in read_index(shard):
        for label in example.labels or ():
            first.setdefault(type(label), f"shard {shard}, member {example.label_member!r} holds the {_kind(label)} {label!r}")
            names |= {label} if isinstance(label, str) else set()
    return frozenset(names), first.get(str, ""), first.get(int, "")


def _kind(label: int | str) -> str:
    return "name" if isinstance(label, str) else "number"


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
        raise ValueError(f"shard {absolute(pattern)}: no such file")
    return names


def _choices(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    return [str(number).zfill(len(numbers[1])) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
