"""Where a source's files are: the flags that say so, where they may have been before they moved, and what to do about broken ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any, Literal

from polyvit_fast.config import Source

Split = Literal["train", "val", "test"]
Locations = Sequence[tuple[str, str]]
"""(where files were, where they are now): beginnings of paths."""
CHANGED_FILES = "Files that have changed since the run began need --changed-files allow"


def name_location(task: str, split: Split, source: Source) -> str:
    """The flag that says where a source's files are; empty when it has none of the usual names."""
    field = next((field for field in ("root", "path", "paths") if hasattr(source, field)), "")
    return f"--tasks.{task}.{split}.{field}" if field else ""


def advise_location(task: str, sources: Mapping[Split, Source]) -> str:
    """Advice where a path of a source, or the folder of its shards, does not exist; empty when all are there."""
    for split, source in sources.items():
        for field in ("path", "paths", "classes"):
            values = getattr(source, field, "")
            for path in [values] if isinstance(values, str) else values:
                where = os.path.abspath(os.path.dirname(path) if field == "paths" else path)
                if path and not os.path.exists(where):
                    return f". If the files have moved, say where they are with --tasks.{task}.{split}.{field}"
    return ""


def advise_on_broken(task: str, trains: bool) -> str:
    """How a command that found too many broken files goes on."""
    if not trains:
        return "Start the same command again after you have repaired or replaced them, or with a larger --max-bad-ratio"
    return (
        "Start the same command again with a larger --max-bad-ratio, and the run goes on without them; or once you have repaired or "
        f"replaced them, or made the manifest tasks.{task}.train of the experiment. {CHANGED_FILES}"
    )


def find_locations(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Locations]:
    """Where the files of a source may have moved, by its stored configurations of then and now: each a guess to be compared."""
    texts = _pair_texts(_fill_root(before), _fill_root(now))
    pairs = [(_split(one), _split(other)) for one, other in texts if one != other]
    return [(), _join_locations(starmap(_drop_common_end, pairs)), _join_locations((one[:-1], other[:-1]) for one, other in pairs)]


def _fill_root(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest without a root has its own folder as one."""
    return {**source, "root": os.path.dirname(source["path"])} if source.get("root") == "" and "path" in source else source


def _split(path: str) -> list[str]:
    return path.rstrip("/").split("/") if path else []


def _drop_common_end(one: Sequence[str], other: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


def _join_locations(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Locations:
    # Of many shards all have one location.
    return tuple(dict.fromkeys(("".join(f"{name}/" for name in one), "".join(f"{name}/" for name in other)) for one, other in pairs))


def _pair_texts(before: object, now: object) -> Iterator[tuple[str, str]]:
    if isinstance(before, str) and isinstance(now, str):
        yield before, now
    elif isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in before:
            if name in now and name != "type":
                yield from _pair_texts(before[name], now[name])
    elif isinstance(before, list) and isinstance(now, list):
        for one, other in zip(before, now, strict=False):
            yield from _pair_texts(one, other)
