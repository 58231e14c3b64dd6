"""The files of a command line, which may name folders, by the tasks that they are for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from polyvit_fast.config import Train
from polyvit_fast.data.sources.listing import count_names, left_out_as, list_media


@dataclass
class FoundFiles:
    """Which files are for which task."""

    of_task: dict[str, list[str]] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)
    """Files that were named, but by their names are of no modality that is asked for."""


def find_files(paths: Sequence[str], config: Train, tasks: Sequence[str] = ()) -> FoundFiles:
    """The files of each task: those named, and all in folders and below, whose names are those of files of its modality.

    Where `tasks` are given, named files go to all of them, whatever their names. Raises ValueError when there is no file at all.
    """
    found, left_out = FoundFiles(), Counter[str]()
    for task in tasks or config.tasks:
        modality, files = config.tasks[task].modality.name, list[str]()
        for path in paths:
            if os.path.isdir(path):
                listing = list_media(path, modality, {})
                files += listing.files
                left_out += listing.left_out
            elif tasks or not left_out_as(os.path.basename(path), modality):
                files.append(path)
        if files:
            found.of_task[task] = list(dict.fromkeys(files))
    used = {file for files in found.of_task.values() for file in files}
    found.unfit = [path for path in dict.fromkeys(paths) if not os.path.isdir(path) and path not in used]
    if not found.of_task:
        kinds = ", ".join(dict.fromkeys(config.tasks[task].modality.name for task in tasks or config.tasks))
        rest = f"; left out because of their names: {count_names(left_out)}" if left_out else ""
        raise ValueError(f"there is no file of {kinds} in {', '.join(paths)}{rest}")
    return found
