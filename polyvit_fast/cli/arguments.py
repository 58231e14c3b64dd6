"""What the commands' arguments name: an experiment with its flags, a run folder, options."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from polyvit_fast import experiments
from polyvit_fast.config import Train

if TYPE_CHECKING:
    from polyvit_fast.train.run_folder.record import RecordedRun

Options = TypeVar("Options")
HELP_FLAGS = ("-h", "--help")


def split_subject(arguments: list[str], usage: str) -> tuple[str, list[str]]:
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


def load_config(name: str, flags: list[str], command: str) -> Train:
    """The configuration of an experiment with the flags in it, of which --only leaves out tasks."""
    config, prog = experiments.load(name), f"polyvit-fast {command} {name}"
    if "--only" in flags:  # it decides what other flags there are
        begin = flags.index("--only")
        names = list(takewhile(lambda word: not word.startswith("-"), flags[begin + 1 :]))
        config, flags = config.only(names), flags[:begin] + flags[begin + 1 + len(names) :]
    if {*HELP_FLAGS} & {*flags}:
        return tyro.cli(ExperimentHelp, default=ExperimentHelp(train=config), args=flags, prog=prog).train
    return tyro.cli(Train, default=config, args=flags, prog=prog)


def parse_options(kind: type[Options], flags: list[str], command: str) -> Options:
    """The options of a command, whose docstring is the text of its --help."""
    return tyro.cli(kind, args=flags, prog=f"polyvit-fast {command}")


def split_run(kind: type[Options], arguments: list[str], command: str) -> tuple[Path, Options]:
    """The run folder that a command is about, and the options after it. With --help in its stead, it prints that."""
    if arguments and arguments[0] in HELP_FLAGS:
        parse_options(kind, ["--help"], f"{command} RUN")
    folder, flags = split_subject(arguments, f"{command} RUN")
    return Path(folder), parse_options(kind, flags, f"{command} RUN")


def load_run(folder: Path, which: str) -> RecordedRun:
    """The run of a run folder, as its newest or best checkpoint or that of a step has it. Experiments are loaded only if need be."""
    from polyvit_fast.train.run_folder import checkpoint, locate, record

    return record.load_run(locate.locate_run(folder), checkpoint.find_checkpoint(folder, which), experiments.load)
