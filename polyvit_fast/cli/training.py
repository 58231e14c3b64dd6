"""Commands about experiments: train · plot · plan · check · list."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from polyvit_fast import experiments
from polyvit_fast.cli.arguments import load_config, split_run, split_subject
from polyvit_fast.cli.results import draw_curves
from polyvit_fast.files import make_folder
from polyvit_fast.train.signals import exit_code


def run_train(arguments: list[str]) -> int:
    """Train an experiment, or resume its run."""
    name, flags = split_subject(arguments, "train EXPERIMENT")
    config = load_config(name, flags, "train")
    from polyvit_fast.train.loop import train
    from polyvit_fast.train.output.log import print_results

    outcome = train(config, name, ["polyvit-fast", "train", *arguments])
    if outcome.signal:
        return exit_code(outcome.signal)
    if outcome.rank:
        return 0  # the first process prints the results
    print_results(outcome.results)
    draw_curves(config.folder)
    return 0


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw the losses and metrics of a run, of training and of held-out files, as far as it has come.

    $ polyvit-fast plot runs/demo
    $ polyvit-fast plot runs/demo --out demo.pdf
    """

    out: str = ""
    """File for the picture: .png, .pdf, .svg or .jpg. Empty: curves.png in the run folder."""


def run_plot(arguments: list[str]) -> int:
    """Draw the curves of a run, or the schedule of an experiment."""
    if arguments[:1] == ["schedule"]:
        return _plot_schedule(arguments[1:])
    folder, options = split_run(PlotOptions, arguments, "plot")
    from polyvit_fast.train.run_folder.locate import locate_run

    draw_curves(locate_run(folder), options.out)
    return 0


def _plot_schedule(arguments: list[str]) -> int:
    name, flags = split_subject(arguments, "plot schedule EXPERIMENT")
    config = load_config(name, flags, "plot schedule")
    from polyvit_fast.train.output.schedule_plot import plot_schedule, print_schedule
    from polyvit_fast.train.schedule import LearningRates, make_step_plan

    plan = make_step_plan(config)
    path = config.folder / "schedule.png"
    lrs = list(LearningRates(config, plan))
    with make_folder(path.parent):
        plot_schedule(path, plan, config, lrs)
    print_schedule(plan, list(config.tasks), lrs)
    print(f"drawn: {path}")
    return 0


def run_plan(arguments: list[str]) -> int:
    """Print what a run will cost."""
    name, flags = split_subject(arguments, "plan EXPERIMENT")
    config = load_config(name, flags, "plan")
    from polyvit_fast.train.output.cost_report import print_cost

    print_cost(config)
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Decode every file of every task (eight clips of a video) and list the broken ones. All flags of `train` are allowed, --only too."""

    manifests: str = "clean-manifests"
    """Folder to write to: for each task and split a manifest without the broken files, and broken.tsv."""
    num_workers: int = 2
    """Number of processes that decode."""
    deadline_seconds: float = 30.0
    """Seconds to decode one file. A file that takes longer is reported as broken."""

    def __post_init__(self) -> None:
        if self.num_workers <= 0 or self.deadline_seconds <= 0:
            raise ValueError("num_workers and deadline_seconds must be positive")


def run_check(arguments: list[str]) -> int:
    """Decode every file of an experiment, and name the broken ones."""
    name, flags = split_subject(arguments, "check EXPERIMENT")
    options, flags = tyro.cli(CheckOptions, args=flags, prog=f"polyvit-fast check {name}", return_unknown_args=True)
    config = load_config(name, flags, "check")
    from polyvit_fast.data.checking.check import check_files

    num_broken = check_files(config, Path(options.manifests), options.num_workers, options.deadline_seconds)
    return 65 if num_broken else 0


def run_list(arguments: list[str]) -> int:
    """List the experiments that come with the package."""
    from rich.console import Console

    from polyvit_fast.train.output.table import build_table

    table, console = build_table(["experiment", "what it is"], []), Console()
    for name in experiments.names():
        table.add_row(name, experiments.describe(name))
        if not console.is_terminal:  # a line for each
            print(f"{name:24} {experiments.describe(name)}")
    if console.is_terminal:
        console.print(table)
    return 0
