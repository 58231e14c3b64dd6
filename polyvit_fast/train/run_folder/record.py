"""The files of a run folder that describe its run: the experiment, its configuration, the command lines, versions, names of classes."""

from __future__ import annotations

import ast
import json
import platform
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polyvit_fast
from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.files import write_atomically
from polyvit_fast.train.run_folder.checkpoint import Checkpoint
from polyvit_fast.train.run_folder.config_json import differences, from_json, to_json
from polyvit_fast.train.run_folder.earlier_versions import LaterVersionError, check_schema, stamp, upgrade
from polyvit_fast.train.run_folder.rebuild import RECORDS, OwnClassError, rebuild

MAY_CHANGE = frozenset(
    {
        *("out", "resume", "log"),
        *("data.num_threads", "data.prefetch", "data.decode_timeout_seconds", "data.max_bad_ratio", "data.changed_files"),
        *("compute.capture", "compute.recompute", "compute.nonfinite_patience", "distributed.sharded"),
    }
)
"""Fields in which a run and its resumption may differ: none of what is trained depends on them."""
MADE_IN_PYTHON = "(made in Python)"
"""The experiment of a run whose configuration no experiment holds."""
ADVICE = "give the configuration that the run was trained with: polyvit_fast.load(run, config=config)"
COPY = "experiment.py"
"""The user's experiment file, in the run folder."""


@dataclass(frozen=True)
class RecordedRun:
    """A run folder, read back, with the configuration of one of its checkpoints."""

    folder: Path
    experiment: str
    """As the command line named it: a name or the path of a file; else `MADE_IN_PYTHON`."""
    config: Train
    commands: list[str]
    """The command lines that worked on this folder, oldest first."""
    versions: dict[str, Any]
    """Of Python, the libraries and this package, at the last start."""
    remark: str = ""
    """What the folder's config.json says otherwise than the checkpoint, in a sentence. Empty: nothing."""


def resume_differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """The differences between two stored configurations that forbid resuming: all outside `MAY_CHANGE` and `may_change`."""
    return differences(upgrade(old), new, ignore=MAY_CHANGE.union(may_change))


def describe_run(folder: Path, experiment: str, argv: Sequence[str], config: Train) -> None:
    """Write config.json, command.txt, versions.json and, when the experiment is a user's file, a copy of it: experiment.py.

    A resumed run adds its command line to the earlier ones. Raises ValueError when the folder cannot be written.
    """
    content = {**stamp(), "experiment": experiment, "config": to_json(config)}
    commands = folder / "command.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = commands.read_text(errors="surrogateescape") if commands.is_file() else ""
        if experiment.endswith(".py"):
            write_atomically(folder / COPY, Path(experiment).read_bytes(), durable=True)
        write_atomically(commands, f"{earlier}{shlex.join(argv)}\n", durable=True)
        write_atomically(folder / "versions.json", strict_json.dumps(_versions(), indent=2) + "\n", durable=True)
        write_atomically(folder / "config.json", strict_json.dumps(content, indent=2) + "\n", durable=True)
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror or error}; choose another with --out") from error


def record_classes(folder: Path, names: Mapping[str, Sequence[str] | None]) -> None:
    """Write classes.json: for each task the names of its classes in the order of their numbers, null where it knows none."""
    try:
        write_atomically(folder / "classes.json", strict_json.dumps(dict(names), indent=1) + "\n", durable=True)
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror or error}; choose another with --out") from error


def load_run(
    folder: Path, found: Checkpoint, load: Callable[[str], Train], own: Train | None = None, *, with_sources: bool = True
) -> RecordedRun:
    """The run of a checkpoint with the configuration that lies next to its weights, and what `describe_run` wrote into its folder.

    `load` gives an experiment's configuration by its name or file. It is called only where the configuration holds a class that is not
    the package's own; without sources, theirs do not count. `own`, if given, stands for the experiment.

    Raises ValueError when the checkpoint's configuration needs an experiment that cannot be loaded, or has changed too much.
    """
    described, fault = _read_description(folder)
    experiment, values = str(described.get("experiment", MADE_IN_PYTHON)), upgrade(found.config)
    reader = _ConfigReader(folder, experiment, found.path / "config.json", load, with_sources)
    config = reader.read(values, _find_own_classes(folder, found.config), own)
    commands = folder / "command.txt"
    return RecordedRun(
        folder=folder,
        experiment=experiment,
        config=config,
        commands=commands.read_text(errors="surrogateescape").splitlines() if commands.is_file() else [],
        versions=_read_json(folder / "versions.json") if (folder / "versions.json").is_file() else {},
        remark=fault or _compare_description(folder, described, found),
    )


def list_tasks(folder: Path) -> list[str]:
    """The names of a run's tasks in the order of its configuration; none where config.json cannot be read."""
    try:
        return list(_read_json(folder / "config.json")["config"]["tasks"])
    except (ValueError, KeyError, TypeError):
        return []


def _read_description(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json of a run folder, or what is wrong with it: the checkpoint has what counts."""
    path = folder / "config.json"
    try:
        return (_read_json(path), "") if path.is_file() else ({}, "")
    except LaterVersionError:
        raise
    except ValueError as error:
        return {}, f"{error}; the checkpoint's own config.json is used"


def _compare_description(folder: Path, described: Mapping[str, Any], found: Checkpoint) -> str:
    """A sentence on the fields in which the folder's config.json is not what the checkpoint was trained with; empty if there are none."""
    values = described.get("config")
    if not isinstance(values, Mapping):
        return ""
    schema = {name: described[name] for name in stamp() if name in described}
    # Files may move, and runs be lengthened.
    free = {f"tasks.{name}.{field}" for name in found.config.get("tasks", {}) for field in ("steps", "train", "val", "test")}
    different = differences(upgrade(found.config), upgrade({**values, **schema}), ignore=MAY_CHANGE | free)
    if not different:
        return ""
    return (
        f"{found.path} was trained with another configuration than {folder / 'config.json'} says, and its own is used "
        f"(its own -> the folder's): {'; '.join(different)}"
    )


def _find_own_classes(folder: Path, stored: Mapping[str, Any]) -> set[str]:
    """Names of the package's classes that in this run are a user's. Since 0.8 the stored configuration says so itself."""
    copy = folder / COPY
    if "schema" in stored or not copy.is_file():
        return set()
    try:
        tree = ast.parse(copy.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("polyvit_fast"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names & RECORDS.keys()


@dataclass(frozen=True)
class _ConfigReader:
    folder: Path
    experiment: str
    path: Path
    """Of the stored configuration, for messages."""
    load: Callable[[str], Train]
    with_sources: bool

    def read(self, values: Mapping[str, Any], own_classes: Collection[str], own: Train | None) -> Train:
        """The configuration of stored values, by `own` or the experiment where the package's classes do not suffice."""
        try:
            return self._put_onto(own, values) if own else rebuild(values, own_classes, with_sources=self.with_sources)
        except OwnClassError as error:
            if self.experiment == MADE_IN_PYTHON:
                raise ValueError(f"{self.path}: {error}; {ADVICE}") from None
            reason = str(error)
        except ValueError as error:
            fault = "does not fit the configuration given" if own else "cannot be read"
            raise ValueError(f"{self.path} {fault}: {error}") from error
        file = self._find_experiment()
        try:
            config = self.load(file)
        except ValueError as error:
            modules = f", and the modules that it imports next to {self.folder / COPY}" if file.endswith(".py") else ""
            raise ValueError(f"{self.path}: {reason}, so its experiment {self.experiment} is needed{modules}: {error}") from error
        try:
            return self._put_onto(config, values)
        except ValueError as error:
            raise ValueError(f"{self.path} does not fit its experiment {self.experiment}: {error}") from error

    @staticmethod
    def _put_onto(config: Train, values: Mapping[str, Any]) -> Train:
        stored = values.get("tasks")
        if isinstance(stored, Mapping) and stored and stored.keys() < config.tasks.keys():
            config = config.only(list(stored))  # a run of --only has some of the experiment's tasks
        return from_json(config, values)

    def _find_experiment(self) -> str:
        """The user's own experiment file while it is unchanged, because it may read files of its folder; otherwise the run's copy."""
        copy = self.folder / COPY
        if not copy.is_file():
            return self.experiment
        original = Path(self.experiment)
        return self.experiment if original.is_file() and original.read_bytes() == copy.read_bytes() else str(copy)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is broken: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: it holds no JSON object")
    check_schema(content, path)
    return content


def _versions() -> dict[str, Any]:
    packages = {"torch": "torch", "dali": "nvidia-dali-cuda130", "numpy": "numpy", "av": "av"}
    return {
        "polyvit_fast": polyvit_fast.__version__,
        "commit": _commit(Path(polyvit_fast.__file__).resolve().parents[1]),
        "python": platform.python_version(),
        **{name: _package_version(package) for name, package in packages.items()},
        "platform": platform.platform(),
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit of a checkout, with "-dirty" when tracked files differ from it; None for installed code or without git."""
    # An installed package may lie inside somebody else's repository, whose commit says nothing about our code.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
