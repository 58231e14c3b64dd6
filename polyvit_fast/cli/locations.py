"""Flags of commands about runs that say where the files of its tasks are now: --tasks.NAME.val.path, and the like."""

from __future__ import annotations

import re
from dataclasses import replace

from polyvit_fast.cli.arguments import parse_flags
from polyvit_fast.cli.flags import list_flags
from polyvit_fast.config import Train

SPLITS = ("train", "val", "test")
PREFIX = "--tasks."


def split_locations(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags that begin with --tasks.NAME, with their values, and the others."""
    locations, others = [], []
    into = others
    for word in flags:
        if word.startswith("-"):
            into = locations if word.startswith(PREFIX) else others
        into.append(word)
    return locations, others


def change_locations(config: Train, flags: list[str], command: str) -> Train:
    """The configuration with its sources as the flags have them.

    Raises ValueError for a flag about anything but a source: what was trained is not what another configuration describes.
    """
    for flag in (word.partition("=")[0] for word in flags if word.startswith("-")):
        name, _, field = flag.removeprefix(PREFIX).partition(".")
        name = next((task for task in config.tasks if task.replace("_", "-") == name.replace("_", "-")), name)
        split = re.split(r"[.:]", field)[0]
        if name not in config.tasks:
            raise ValueError(f"{flag}: there is no task {name}; there are {', '.join(config.tasks)}")
        if split not in SPLITS:
            raise ValueError(
                f"{flag} cannot be changed: the weights belong to the configuration that the run was trained with. Only where files are "
                f"may be said anew, as in --tasks.{name}.val.path"
            )
        if getattr(config.tasks[name], split) is None:
            raise ValueError(f"{flag}: task {name} has no {split} files: its Task in the experiment has no {split}=…, a source")
    if not flags:
        return config
    changed = parse_flags(Train, config, flags, list_flags(config), command)
    sources = {name: {split: getattr(task, split) for split in SPLITS} for name, task in changed.tasks.items()}
    return replace(config, tasks={name: replace(task, **sources[name]) for name, task in config.tasks.items()})
