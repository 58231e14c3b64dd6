"""The command line: train · eval · plot · plan · check · list."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from polyvit_fast import __version__, experiments
from polyvit_fast.config import Train
from polyvit_fast.train.signals import Stopped, exit_code, stop_on_signals

if TYPE_CHECKING:
    from polyvit_fast.train.run_folder.record import RecordedRun

HELP = f"""polyvit-fast {__version__}: one Vision Transformer for images, videos and audio

  polyvit-fast train EXPERIMENT [--field value ...]   train; the same command resumes a stopped run
  polyvit-fast eval RUN                               evaluate a run's newest (or best) checkpoint
  polyvit-fast plot RUN                               draw its loss and metric curves to PNG
  polyvit-fast plot schedule EXPERIMENT               draw which task is trained when, and the learning rate
  polyvit-fast plan EXPERIMENT                        parameters, tokens, FLOPs, memory, passes; trains nothing
  polyvit-fast check EXPERIMENT                       decode every file, name the broken ones, write clean manifests
  polyvit-fast list                                   the experiments that come with the package

EXPERIMENT is a name from `polyvit-fast list` or the path of your own .py file; RUN is a run folder such as runs/demo.
Start here:           polyvit-fast train demo     (makes its own files; about 3 minutes on two CPU cores)
Fields of a run:      polyvit-fast train demo --help
Override any of them: polyvit-fast train demo --schedule uniform --tasks.motion.batch 16 --out runs/mine
Several GPUs:         torchrun --nproc-per-node 8 -m polyvit_fast train EXPERIMENT --device cuda --precision bf16
Add --traceback to any command to see where in the code an error came from.

Exit codes: 0 done · 2 wrong input · 65 too many broken files or a hung decoder · 69 another process of the run was lost ·
            70 loss not finite · 74 checkpoint could not be written · 75 stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU ·
            130 stopped by Ctrl-C (both saved, resumable)"""

Options = TypeVar("Options")


def main() -> None:
    """Run the command of the process's arguments and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a sign is no reason to stop, as on stderr
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more; Python would try again at its end, and give 120 for that
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command and give its exit code; errors of the user's making are told in a sentence, without a traceback."""
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
        _tell(f"polyvit-fast {arguments[0]}: stopped by {stopped}{' before its first step' if arguments[0] == 'train' else ''}")
        return exit_code(stopped.number)
    except KeyboardInterrupt:
        _tell(f"polyvit-fast {arguments[0]}: stopped")
        return 130
    except Exception as error:
        if show_traceback:
            raise
        code = _exit_code(error)
        if code is None:
            traceback.print_exc()
            return 1
        _tell(f"polyvit-fast {arguments[0]}: {error}")
        return code


def _tell(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the exit code says it too
        print(text, file=sys.stderr)


def _exit_code(error: Exception) -> int | None:
    """The documented code of an expected error; None for a defect, which deserves its traceback."""
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
    name, flags = _subject(arguments, "train EXPERIMENT")
    config = _configured(name, flags, "train")
    from polyvit_fast.train.loop import train
    from polyvit_fast.train.output.log import print_results

    outcome = train(config, name, ["polyvit-fast", "train", *arguments])
    if outcome.signal:
        return exit_code(outcome.signal)
    if outcome.rank:
        return 0  # the first process tells
    print_results(outcome.results)
    _plot_curves(config.folder)
    return 0


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a run's checkpoint on the validation files of its tasks."""

    checkpoint: str = "newest"
    """newest, best, or a step."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; none: all."""
    device: Literal["as trained", "cpu", "cuda"] = "as trained"
    """Where the model computes."""


def _eval(arguments: list[str]) -> int:
    folder, flags = _subject(arguments, "eval RUN")
    options = _parse(EvalOptions, flags, "eval RUN")
    config = _recorded(folder).config
    config = config if options.device == "as trained" else replace(config, device=options.device)
    from polyvit_fast.train.evaluate import evaluate_run
    from polyvit_fast.train.output.log import evaluation_progress, print_evaluation

    with evaluation_progress() as progress:
        rows = evaluate_run(Path(folder), config, options.checkpoint, options.tasks, progress)
    if rows:  # under torchrun the first process has them
        print_evaluation(config, rows)
    return 0


def _plot(arguments: list[str]) -> int:
    if arguments[:1] == ["schedule"]:
        return _plot_schedule(arguments[1:])
    folder, flags = _subject(arguments, "plot RUN")
    if flags:
        raise ValueError(f"plot RUN takes no flags, but got {' '.join(flags)}")
    _recorded(folder)
    _plot_curves(Path(folder))
    return 0


def _plot_schedule(arguments: list[str]) -> int:
    name, flags = _subject(arguments, "plot schedule EXPERIMENT")
    config = _configured(name, flags, "plot schedule")
    from polyvit_fast.train.output.plot import plot_schedule, print_schedule
    from polyvit_fast.train.schedule import learning_rate, make_step_plan

    plan = make_step_plan(config)
    path = config.folder / "schedule.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    lrs = [learning_rate(config, plan, step) for step in range(len(plan))]
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
    name, flags = _subject(arguments, "plan EXPERIMENT")
    config = _configured(name, flags, "plan")
    from polyvit_fast.train.output.report import print_plan

    print_plan(config)
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Decode every file of every task (of a video eight clips), in parallel, and name the broken ones. Other flags are those of train."""

    manifests: str = "clean-manifests"
    """Folder for one clean manifest per task and split, and for broken.tsv."""
    num_workers: int = 2
    """Processes that decode."""
    deadline_seconds: float = 30.0
    """A file that takes longer counts as broken."""

    def __post_init__(self) -> None:
        if self.num_workers <= 0 or self.deadline_seconds <= 0:
            raise ValueError("num_workers and deadline_seconds must be positive")


def _check(arguments: list[str]) -> int:
    name, flags = _subject(arguments, "check EXPERIMENT")
    options, flags = tyro.cli(CheckOptions, args=flags, prog=f"polyvit-fast check {name}", return_unknown_args=True)
    config = _configured(name, flags, "check")
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


def _subject(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The experiment or run folder, which comes first, and the flags behind it."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"usage: polyvit-fast {usage} [--field value ...]; `polyvit-fast --help` tells more")
    return arguments[0], arguments[1:]


def _configured(name: str, flags: list[str], command: str) -> Train:
    config = experiments.load(name)
    return tyro.cli(Train, default=config, args=flags, prog=f"polyvit-fast {command} {name}")


def _parse(kind: type[Options], flags: list[str], command: str) -> Options:
    return tyro.cli(kind, args=flags, prog=f"polyvit-fast {command}")


def _recorded(folder: str) -> RecordedRun:
    from polyvit_fast.train.run_folder.record import load_run

    return load_run(Path(folder), experiments.load)
