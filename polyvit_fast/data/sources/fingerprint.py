"""What guards a resume: whether the training files are still those that the checkpoint's steps saw.

Names, labels and order are taken whole, sizes and times of all files (of a million at most, evenly spread), and contents of some, for
reading all of a large dataset takes hours: `polyvit-fast check` does that. Times alone prove nothing, as a copy has other ones.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media, MediaError, Sample

Fingerprint = dict[str, str]
"""Words for `names` (with labels and order), `sizes`, `times` and `contents`; all but the first are strings of digests, one for a chunk of
consecutive files, or for a file whose contents were read."""

NUM_CHUNKS = 4096
MAX_FILES = 1_000_000
CONTENT_FILES, CONTENT_BYTES = 256, 64 << 20
NUM_THREADS = 16  # a network's file system answers many questions in the time of one
DIGEST_BYTES = 4
SHOWN = 3


def take_fingerprint(samples: Sequence[Sample]) -> Fingerprint:
    """That of the files as they are now. One that cannot be read counts as empty. 100,000 local files take about two seconds."""
    listed = _list(samples)
    paths = list({sample.media.path: None for sample in listed})
    states = dict(zip(paths, map_in_threads(_stat, paths, NUM_THREADS), strict=True))
    sizes, times = np.array([states[sample.media.path] for sample in listed], np.int64).reshape(-1, 2).T
    chosen = _choose(samples)
    limit = CONTENT_BYTES // max(1, len(chosen))
    contents = map_in_threads(lambda sample: _digest(_read_ends(sample.media, limit)), chosen, NUM_THREADS)
    return {"names": fingerprint_names(samples), "sizes": _digests(sizes), "times": _digests(times), "contents": _text(contents)}


def fingerprint_names(samples: Sequence[Sample]) -> str:
    """A word for all samples, their order and their labels: which of them a step sees follows from it, the seed and the step."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(f"{sample.media.name}\x1f{sample.labels}\x1e".encode(errors="surrogateescape"))
    return f"{len(samples)} files, {digest.hexdigest()}"


def find_changes(before: str | Mapping[str, str], now: Fingerprint, samples: Sequence[Sample]) -> tuple[str, bool]:
    """(in what the files differ from those of an earlier fingerprint, whether their list is the same); an empty text: in nothing.

    Earlier versions kept a word for the names alone; it says nothing of sizes and contents, so that these count as equal.
    """
    if isinstance(before, str):
        before = {"names": before}
    if before["names"] != now["names"]:
        return f"names and labels: {before['names']}; now {now['names']}", False
    listed = _list(samples)
    parts = (("sizes", [listed[chunk] for chunk in _chunks(len(listed))]), ("contents", [[sample] for sample in _choose(samples)]))
    for word, chunks in parts:
        changed = _differing(before.get(word, now[word]), now[word], chunks)
        if changed:
            return f"{word} of {changed}", True
    return "", True


def find_newer(before: Mapping[str, str], now: Fingerprint, samples: Sequence[Sample]) -> str:
    """Files with other times than in an earlier fingerprint of the same list; empty when there are none."""
    listed = _list(samples)
    return _differing(before["times"], now["times"], [listed[chunk] for chunk in _chunks(len(listed))])


def _list(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[:: -(-len(samples) // MAX_FILES) or 1]


def _differing(before: str, now: str, chunks: Sequence[Sequence[Sample]]) -> str:
    """The files, by name, whose words differ."""
    changed = [chunk for chunk, one, other in zip(chunks, _split(before), _split(now), strict=True) if one != other]
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
    """The first and last bytes of a file, `limit` of them in all; all bytes of a shorter one."""
    try:
        with media.open() as stream:
            head = stream.read(limit // 2)
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(len(head), end - limit // 2))
            return head + stream.read(limit // 2)
    except (MediaError, OSError):
        return b""


def _chunks(count: int) -> list[slice]:
    """Consecutive parts of `count` files, `NUM_CHUNKS` at most."""
    bounds = [index * count // NUM_CHUNKS for index in range(NUM_CHUNKS + 1)] if count > NUM_CHUNKS else range(count + 1)
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _digests(numbers: np.ndarray) -> str:
    return _text([_digest(np.ascontiguousarray(numbers[chunk], "<i8").tobytes()) for chunk in _chunks(len(numbers))])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _text(digests: Sequence[bytes]) -> str:
    return b64encode(b"".join(digests)).decode()


def _split(text: str) -> list[bytes]:
    content = b64decode(text)
    return [content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)]
