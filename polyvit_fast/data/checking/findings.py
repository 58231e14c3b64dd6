"""What a check finds, reported and stored at once: broken, changed and equal files, and manifests of the good ones."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from polyvit_fast.config import Source, Task
from polyvit_fast.data.checking.digests import CheckedSplit, EqualPair, Split, find_contradictions, find_leaks, format_digests, read_digests
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.data.sources.label_cells import format_classes, format_labels
from polyvit_fast.files import write_atomically
from polyvit_fast.media import Media, Sample

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHOWN = 5  # files that a message names


@dataclass(frozen=True)
class Verdict:
    """The result of decoding one sample."""

    index: int
    """Its index among the samples."""
    name: str
    """The name of its media."""
    reason: str = ""
    """Why it cannot be used; empty: it can."""
    digest: str = field(default="", compare=False)
    """The SHA-256 of its bytes; empty when they cannot be read."""


class Findings:
    """What a check has found so far, reported by `report` and stored in files in the folder `out`, also when the check is stopped."""

    def __init__(self, out: Path, report: Callable[[str], None]) -> None:
        self.out, self.report = out, report
        self.num_broken = self.num_checked = 0
        self.failures: list[str] = []
        for name in ("broken.tsv", "duplicates.tsv"):
            (out / name).unlink(missing_ok=True)

    def add(self, name: str, split: Split, verdict: Verdict) -> None:
        """Report a broken file and add it to broken.tsv."""
        self.num_broken += 1
        self.report(f"{name} {split}: {verdict.name}: {verdict.reason}")
        _append_rows(self.out / "broken.tsv", ("task", "split", "path", "reason"), [(name, split, verdict.name, verdict.reason)])

    def fail(self, name: str, split: Split, error: Exception) -> None:
        """Report that a split cannot be checked."""
        task = f"task {name}"
        self.failures.append(f"{task}, {split}")
        self.report(f"{task}, {split}: {str(error).removeprefix(f'{task}: ')}")

    def finish(self, name: str, task: Task, split: Split, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> CheckedSplit:
        """Report a split that was checked completely, and store a manifest of its good files and the digests of all."""
        num_good = sum(not verdict.reason for verdict in verdicts)
        self.report(f"{name} {split}: {num_good} of {len(samples)} files are good")
        write_clean_manifest(self.out / f"{name}-{split}.csv", task, samples, verdicts)
        self.num_checked += 1
        self.compare_digests(name, split, [(verdict.name, verdict.digest) for verdict in verdicts])
        return CheckedSplit(samples, ["" if verdict.reason else verdict.digest for verdict in verdicts])

    def summarise(self) -> str:
        """How many files are broken, where they are listed, and where the manifests of good ones are."""
        if not self.num_checked and not self.num_broken:
            return "no split was checked completely"
        broken = f"{self.num_broken} broken files" + (f", listed in {self.out / 'broken.tsv'}" if self.num_broken else "")
        written = f"manifests of the splits that were checked completely are in {self.out}"
        return f"{broken}; {written if self.num_checked else 'no split was checked completely'}"

    def compare_digests(self, name: str, split: Split, digests: Sequence[tuple[str, str]]) -> None:
        """Report which files have other bytes than at the last check into the same folder, and store the digests for the next one."""
        path = self.out / f"{name}-{split}.sha256"
        before = read_digests(path)
        changed = [file for file, digest in digests if digest and before.get(file, digest) != digest]
        if changed:
            self.report(f"{name} {split}: {len(changed)} files have other bytes than at the last check: {_shorten(changed)}")
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, format_digests(digests))

    def compare(self, name: str, task: Task, checked: Mapping[Split, CheckedSplit]) -> None:
        """Report which good files of a task are equal and should not be, and add them to duplicates.tsv."""
        for split, one in checked.items():
            pairs = list(find_contradictions(split, one))
            self._report_pairs(name, f"{split}: {len(pairs)} files are equal to another one with other labels", pairs)
        if task.train == task.val and checked:
            self.report(f"{name}: its validation files are its training files, so its metric says nothing about other files")
        held_out: list[tuple[Split, Source | None]] = [("val", task.val), ("test", task.test)]
        for split, source in held_out:
            if not {"train", split} <= checked.keys() or source == task.train:
                continue
            pairs = list(find_leaks(checked["train"], checked[split], split))
            self._report_pairs(name, f"{split}: {len(pairs)} files are in the training split too, by their bytes", pairs)

    def _report_pairs(self, name: str, text: str, pairs: Sequence[EqualPair]) -> None:
        if not pairs:
            return
        self.report(f"{name} {text}: {_shorten([f'{one.name} = {one.other_name}' for one in pairs])}")
        rows = [(name, *map(_cell, (p.split, p.name, p.labels, p.other_split, p.other_name, p.other_labels))) for p in pairs]
        header = ("task", "split", "path", "labels", "other_split", "other_path", "other_labels")
        _append_rows(self.out / "duplicates.tsv", header, rows)


def write_clean_manifest(path: Path, task: Task, samples: Sequence[Sample], verdicts: Iterable[Verdict]) -> None:
    """Write a table for `Manifest` with the samples that no verdict calls broken. Its paths are absolute.

    Labels are names where the task has a list of its classes. The list is then written next to the table, for `classes`.
    """
    broken = {verdict.index for verdict in verdicts if verdict.reason}
    good = [sample for index, sample in enumerate(samples) if index not in broken]
    names = class_list(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(_absolute(sample.media), format_labels(sample.labels, names, task.num_classes)) for sample in good]
    write_atomically(path, _format_rows(path, [("path", "labels" if task.multi_label else "label"), *rows]))
    if names:
        write_atomically(path.with_name(f"{_remove_split(path.stem)}-classes.txt"), format_classes(names))


def _remove_split(stem: str) -> str:
    return next((stem.removesuffix(f"-{split}") for split in SPLITS if stem.endswith(f"-{split}")), stem)


def _absolute(media: Media) -> str:
    # Not os.path.abspath, which would drop "link/.." and change the names of members.
    return replace(media, path=os.path.join(os.getcwd(), media.path)).name


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _cell(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else " ".join(map(str, value))


def _format_rows(path: Path, rows: Iterable[Sequence[str]]) -> str:
    """The text of a table, with tabs in a .tsv file and commas in any other."""
    text = io.StringIO()
    for row in rows:
        # Python before 3.13 leaves a cell with a lone carriage return unquoted, and then cannot read it.
        quoting = csv.QUOTE_ALL if any("\r" in cell for cell in row) else csv.QUOTE_MINIMAL
        csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n", quoting=quoting).writerow(row)
    return text.getvalue()


def _append_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Append rows to a table, which begins with its header; the file is closed, so they survive the end of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(_format_rows(path, [*([] if file.tell() else [header]), *rows]))
