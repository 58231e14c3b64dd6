"""All commands by name, their help, and how one is run: what it prints of an error, and its exit code."""

from __future__ import annotations

import difflib
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from polyvit_fast import __version__
from polyvit_fast.signals import Stopped, end_quietly, exit_code

HELP = f"""polyvit-fast {__version__}: one Vision Transformer for images, videos and audio

  polyvit-fast train EXPERIMENT [--field value ...]   train; the same command again resumes a stopped run
  polyvit-fast eval RUN                               evaluate a checkpoint of a run: the newest, the best or a step
  polyvit-fast predict RUN FILES ...                  predict the classes of files and folders, as a table, CSV or Parquet
  polyvit-fast features RUN FILES ... --out X.npz     write the features of files
  polyvit-fast probe RUN --experiment EXPERIMENT      train heads on the frozen model, on tasks that are new to it
  polyvit-fast export RUN --to timm --out FOLDER      write one task for timm, Hugging Face, PyTorch alone or ONNX
  polyvit-fast plot RUN                               draw its loss and metric curves as PNG
  polyvit-fast plot schedule EXPERIMENT               draw which task each step trains, and the learning rate
  polyvit-fast plan EXPERIMENT                        print what a run will cost: parameters, FLOPs, memory, passes over the data
  polyvit-fast check EXPERIMENT                       decode every file, list the broken ones, write manifests without them
  polyvit-fast list                                   list the experiments that come with the package

EXPERIMENT is a name from `polyvit-fast list` or the path of your own .py file. RUN is a run folder such as runs/demo.

First run:        polyvit-fast train demo     (makes its own files; about 3 minutes on two CPU cores)
Settings:         polyvit-fast train demo --help     (those that people use; --help-all shows all)
Change settings:  polyvit-fast train demo --schedule uniform --tasks.motion.batch 16 --out runs/mine
Some tasks alone: polyvit-fast train demo --only motion
Several GPUs:     torchrun --nproc-per-node 8 -m polyvit_fast train EXPERIMENT
Any command with --help prints its own help; with --traceback it shows the traceback of an error instead of its message alone.

Exit codes:   0  success
              2  wrong input
             65  too many broken files (predict and features: all of them), or a decoder hangs
             69  another process of the run was lost
             70  the loss stayed non-finite
             74  a checkpoint could not be written
             75  stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU; `train` has saved a checkpoint and can resume
            130  stopped by Ctrl-C; `train` has saved a checkpoint as well"""


def main() -> None:
    """Run the command of the process's arguments and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: a terminal without a character must not stop a run
    try:
        code = run(sys.argv[1:])
    except SystemExit as end:  # after --help
        code = end.code if isinstance(end.code, int) else 0
    end_quietly(code)
    _has_lost_its_reader()  # Python would flush again at exit, and then return 120
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Expected errors are printed as one sentence, without a traceback."""
    show_traceback = "--traceback" in argv
    arguments = [argument for argument in argv if argument != "--traceback"]
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(HELP)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            close = difflib.get_close_matches(arguments[0], COMMANDS, 1)
            hint = f"perhaps you meant {close[0]}" if close else f"there are: {', '.join(COMMANDS)}"
            raise ValueError(f"command {arguments[0]!r} is unknown; {hint}")
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
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
            return 0
        code = _exit_code(error)
        if code is None:
            traceback.print_exc()
            return 1
        _print_error(f"polyvit-fast {arguments[0]}: {error}{_suggest_maker(arguments, error)}")
        return code


def _suggest_maker(arguments: list[str], error: Exception) -> str:
    """Which command makes the files of an experiment of ours, where one is missing: the end of a message."""
    if "No such file" not in str(error):
        return ""
    from polyvit_fast import experiments

    makers = {name: experiments.find_maker(name) for name in experiments.names() if name in arguments}
    return "".join(f". The files of {name} are made by: {maker}" for name, maker in makers.items() if maker)


def _has_lost_its_reader() -> bool:
    """Whether nobody reads what this process prints, as after `| head`; then it goes nowhere from now on."""
    lost, poll = False, select.poll()
    try:
        sys.stdout.flush()
        poll.register(sys.stdout.fileno(), 0)
        lost = any(event & select.POLLERR for _, event in poll.poll(0))
    except io.UnsupportedOperation:  # no file, as in a notebook
        return False
    except OSError:
        lost = True
    if lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return lost


def _print_error(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the exit code remains
        print(text, file=sys.stderr)


def _exit_code(error: Exception) -> int | None:
    """The documented exit code of an expected error; None for a bug, which is printed with its traceback."""
    if isinstance(error, ValueError):  # before imports that take seconds
        return 2
    from polyvit_fast.data.stream import DataError
    from polyvit_fast.train.distributed.process_group import PeerLost
    from polyvit_fast.train.run import NonFiniteError
    from polyvit_fast.train.run_folder.checkpoint import CheckpointError

    kinds = ((DataError, 65), (PeerLost, 69), (NonFiniteError, 70), (CheckpointError, 74), (OSError, 2))
    for kind, code in kinds:
        if isinstance(error, kind):
            return code
    return None


def _find(module: str, function: str) -> Callable[[list[str]], int]:
    """The function of a command, whose module is imported when it is run."""
    return lambda arguments: getattr(import_module(f"polyvit_fast.cli.{module}"), function)(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _find("training", "run_train"),
    "eval": _find("evaluation", "run_eval"),
    "predict": _find("prediction", "run_predict"),
    "features": _find("prediction", "run_features"),
    "probe": _find("probing", "run_probe"),
    "export": _find("exporting", "run_export"),
    "plot": _find("training", "run_plot"),
    "plan": _find("training", "run_plan"),
    "check": _find("training", "run_check"),
    "list": _find("training", "run_list"),
}
