"""What a run may resume from: a checkpoint of this configuration, or of a shorter run, on the same files wherever they are now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

from polyvit_fast.config import Train
from polyvit_fast.data.sources.classes import first_difference
from polyvit_fast.data.sources.fingerprint import (
    Fingerprint,
    find_changes,
    find_missing,
    find_newer,
    fingerprint_list,
    is_known_by_files,
)
from polyvit_fast.data.sources.locations import Split, find_locations, name_location
from polyvit_fast.data.stream import Loader
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.run_folder.checkpoint import Checkpoint, find_newest, has_any
from polyvit_fast.train.run_folder.config_json import same_type, to_json
from polyvit_fast.train.run_folder.earlier_versions import is_older_than_0_5, upgrade
from polyvit_fast.train.run_folder.rebuild import RECORDS
from polyvit_fast.train.run_folder.record import resume_differences
from polyvit_fast.train.schedule import count_planned

Steps = dict[str, int]
"""The steps (U_j) of each task."""
KINDS: dict[Split, str] = {"train": "training", "val": "validation"}
"""The splits that a checkpoint knows."""


@runtime_checkable
class Report(Protocol):
    """Takes what is to be said of a run."""

    def __call__(self, text: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """One sentence."""


def check_resume(config: Train, found: Checkpoint | None) -> list[Steps]:
    """The lengths that the run had, oldest first, and the one that it has now.

    Raises ValueError that says what to do when the run cannot begin or go on with this configuration.
    """
    now = count_planned(config)
    if found is None:
        if has_any(config.folder):
            raise ValueError(f"{config.folder} holds checkpoints, but not a single whole one; move it away, or choose another --out")
        return [now]
    if not config.resume:
        raise ValueError(f"{config.folder} holds a run already (step {found.step}) and resume is off; choose another --out or move it away")
    different = resume_differences(found.config, to_json(config), may_change=_list_free_fields(config, upgrade(found.config)))
    if different:
        since = " (written before version 0.5, whose defaults changed)" if is_older_than_0_5(found.config) else ""
        raise ValueError(
            f"{config.folder} holds a checkpoint of another configuration{since}; it differs in: {'; '.join(different)}. "
            "Choose another --out, or set these fields back to resume"
        )
    return _lengthen(config, list_lengths(found), now)


def list_lengths(found: Checkpoint) -> list[Steps]:
    """The lengths that the run of a checkpoint had, oldest first."""
    return found.state.get("lengths") or [{name: task["steps"] for name, task in found.config["tasks"].items()}]


def list_earlier_lengths(config: Train) -> list[Steps]:
    """The lengths that the run in the configuration's folder had before it got that of now; none where there is no such run."""
    found, now = find_newest(config.folder), count_planned(config)
    lengths = list_lengths(found) if found else []
    if not lengths or lengths[-1].keys() != now.keys() or any(now[name] < lengths[-1][name] for name in now):
        return []
    return lengths[:-1] if lengths[-1] == now else lengths


def _lengthen(config: Train, lengths: list[Steps], now: Steps) -> list[Steps]:
    before = lengths[-1]
    shorter = [f"--tasks.{name}.steps {before[name]} (here {now[name]})" for name in now if now[name] < before[name]]
    if shorter:
        raise ValueError(
            f"{config.folder} holds a run that is longer, and a run cannot become shorter, for its learning rate was made for all its "
            f"steps: set {', '.join(shorter)} or more to go on with it, or choose another --out"
        )
    return lengths if now == before else [*lengths, now]


def _list_free_fields(config: Train, stored: Mapping[str, Any]) -> set[str]:
    """Fields that may differ because something else guards them: the steps, and where the files are that the fingerprint knows."""
    free = set[str]()
    for name, task in config.tasks.items():
        free |= {f"tasks.{name}.steps", f"tasks.{name}.test"}  # no training looks at test files
        for split in KINDS:
            before, now = stored["tasks"].get(name, {}).get(split, {}).get("type"), getattr(task, split)
            # A class of the user's may have had a decoder of its own, of which a fingerprint knows nothing.
            if is_known_by_files(now) and (before in RECORDS or same_type(before, to_json(now)["type"])):
                free.add(f"tasks.{name}.{split}")
    return free


@dataclass(frozen=True)
class RunData:
    """The samples of a run, listed."""

    train: dict[str, Loader]
    """Of the tasks that have a step."""
    val: dict[str, Loader]
    train_fingerprints: dict[str, Fingerprint]
    """Of the files when the run was opened, as rank 0 saw them."""
    val_fingerprints: dict[str, Fingerprint]


def open_data(config: Train, tasks: list[str], world: World, report: Report) -> RunData:
    """The loaders of a run whose plan has these tasks. Raises ValueError for data that cannot be listed."""
    say = report if world.rank == 0 else partial(report, level="warning")
    process = {"rank": world.rank, "world_size": world.size, "local_size": world.local_size, "report": say}
    with world.rank0_first():  # only one process makes the demo's files and the indexes of shards
        train, val = (
            {name: Loader(name, config, train=is_train, **process) for name in names}
            for names, is_train in ((tasks, True), (config.tasks, False))
        )
    seen = [{name: loader.fingerprint() for name, loader in loaders.items()} for loaders in (train, val)] if world.rank == 0 else []
    return RunData(train, val, *world.broadcast(seen))


def compare_data(config: Train, found: Checkpoint, data: RunData, report: Report) -> None:
    """Report what has changed of the files since the checkpoint. Raises ValueError when its classes or files are not those of now."""
    for name, names in found.state.get("classes", {}).items():
        difference = first_difference(names, data.val[name].classes)
        if difference:
            raise ValueError(
                f"task {name}: its classes are not those of {found.path}: {difference}. Put them back to resume, or choose another --out"
            )
    stored = upgrade(found.config)["tasks"]
    for name, loader in data.train.items():
        if name in found.state["samples"]:
            now = data.train_fingerprints[name] | {"list": fingerprint_list(loader.samples)}
            _Comparison(config, found, name, "train", stored[name], report).compare(loader, now)
    for name, loader in data.val.items():
        _Comparison(config, found, name, "val", stored[name], report).compare_held_out(loader, data.val_fingerprints[name])


def describe_other_files(found: Checkpoint, split: Split, loaders: Mapping[str, Loader]) -> Iterator[str]:
    """A sentence for each task of which other files are to be evaluated than the checkpoint knows; it knows none for test."""
    known = found.state.get({"train": "samples", "val": "validation_samples"}.get(split, ""), {})
    for name, loader in loaders.items():
        if name in known:
            locations = find_locations(upgrade(found.config)["tasks"][name][split], to_json(loader.source))
            changes, _ = find_changes(known[name], loader.fingerprint(), loader.samples, locations)
            if changes:
                difference = f"these {KINDS[split]} files are not those of {found.path} ({changes})"
                yield f"task {name}: {difference}: its metrics are those of other files"


UNKNOWN = "that checkpoint is of an earlier version, which kept no sizes and contents, so nobody can tell whether these files are the same"
UNKNOWN_REMEDY = "Put them back where they were to resume, or say that they are the same with --changed-files allow"


@dataclass(frozen=True)
class _Comparison:
    """Of the files of a split of a task with those that a checkpoint knows."""

    config: Train
    found: Checkpoint
    name: str
    split: Split
    stored: Mapping[str, Any]
    """The task in the checkpoint's configuration."""
    report: Report

    @property
    def source(self) -> tuple[Any, Any]:
        """The stored configuration of the source, and that of now."""
        return self.stored[self.split], to_json(getattr(self.config.tasks[self.name], self.split))

    @property
    def has_moved(self) -> bool:
        """Whether the files are said to be elsewhere than they were."""
        then, today = self.source
        return then != today

    def describe(self, changes: str) -> str:
        return f"task {self.name}: its {KINDS[self.split]} files are not those of {self.found.path} ({changes})"

    def refuse(self, changes: str, loader: Loader, remedy: str) -> ValueError:
        missing, location = find_missing(loader.samples), name_location(self.name, self.split, loader.source)
        moved = f". {missing} is missing: if the files have moved, say where they are now with {location}" if missing and location else ""
        return ValueError(f"{self.describe(changes)}{moved}. {remedy}")

    def compare(self, loader: Loader, now: Fingerprint) -> None:
        """Of training files: raises ValueError unless they are the same, or may have changed."""
        before = self.found.state["samples"][self.name]
        changes, same_list = find_changes(before, now, loader.samples, find_locations(*self.source))
        if changes and self.config.data.changed_files == "refuse":
            order = "" if same_list else ", which changes the order of the samples from here on,"
            remedy = f"Put them back to resume, allow the change{order} with --changed-files allow, or choose another --out"
            raise self.refuse(changes, loader, remedy)
        if changes:
            order = "" if same_list else f": {len(loader.samples):,} files, in an order of their own from here on"
            self.report(f"{self.describe(changes)}; the run goes on with them as they are now{order}")
        elif isinstance(before, str) and self.has_moved and self.config.data.changed_files == "refuse":
            raise self.refuse(UNKNOWN, loader, UNKNOWN_REMEDY)
        elif isinstance(before, str):
            self.report(
                f"task {self.name}: {self.found.path} is of an earlier version, which kept the names of training files but not their sizes"
            )
        elif before["times"] != now["times"]:
            self.report(
                f"task {self.name}: some of its training files were written or copied since {self.found.path}, but have the sizes of "
                f"then: {find_newer(before, now, loader.samples)}"
            )

    def compare_held_out(self, loader: Loader, now: Fingerprint) -> None:
        """Of validation files, which decide no step: reports other ones. Raises ValueError where the configuration asks for other ones."""
        before, (then, today) = self.found.state.get("validation_samples", {}).get(self.name), self.source
        changes = find_changes(before, now, loader.samples, find_locations(then, today))[0] if before else ""
        if not before and self.has_moved and self.config.data.changed_files == "refuse":
            raise self.refuse(UNKNOWN, loader, UNKNOWN_REMEDY)
        if changes and then != today and self.config.data.changed_files == "refuse":
            remedy = f"Set tasks.{self.name}.val back to resume, allow the change with --changed-files allow, or choose another --out"
            raise self.refuse(changes, loader, remedy)
        if changes:
            self.report(f"{self.describe(changes)}: its metrics are those of other files now", "warning")
