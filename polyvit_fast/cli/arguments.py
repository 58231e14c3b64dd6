"""What the commands' arguments name: an experiment with its flags, a run folder, options. What is wrong with them is one sentence."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from polyvit_fast import experiments
from polyvit_fast.cli.flags import Flag, list_flags
from polyvit_fast.config import Train
from polyvit_fast.config.words import find_word

if TYPE_CHECKING:
    from polyvit_fast.train.run_folder.record import RecordedRun

Options = TypeVar("Options")
NUMBERS = {
    r"could not convert string to float: (.*)": r"\1 is no number",
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no whole number",
}
"""Python's words for what is no number, and ours."""
HELP_FLAGS = ("-h", "--help", "--help-all")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What every command that takes an experiment takes besides the fields of its configuration."""

    only: tuple[str, ...] = ()
    """Train these tasks alone, such as one as the baseline of all: the others are left out.
    The run folder is then runs/NAME-only-TASK, and optim.warmup_steps is lowered to the same fraction of the steps that are left."""


def split_subject(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    """The first argument, an experiment or a run folder, and the flags after it. Raises ValueError when flags stand before it."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    command, kind = " ".join(takewhile(str.islower, usage.split())), "field" if usage.endswith("EXPERIMENT") else "option"
    subject = next((word for word in arguments if word.endswith(".py") or word in experiments.names() or Path(word).is_dir()), "")
    if subject:
        index = list(arguments).index(subject)
        moved = " ".join([subject, *arguments[:index], *arguments[index + 1 :]])
        raise ValueError(f"flags stand after {subject}: polyvit-fast {command} {moved}")
    raise ValueError(f"usage: polyvit-fast {usage} [--{kind} value ...]; see `polyvit-fast {command} --help`")


def split_only(name: str, flags: Sequence[str]) -> tuple[Train, list[str]]:
    """The configuration of an experiment, of which --only leaves out tasks, and the other flags."""
    config, flags = experiments.load(name), list(flags)
    chosen = config
    while begin := next((index for index, word in enumerate(flags, 1) if word.partition("=")[0] == "--only"), 0):
        # It decides what other flags there are. The last of several counts, as of every flag.
        first = [value] if (value := flags[begin - 1].partition("=")[2]) else []
        names = list(takewhile(lambda word: not word.startswith("-"), flags[begin:]))
        chosen, flags = config.only([*first, *names]), flags[: begin - 1] + flags[begin + len(names) :]
    return chosen, flags


def load_config(name: str, flags: Sequence[str], command: str, *own: type) -> Train:
    """The configuration of an experiment with the flags in it, of a command that has options of its `own`."""
    config, flags = split_only(name, flags)
    known = [flag for kind in (*own, ExperimentOptions) for flag in list_flags(kind)] + list_flags(config)
    changed = parse_flags(Train, config, flags, known, f"{command} {name}")
    return changed if changed.out else replace(changed, out=config.out)  # --out "" is the default as well


def parse_options(kind: type[Options], flags: Sequence[str], command: str) -> Options:
    """The options of a command."""
    return parse_flags(kind, None, flags, list_flags(kind), command)


def split_options(kind: type[Options], flags: Sequence[str], command: str) -> tuple[Options, list[str]]:
    """The options of a command that takes an experiment, and what is left for its configuration."""
    return _parse_known(kind, None, flags, list_flags(kind), command)


def split_run(kind: type[Options], arguments: Sequence[str], command: str) -> tuple[Path, Options]:
    """The run folder that a command is about, and the options after it. With --help it prints that, and ends the command."""
    folder, flags = split_subject(arguments, f"{command} RUN")
    return Path(folder), parse_options(kind, flags, f"{command} RUN")


def load_run(folder: Path, which: str) -> RecordedRun:
    """The run of a run folder, as its newest or best checkpoint or that of a step has it. Experiments are loaded only if need be."""
    from polyvit_fast.train.run_folder import checkpoint, locate, record

    return record.load_run(locate.locate_run(folder), checkpoint.find_checkpoint(folder, which), experiments.load)


def refuse_arguments(arguments: Sequence[str], command: str) -> None:
    """Raise ValueError when there are arguments: the command takes none."""
    if arguments:
        raise ValueError(f"{command} takes no further arguments, but got {' '.join(arguments)}; see `polyvit-fast {command} --help`")


def parse_flags(kind: type[Options], default: Any, words: Sequence[str], flags: list[Flag], command: str) -> Options:
    """What the words make of the default. Raises ValueError for what is none of the flags."""
    parsed, unknown = _parse_known(kind, default, words, flags, command)
    if unknown:
        raise ValueError(f"{_refuse_word(unknown[0], words, flags)}; see `polyvit-fast {command} --help`")
    return parsed


def _parse_known(kind: type[Options], default: Any, words: Sequence[str], flags: list[Flag], command: str) -> tuple[Options, list[str]]:
    """What tyro makes of the words, and those that it does not know. Raises ValueError in the stead of its boxes."""
    options = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=f"polyvit-fast {command}", return_unknown_args=True, add_help=False, **options)
    except NameError as error:
        raise ValueError(f"a field's type cannot be read: {error}; import what its annotation names where it is defined") from error
    except SystemExit as end:
        raise ValueError(_translate(said.getvalue(), end.__context__, flags)) from None


def _translate(said: str, cause: BaseException | None, flags: list[Flag]) -> str:
    """A sentence for what tyro puts into a box: a title, what is wrong, and below a line the text of --help."""
    rows = [row.strip("│| ") for row in said.splitlines()]
    text = " ".join(takewhile(_holds_words, dropwhile(lambda row: not _holds_words(row), rows[1:])))
    message, where = str(getattr(cause, "message", cause or "")), re.match(r"Error parsing ([^:]+): ", text)
    if where and message:  # not from the box, which may have broken words
        name = "" if where[1] == "Train" else _name_values(where[1], flags)
        for pattern, words in NUMBERS.items():
            message = re.sub(pattern, words, message)
        return f"{name}: {message}" if name else message
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text):
        words = [word.strip(" '") for word in choice[3].split(",") if word.strip()]
        close = find_word(choice[1], words)
        return f"{choice[2]} {choice[1]}: it is one of {', '.join(words)}" + (f"; perhaps you meant {close}" if close else "")
    if lacking := re.match(r"Missing value for argument '(.*)'", text):
        return f"{_name_values(lacking[1], flags)}: its value is missing"
    return re.sub(r"^Missing from [^:]*: ", "missing: ", text).replace(" (required)", "") or message


def _holds_words(row: str) -> bool:
    return bool(row.strip("─-╰╯"))


def _name_values(name: str, flags: list[Flag]) -> str:
    """A flag with what stands after it."""
    return next((f"{flag.name} {flag.values}" for flag in flags if flag.name == name), name)


def _refuse_word(word: str, words: Sequence[str], flags: list[Flag]) -> str:
    """Why a word is none that can stand there, and what may have been meant."""
    if not word.startswith("-"):
        index = next((index for index, one in enumerate(words) if one == word or one.endswith(f"={word}")), 0)
        before = words[index].partition("=")[0] if words[index] != word else words[index - 1] if index else ""
        switch = next((flag for flag in flags if flag.is_switch and before in (flag.name, flag.opposite)), None)
        if switch:
            return f"Unrecognized argument {word}: {switch.name} switches on and {switch.opposite} off, and nothing stands after them"
        return f"Unrecognized argument {word}"
    name = word.partition("=")[0].replace("_", "-")
    tasks = list(dict.fromkeys(flag.path[1] for flag in flags if flag.path[0] == "tasks"))
    if (asked := re.match(r"--tasks\.([^.]+)\.", name)) and asked[1] not in [task.replace("_", "-") for task in tasks]:
        return f"Unrecognized flag {name}: there is no task {asked[1]}; there are {', '.join(tasks)}"
    close = suggest_flags(name, flags)
    return f"Unrecognized flag {name}" + (f": perhaps you meant {' or '.join(close)}" if close else "")


def suggest_flags(name: str, flags: Sequence[Flag]) -> list[str]:
    """The flags that are closest to a name that none has, the closest first: at most three."""
    names = [flag.name for flag in flags if flag.name.startswith("--")] + [flag.opposite for flag in flags if flag.is_switch]
    last = name.lstrip("-").rpartition(".")[2]
    same = [one for one in names if one.lstrip("-").rpartition(".")[2] == last]
    return same[:3] or difflib.get_close_matches(name, names, 2, 0.7)
