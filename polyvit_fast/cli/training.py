"""Commands about experiments: train · plot · plan · check · list."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from polyvit_fast import experiments
from polyvit_fast.cli.arguments import load_config, refuse_arguments, split_options, split_run, split_subject
from polyvit_fast.cli.help import show_experiment, show_options
from polyvit_fast.cli.results import draw_curves
from polyvit_fast.files import make_folder
from polyvit_fast.signals import exit_code, stop_on_signals

TRAIN = """Train an experiment. The same command again goes on with a run that was stopped, bit for bit.

$ polyvit-fast train demo
$ polyvit-fast train demo --optim.lr 3e-4 --tasks.motion.batch 32 --out runs/b
$ polyvit-fast train photos.py --only species
$ torchrun --nproc-per-node 8 -m polyvit_fast train photos.py

EXPERIMENT is a name from `polyvit-fast list` or the path of your own .py file. Ctrl-C saves a checkpoint."""
SCHEDULE = """Draw which task each step of an experiment trains, and the learning rate, as schedule.png in its run folder.

$ polyvit-fast plot schedule demo
$ polyvit-fast plot schedule demo --schedule task-by-task --out runs/by-task"""
PLAN = """Print what a run will cost, without training: parameters, FLOPs, memory on GPUs of several sizes, passes over the data.

$ polyvit-fast plan demo
$ polyvit-fast plan polyvit_b16 --device cuda --recompute"""
LIST = """List the experiments that come with the package.

$ polyvit-fast list"""


def run_train(arguments: list[str]) -> int:
    """Train an experiment, or resume its run."""
    show_experiment(arguments, "train EXPERIMENT [--field value ...]", TRAIN)
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

    `polyvit-fast plot schedule EXPERIMENT` draws which task each step trains.

    $ polyvit-fast plot runs/demo
    $ polyvit-fast plot runs/demo --out demo.pdf
    """

    out: str = ""
    """File for the picture: .png, .pdf, .svg or .jpg. Empty: curves.png in the run folder."""


def run_plot(arguments: list[str]) -> int:
    """Draw the curves of a run, or the schedule of an experiment."""
    if arguments[:1] == ["schedule"]:
        return _plot_schedule(arguments[1:])
    show_options(arguments, "plot RUN [--out FILE]", PlotOptions.__doc__ or "", PlotOptions)
    folder, options = split_run(PlotOptions, arguments, "plot")
    from polyvit_fast.train.run_folder.locate import locate_run

    draw_curves(locate_run(folder), options.out)
    return 0


def _plot_schedule(arguments: list[str]) -> int:
    show_experiment(arguments, "plot schedule EXPERIMENT [--field value ...]", SCHEDULE)
    name, flags = split_subject(arguments, "plot schedule EXPERIMENT")
    config = load_config(name, flags, "plot schedule")
    from polyvit_fast.train.output.schedule_plot import plot_schedule, print_schedule
    from polyvit_fast.train.run_folder.resume import list_earlier_lengths
    from polyvit_fast.train.schedule import LearningRates, make_step_plan

    plan = make_step_plan(config, list_earlier_lengths(config))
    path = config.folder / "schedule.png"
    lrs = list(LearningRates(config, plan))
    with make_folder(path.parent):
        plot_schedule(path, plan, config, lrs)
    print_schedule(plan, list(config.tasks), lrs)
    print(f"drawn: {path}")
    return 0


def run_plan(arguments: list[str]) -> int:
    """Print what a run will cost."""
    show_experiment(arguments, "plan EXPERIMENT [--field value ...]", PLAN)
    name, flags = split_subject(arguments, "plan EXPERIMENT")
    config = load_config(name, flags, "plan")
    from polyvit_fast.train.output.cost_report import print_cost

    print_cost(config)
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Decode every file of every task (eight clips of a video) and list the broken ones. All flags of `train` are allowed, --only too.

    $ polyvit-fast check photos.py
    $ polyvit-fast check photos.py --num-workers 8 --only species
    """

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
    show_experiment(arguments, "check EXPERIMENT [--option value ...] [--field value ...]", CheckOptions.__doc__ or "", CheckOptions)
    name, flags = split_subject(arguments, "check EXPERIMENT")
    options, flags = split_options(CheckOptions, flags, f"check {name}")
    config = load_config(name, flags, "check", CheckOptions)
    from polyvit_fast.data.checking.check import check_files

    prepare = partial(experiments.load, str(Path(name).absolute())) if name.endswith(".py") else None
    with stop_on_signals():
        num_broken = check_files(config, Path(options.manifests), options.num_workers, options.deadline_seconds, prepare)
    return 65 if num_broken else 0


def run_list(arguments: list[str]) -> int:
    """List the experiments that come with the package."""
    show_options(arguments, "list", LIST, None)
    refuse_arguments(arguments, "list")
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
