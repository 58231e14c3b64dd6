"""What --help prints: of a command its text and its options, of an experiment first the fields that people use, then all."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from polyvit_fast.cli.arguments import HELP_FLAGS, ExperimentOptions, split_only
from polyvit_fast.cli.flags import Flag, list_flags
from polyvit_fast.config import Train

WIDEST = 140
"""Columns of a line, at most: longer ones are hard to read."""
INDENT = 6
USED = {
    "Tasks": ("path", "num_classes", "steps", "batch", "micro_batches", "lr_scale"),
    "Model": ("model.dim", "model.depth", "model.num_heads", "model.num_adaptor_layers", "init"),
    "Optimizer and schedule": ("optim.name", "optim.lr", "optim.warmup_steps", "optim.weight_decay", "schedule"),
    "Hardware": ("device", "precision", "data.num_threads", "compute.recompute"),
    "Run folder and log": ("out", "seed", "log.log_every_steps", "log.eval_every_steps", "log.save_every_steps"),
}
"""The fields that people use, in groups: of `Train`, and first the names of those of tasks and of their sources."""


@dataclass(frozen=True)
class Entry:
    """A flag, or one that several tasks have."""

    name: str
    flags: tuple[Flag, ...]
    tasks: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The flag and what stands after it."""
        flag = self.flags[0]
        return f"{self.name}, {self.name[: -len(last)]}no-{last}" if (last := self._last) else f"{self.name} {flag.values}".rstrip()

    @property
    def _last(self) -> str:
        """The last part of a switch's name."""
        flag = self.flags[0]
        return self.name.removeprefix("--").rpartition(".")[2] if flag.is_switch else ""

    def write_default(self) -> str:
        """The value without the flag; where tasks differ, of each."""
        values = [_write_value(flag.value) for flag in self.flags]
        if len({*values}) == 1 or not self.tasks:
            return f"(default: {values[0]})" if values[0] else "(required)" if self.flags[0].value is MISSING else ""
        return f"(default: {', '.join(f'{task} {value}' for task, value in zip(self.tasks, values, strict=True))})"


def show_options(arguments: Sequence[str], usage: str, text: str, kind: type | None) -> None:
    """The help of a command with options of its own, if the arguments ask for it: then it also ends the command."""
    if {*HELP_FLAGS} & {*arguments}:
        print_options(usage, text, kind)
        raise SystemExit(0)


def show_experiment(arguments: Sequence[str], usage: str, text: str, *own: type) -> None:
    """The help of a command that takes an experiment and has options of its `own`, if the arguments ask for it."""
    if not {*HELP_FLAGS} & {*arguments}:
        return
    words = [word for word in arguments if word not in HELP_FLAGS]
    config = split_only(words[0], words[1:])[0] if words and not words[0].startswith("-") else None
    print_experiment(usage, text, config, (*own, ExperimentOptions), everything="--help-all" in arguments)
    raise SystemExit(0)


def print_options(usage: str, text: str, kind: type | None) -> None:
    """The help of a command with options of its own."""
    print(_wrap(f"usage: polyvit-fast {usage}"), "", _wrap_text(text), sep="\n")
    if kind is not None:
        print("", *_write_group("Options", [Entry(flag.name, (flag,)) for flag in list_flags(kind)], first_sentence=False), sep="\n")


def print_experiment(usage: str, text: str, config: Train | None, own: Sequence[type], *, everything: bool) -> None:
    """The help of a command that takes an experiment: with that, the values that it has; without, what there is to be set."""
    print(_wrap(f"usage: polyvit-fast {usage}"), "", _wrap_text(text), sep="\n")
    options = [Entry(flag.name, (flag,)) for kind in own for flag in list_flags(kind)]
    print("", *_write_group("Options of this command", options, first_sentence=not everything), sep="\n")
    if config is None:
        note = "Every field of an experiment is a flag: `polyvit-fast train demo --help` shows those of demo, with their values."
        print("", _wrap(note), sep="\n")
        return
    groups = _group_all(config) if everything else _group_used(config)
    for title, entries in groups:
        print("", *_write_group(title, entries, first_sentence=not everything), sep="\n")
    names = ", ".join(config.tasks)
    note = f"NAME is a task: {names}." if len(config.tasks) > 1 else f"The task is {names}."
    more = "" if everything else " --help-all shows all fields."
    print("", _wrap(f"{note} Of a flag given twice the last counts.{more}"), sep="\n")


def _group_used(config: Train) -> Iterator[tuple[str, list[Entry]]]:
    entries = merge_tasks(list_flags(config), config)
    for title, names in USED.items():
        if title == "Tasks":
            found = [entry for name in names for entry in entries if entry.tasks and _is_used(entry.flags[0], name)]
        else:
            found = [entry for name in names for entry in entries if ".".join(entry.flags[0].path) == name]
        yield title, found


def _is_used(flag: Flag, name: str) -> bool:
    """Whether a task's flag is that of its own field of this name, or of its training and validation source's path."""
    where = flag.path[2:]
    return where == (name,) or (name == "path" and where in (("train", "path"), ("val", "path")))


def _group_all(config: Train) -> Iterator[tuple[str, list[Entry]]]:
    """All fields by the record that they belong to, those of the run first."""
    groups: dict[tuple[str, type], list[Entry]] = {}
    for entry in merge_tasks(list_flags(config), config):
        flag = entry.flags[0]
        where = flag.path[:-1] if not entry.tasks else ("tasks", "NAME", *flag.path[2:-1])
        groups.setdefault((".".join(where), flag.owner), []).append(entry)
    for (where, owner), entries in groups.items():
        about = (inspect.getdoc(owner) or "").partition("\n")[0]
        about = owner.__name__ if about.startswith(f"{owner.__name__}(") else about  # what a dataclass without a docstring has
        tasks = entries[0].tasks
        some = f" (of {', '.join(tasks)})" if tasks and len(tasks) < len(config.tasks) else ""
        yield f"{where}{some}: {about}" if where else about, entries


def merge_tasks(flags: Sequence[Flag], config: Train) -> list[Entry]:
    """One entry for what several tasks have alike, under --tasks.NAME."""
    found: dict[tuple[object, ...], list[Flag]] = {}
    for flag in flags:
        is_task = len(flag.path) > 2 and flag.path[0] == "tasks"
        key = (flag.path[2:], flag.owner, flag.values) if is_task else flag.path
        found.setdefault(key, []).append(flag)
    entries = []
    for alike in found.values():
        first = alike[0]
        if first.path[0] != "tasks" or len(first.path) <= 2:
            entries.append(Entry(first.name, (first,)))
            continue
        prefix = f"--tasks.{first.path[1]}".replace("_", "-")
        name = f"--tasks.{'NAME' if len(config.tasks) > 1 else first.path[1]}{first.name.removeprefix(prefix)}"
        entries.append(Entry(name, tuple(alike), tuple(flag.path[1] for flag in alike)))
    return entries


def _write_group(title: str, entries: Sequence[Entry], *, first_sentence: bool) -> list[str]:
    lines = [_wrap(title.rstrip(".") if not first_sentence else title)]
    for entry in entries:
        lines.append(_wrap(entry.head, "  ", " " * (INDENT + 4)))
        paragraphs = entry.flags[0].text.splitlines() or [""]
        if first_sentence and not entry.flags[0].values.startswith("{"):
            paragraphs = [re.split(r"(?<=[^.][.]) |(?<=[.])$", " ".join(paragraphs))[0]]
        *before, last = paragraphs
        lines += [_wrap(line, " " * INDENT) for line in [*before, f"{last} {entry.write_default()}".strip()] if line]
    return lines


def _write_value(value: Any) -> str:
    if value is MISSING or value is None or value in ("", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return getattr(value, "__name__", None) or str(value)


def _wrap_text(text: str) -> str:
    """Paragraphs in the terminal's width; lines of examples, which begin with $, stay lines."""
    blocks: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        is_list = any(line.startswith("$ ") for line in lines)
        blocks.append("\n".join(_wrap(line, "", " " * INDENT) for line in lines) if is_list else _wrap(" ".join(lines)))
    return "\n\n".join(blocks)


def _wrap(text: str, first: str = "", rest: str | None = None) -> str:
    width = min(WIDEST, max(40, shutil.get_terminal_size().columns))
    lines = textwrap.TextWrapper(width, first, first if rest is None else rest, break_long_words=False, break_on_hyphens=False)
    return lines.fill(text)
