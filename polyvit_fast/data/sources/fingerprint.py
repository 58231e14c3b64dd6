"""Whether the training files are still those that a checkpoint's steps saw: the guard of a resume.

A fingerprint covers all names, labels and their order, the sizes and times of all files (of a million at most, evenly spread), and the
contents of some: reading all of a large dataset takes hours (`polyvit-fast check` does it). Times alone prove nothing, as copies differ.
Names are those within the folder that all files have in common, so that files may move together.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from polyvit_fast.config import Source
from polyvit_fast.data.sources.locations import Locations
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media, MediaError, Sample

Fingerprint = dict[str, str]
"""Texts for `list` (names, labels and their order), `sizes`, `times` and `contents`. All but the first are digests, one for each chunk of
consecutive files, or for each file whose contents were read. Versions up to 0.7 have `names` instead of the first, of the paths as the
configuration gave them."""

NUM_CHUNKS = 4096
MAX_FILES = 1_000_000
CONTENT_FILES, CONTENT_BYTES = 256, 64 << 20
NUM_THREADS = 16  # a network file system answers many requests in the time of one
DIGEST_BYTES = 4
SHOWN = 3


def take_fingerprint(samples: Sequence[Sample]) -> Fingerprint:
    """The fingerprint of the files as they are now. Unreadable ones count as empty. 100,000 local files take about two seconds."""
    listed = _thin(samples)
    paths = list({sample.media.path: None for sample in listed})
    states = dict(zip(paths, map_in_threads(_stat, paths, NUM_THREADS), strict=True))
    sizes, times = np.array([states[sample.media.path] for sample in listed], np.int64).reshape(-1, 2).T
    chosen = _choose(samples)
    limit = CONTENT_BYTES // max(1, len(chosen))
    contents = map_in_threads(lambda sample: _digest(_read_ends(sample.media, limit)), chosen, NUM_THREADS)
    return {
        "list": fingerprint_list(samples),
        "sizes": _digest_chunks(sizes),
        "times": _digest_chunks(times),
        "contents": _encode(contents),
    }


def is_known_by_files(source: Source) -> bool:
    """Whether the fingerprint of a source's samples says all that a run sees of it, wherever it is and however it lists them."""
    return type(source).decoder is Source.decoder  # others may make of a sample what they like


def fingerprint_list(samples: Sequence[Sample]) -> str:
    """A digest of all samples, their order and their labels, which with the seed determine what a step sees."""
    paths = [sample.media.path for sample in samples]
    # What the first and the last in the order of the alphabet begin with, all do.
    common = os.path.commonprefix([min(paths, default=""), max(paths, default="")])  # noqa: RUF071 - it is cut at a separator
    start = common.rfind("/") + 1
    return _digest_list([sample.media.name[start:] for sample in samples], samples)


def fingerprint_names(samples: Sequence[Sample], locations: Locations = ()) -> str:
    """What versions up to 0.7 had instead of `fingerprint_list`, for files that have moved from and to these locations."""

    def move_back(name: str) -> str:
        return next((before + name[len(now) :] for before, now in locations if name.startswith(now)), name)

    return _digest_list([move_back(sample.media.name) for sample in samples], samples)


def _digest_list(names: Iterable[str], samples: Sequence[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in zip(names, samples, strict=True):
        digest.update(f"{name}\x1f{sample.labels}\x1e".encode(errors="surrogateescape"))
    return f"{len(samples)} files, {digest.hexdigest()}"


def find_changes(
    before: str | Mapping[str, str], now: Fingerprint, samples: Sequence[Sample], locations: Sequence[Locations] = ()
) -> tuple[str, bool]:
    """(how the files differ from those of an earlier fingerprint, empty where they do not; whether the list of files is the same).

    The first versions kept a text for the names only, which says nothing about sizes and contents: these then count as equal.
    `locations` are guesses where files have moved, for versions up to 0.7, whose names are whole paths.
    """
    if isinstance(before, str):
        before = {"names": before}
    then = before["list"] if "list" in before else before["names"]
    lists = [now["list"]] if "list" in before else [fingerprint_names(samples, guess) for guess in locations or [()]]
    if then not in lists:
        return f"names and labels: {then}; now {lists[0]}", False
    listed = _thin(samples)
    digests = (("sizes", [listed[chunk] for chunk in _chunks(len(listed))]), ("contents", [[sample] for sample in _choose(samples)]))
    for kind, chunks in digests:
        changed = _name_changed(before.get(kind, now[kind]), now[kind], chunks)
        if changed:
            return f"{kind} of {changed}", True
    return "", True


def find_missing(samples: Sequence[Sample]) -> str:
    """The absolute path of a file that is not there, of those whose contents are read; empty when all are."""
    return next((os.path.abspath(sample.media.path) for sample in _choose(samples) if not os.path.exists(sample.media.path)), "")


def find_newer(before: Mapping[str, str], now: Fingerprint, samples: Sequence[Sample]) -> str:
    """Files with other times than in an earlier fingerprint of the same list; empty when there are none."""
    listed = _thin(samples)
    return _name_changed(before["times"], now["times"], [listed[chunk] for chunk in _chunks(len(listed))])


def _thin(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[:: -(-len(samples) // MAX_FILES) or 1]


def _name_changed(before: str, now: str, chunks: Sequence[Sequence[Sample]]) -> str:
    """The names of the files whose digests differ."""
    changed = [chunk for chunk, one, other in zip(chunks, _decode(before), _decode(now), strict=True) if one != other]
    return ", ".join(_name(chunk) for chunk in changed[:SHOWN]) + (f" and {len(changed) - SHOWN} more" if changed[SHOWN:] else "")


def _name(chunk: Sequence[Sample]) -> str:
    names = [sample.media.name for sample in chunk]
    return names[0] if len(names) == 1 else f"some of the {len(names)} files from {names[0]} to {names[-1]}"


def _stat(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _choose(samples: Sequence[Sample]) -> list[Sample]:
    """The samples whose contents are read, evenly spread."""
    count = min(CONTENT_FILES, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def _read_ends(media: Media, limit: int) -> bytes:
    """The first and last bytes of a file, `limit` in total; all bytes of a shorter one."""
    try:
        with media.open() as stream:
            head = stream.read(limit // 2)
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(len(head), end - limit // 2))
            return head + stream.read(limit // 2)
    except (MediaError, OSError):
        return b""


def _chunks(count: int) -> list[slice]:
    """At most `NUM_CHUNKS` chunks of `count` consecutive files."""
    bounds = [index * count // NUM_CHUNKS for index in range(NUM_CHUNKS + 1)] if count > NUM_CHUNKS else range(count + 1)
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _digest_chunks(numbers: np.ndarray) -> str:
    return _encode([_digest(np.ascontiguousarray(numbers[chunk], "<i8").tobytes()) for chunk in _chunks(len(numbers))])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _encode(digests: Sequence[bytes]) -> str:
    return b64encode(b"".join(digests)).decode()


def _decode(text: str) -> list[bytes]:
    content = b64decode(text)
    return [content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)]
