"""The command line: train · eval · plot · plan · check · list."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from polyvit_fast import __version__, experiments
from polyvit_fast.config import Train
from polyvit_fast.train.signals import Stopped, exit_code, stop_on_signals

if TYPE_CHECKING:
    from polyvit_fast.train.run_folder.record import RecordedRun

HELP = f"""polyvit-fast {__version__}: one Vision Transformer for images, videos and audio

  polyvit-fast train EXPERIMENT [--field value ...]   train; the same command again resumes a stopped run
  polyvit-fast eval RUN                               evaluate a checkpoint of a run: the newest, the best or a step
  polyvit-fast plot RUN                               draw its loss and metric curves as PNG
  polyvit-fast plot schedule EXPERIMENT               draw which task each step trains, and the learning rate
  polyvit-fast plan EXPERIMENT                        print what a run will cost: parameters, FLOPs, memory, passes over the data
  polyvit-fast check EXPERIMENT                       decode every file, list the broken ones, write manifests without them
  polyvit-fast list                                   list the experiments that come with the package

EXPERIMENT is a name from `polyvit-fast list` or the path of your own .py file. RUN is a run folder such as runs/demo.

First run:        polyvit-fast train demo     (makes its own files; about 3 minutes on two CPU cores)
All settings:     polyvit-fast train demo --help
Change settings:  polyvit-fast train demo --schedule uniform --tasks.motion.batch 16 --out runs/mine
Some tasks alone: polyvit-fast train demo --only motion
Several GPUs:     torchrun --nproc-per-node 8 -m polyvit_fast train EXPERIMENT --device cuda --precision bf16
Any command with --traceback shows the traceback of an error instead of its message alone.

Exit codes:   0  success
              2  wrong input
             65  too many broken files, or a decoder hangs
             69  another process of the run was lost
             70  the loss stayed non-finite
             74  a checkpoint could not be written
             75  stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU; `train` has saved a checkpoint and can resume
            130  stopped by Ctrl-C; `train` has saved a checkpoint as well"""

Options = TypeVar("Options")


def main() -> None:
    """Run the command of the process's arguments and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: a terminal without a character must not stop a run
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader is gone; Python would flush again at exit and then return 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Expected errors are printed as one sentence, without a traceback."""
    show_traceback = "--traceback" in argv
    arguments = [argument for argument in argv if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ValueError(f"command {arguments[0]!r} is unknown; there are: {', '.join(COMMANDS)}")
        with stop_on_signals():
            return COMMANDS[arguments[0]](arguments[1:])
    except Stopped as stopped:
        _print_error(f"polyvit-fast {arguments[0]}: stopped by {stopped}{' before its first step' if arguments[0] == 'train' else ''}")
        return exit_code(stopped.number)
    except KeyboardInterrupt:
        _print_error(f"polyvit-fast {arguments[0]}: stopped")
        return 130
    except Exception as error:
        if show_traceback:
            raise
        code = _exit_code(error)
        if code is None:
            traceback.print_exc()
            return 1
        _print_error(f"polyvit-fast {arguments[0]}: {error}")
        return code


def _print_error(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the exit code remains
        print(text, file=sys.stderr)


def _exit_code(error: Exception) -> int | None:
    """The documented exit code of an expected error; None for a bug, which is printed with its traceback."""
    from polyvit_fast.data.stream import DataError
    from polyvit_fast.train.distributed.process_group import PeerLost
    from polyvit_fast.train.run import NonFiniteError
    from polyvit_fast.train.run_folder.checkpoint import CheckpointError

    kinds = ((DataError, 65), (PeerLost, 69), (NonFiniteError, 70), (CheckpointError, 74), (ValueError, 2), (OSError, 2))
    for kind, code in kinds:
        if isinstance(error, kind):
            return code
    return None


def _train(arguments: list[str]) -> int:
    name, flags = _split_subject(arguments, "train EXPERIMENT")
    config = _load_config(name, flags, "train")
    from polyvit_fast.train.loop import train
    from polyvit_fast.train.output.log import print_results

    outcome = train(config, name, ["polyvit-fast", "train", *arguments])
    if outcome.signal:
        return exit_code(outcome.signal)
    if outcome.rank:
        return 0  # the first process prints the results
    print_results(outcome.results)
    _plot_curves(config.folder)
    return 0


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a checkpoint of a run on the validation files of its tasks."""

    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks to evaluate. None: all."""
    device: Literal["as trained", "cpu", "cuda"] = "as trained"
    """Where the model computes."""


def _eval(arguments: list[str]) -> int:
    folder, flags = _split_subject(arguments, "eval RUN")
    options = _parse(EvalOptions, flags, "eval RUN")
    config = _load_run(folder).config
    config = config if options.device == "as trained" else replace(config, device=options.device)
    from polyvit_fast.train.evaluate import evaluate_run
    from polyvit_fast.train.output.log import print_evaluation, show_evaluation_progress

    with show_evaluation_progress() as progress:
        rows = evaluate_run(Path(folder), config, options.checkpoint, options.tasks, progress)
    if rows:  # under torchrun the first process has them
        print_evaluation(config, rows)
    return 0


def _plot(arguments: list[str]) -> int:
    if arguments[:1] == ["schedule"]:
        return _plot_schedule(arguments[1:])
    folder, flags = _split_subject(arguments, "plot RUN")
    if flags:
        raise ValueError(f"plot RUN takes no flags, but got {' '.join(flags)}")
    _load_run(folder)
    _plot_curves(Path(folder))
    return 0


def _plot_schedule(arguments: list[str]) -> int:
    name, flags = _split_subject(arguments, "plot schedule EXPERIMENT")
    config = _load_config(name, flags, "plot schedule")
    from polyvit_fast.train.output.plot import plot_schedule, print_schedule
    from polyvit_fast.train.schedule import LearningRates, make_step_plan

    plan = make_step_plan(config)
    path = config.folder / "schedule.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    lrs = list(LearningRates(config, plan))
    plot_schedule(path, plan, config, lrs)
    print_schedule(plan, lrs)
    print(f"drawn: {path}")
    return 0


def _plot_curves(folder: Path) -> None:
    from polyvit_fast.train.output.plot import plot_run

    path = folder / "curves.png"
    plot_run(folder, path)
    print(f"drawn: {path}")


def _plan(arguments: list[str]) -> int:
    name, flags = _split_subject(arguments, "plan EXPERIMENT")
    config = _load_config(name, flags, "plan")
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


def _check(arguments: list[str]) -> int:
    name, flags = _split_subject(arguments, "check EXPERIMENT")
    options, flags = tyro.cli(CheckOptions, args=flags, prog=f"polyvit-fast check {name}", return_unknown_args=True)
    config = _load_config(name, flags, "check")
    from polyvit_fast.data.checking.check import check_files

    num_broken = check_files(config, Path(options.manifests), options.num_workers, options.deadline_seconds)
    return 65 if num_broken else 0


def _list(arguments: list[str]) -> int:
    for name in experiments.names():
        print(f"{name:24} {experiments.describe(name)}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "plot": _plot,
    "plan": _plan,
    "check": _check,
    "list": _list,
}


def _split_subject(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The first argument, an experiment or a run folder, and the flags after it."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"usage: polyvit-fast {usage} [--field value ...]; see `polyvit-fast --help`")
    return arguments[0], arguments[1:]


@dataclass(frozen=True, kw_only=True)
class ExperimentHelp:
    """A training run."""

    only: tuple[str, ...] = ()
    """Train these tasks alone, such as one as the baseline of all: the others are left out.
    The run folder is then runs/NAME-only-TASK, and optim.warmup_steps is lowered to the same fraction of the steps that are left."""
    train: Annotated[Train, tyro.conf.arg(name="")]


def _load_config(name: str, flags: list[str], command: str) -> Train:
    config, prog = experiments.load(name), f"polyvit-fast {command} {name}"
    if "--only" in flags:  # it decides what other flags there are
        begin = flags.index("--only")
        names = list(takewhile(lambda word: not word.startswith("-"), flags[begin + 1 :]))
        config, flags = config.only(names), flags[:begin] + flags[begin + 1 + len(names) :]
    if {"-h", "--help"} & {*flags}:
        return tyro.cli(ExperimentHelp, default=ExperimentHelp(train=config), args=flags, prog=prog).train
    return tyro.cli(Train, default=config, args=flags, prog=prog)


def _parse(kind: type[Options], flags: list[str], command: str) -> Options:
    return tyro.cli(kind, args=flags, prog=f"polyvit-fast {command}")


def _load_run(folder: str) -> RecordedRun:
    from polyvit_fast.train.run_folder.record import load_run

    return load_run(Path(folder), experiments.load)
