"""The files of a run folder that describe its run: the experiment, its configuration, the command lines, versions, names of classes."""

from __future__ import annotations

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
from polyvit_fast.train.run_folder.config_json import differences, from_json, to_json
from polyvit_fast.train.run_folder.earlier_versions import upgrade
from polyvit_fast.train.run_folder.rebuild import rebuild

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


@dataclass(frozen=True)
class RecordedRun:
    """A run folder, read back."""

    folder: Path
    experiment: str
    """As the command line named it: a name or the path of a file; else `MADE_IN_PYTHON`."""
    config: Train
    commands: list[str]
    """The command lines that worked on this folder, oldest first."""
    versions: dict[str, Any]
    """Of Python, the libraries and this package, at the last start."""


def resume_differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """The differences between two stored configurations that forbid resuming: all outside `MAY_CHANGE` and `may_change`."""
    return differences(upgrade(old), new, ignore=MAY_CHANGE.union(may_change))


def describe_run(folder: Path, experiment: str, argv: Sequence[str], config: Train) -> None:
    """Write config.json, command.txt, versions.json and, when the experiment is a user's file, a copy of it: experiment.py.

    A resumed run adds its command line to the earlier ones. Raises ValueError when the folder cannot be written.
    """
    content = {"experiment": experiment, "config": to_json(config)}
    commands = folder / "command.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = commands.read_text() if commands.is_file() else ""
        if experiment.endswith(".py"):
            write_atomically(folder / "experiment.py", Path(experiment).read_text(), durable=True)
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


def load_run(folder: Path, load: Callable[[str], Train], own: Train | None = None) -> RecordedRun:
    """What `describe_run` wrote; `load` gives an experiment's configuration by its name or file, the run's own copy of it if need be.

    `own`, if given, stands for the experiment: classes and functions are its, numbers and strings the run's.

    Raises ValueError when `folder` is not a run folder, a file of it is broken, or the experiment has changed too much.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder.absolute()} is not a run folder: it has no config.json (polyvit-fast train makes one, under runs/ unless --out)"
        )
    content = _read_json(folder / "config.json")
    experiment, values = content.get("experiment"), content.get("config")
    if not isinstance(experiment, str) or not isinstance(values, dict):
        raise ValueError(
            f"{folder / 'config.json'} does not describe a run: it needs the fields experiment and config "
            "(another library's model is opened by pretrained.load, and starts a run with --init)"
        )
    versions = _read_json(folder / "versions.json")
    try:
        config = _read_config(folder, experiment, upgrade(values), load, own)
    except ValueError as error:
        fault = "does not fit the configuration given" if own else f"does not fit its experiment {experiment}"
        raise ValueError(f"{folder / 'config.json'} {fault}: {error}") from error
    commands = folder / "command.txt"
    return RecordedRun(folder, experiment, config, commands.read_text().splitlines() if commands.is_file() else [], versions)


def _read_config(folder: Path, experiment: str, values: Mapping[str, Any], load: Callable[[str], Train], own: Train | None) -> Train:
    if own is None and experiment == MADE_IN_PYTHON:
        return rebuild(values)
    config, stored = own or load(_experiment_file(folder, experiment)), values.get("tasks")
    if isinstance(stored, Mapping) and stored and stored.keys() < config.tasks.keys():
        config = config.only(list(stored))  # a run of --only has some of the experiment's tasks
    return from_json(config, values)


def _experiment_file(folder: Path, experiment: str) -> str:
    """The user's own experiment file while it is unchanged, because it may read files of its folder; otherwise the run's copy."""
    copy = folder / "experiment.py"
    if not copy.is_file():
        return experiment
    original = Path(experiment)
    return experiment if original.is_file() and original.read_bytes() == copy.read_bytes() else str(copy)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a whole run folder: {path.name} is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is broken: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: it holds no JSON object")
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
