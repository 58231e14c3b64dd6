"""What `fuse` reports: which modules it replaced, which it left, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyvit_fast.drop_in.verify import Comparison

UNKNOWN = "fuse does not know"
"""How the reason begins for a class without an adapter."""

_NOTHING_KNOWN = "nothing here that fuse knows: it replaces layer norms, attention, MLPs and blocks of Vision Transformers"


@dataclass(frozen=True)
class ModuleEntry:
    """A module of the model: where it is and its class; why it was left, or when its own `forward` still runs."""

    path: str
    what: str
    why: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        """What the modules on one line of the report have in common: the path but for numbers, and the class."""
        return re.sub(r"\d+", "*", self.path) or "(the model)", self.what


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did to a model. As text it is a table, with one line for modules whose paths differ in numbers alone."""

    replaced: tuple[ModuleEntry, ...]
    left: tuple[ModuleEntry, ...]
    comparisons: tuple[Comparison, ...] = ()
    """How far the fused and the original model are from the truth; empty without `verify`."""

    def __str__(self) -> str:
        if not self.replaced and all(entry.why.startswith(UNKNOWN) for entry in self.left):
            return "\n".join([_NOTHING_KNOWN, *(lines("left", self.left) if self.left else [])])
        return "\n".join([*lines("replaced", self.replaced), *lines("left", self.left)])


def lines(title: str, entries: tuple[ModuleEntry, ...]) -> list[str]:
    """The title with the number of entries, and below it a line per kind and reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        line = (*entry.kind, entry.why)
        counts[line] = counts.get(line, 0) + 1
    paths, classes = (max((len(line[column]) for line in counts), default=0) for column in (0, 1))
    rows = [f"  {path:{paths}}  {count:3} × {what:{classes}}  {why}".rstrip() for (path, what, why), count in counts.items()]
    return [f"{title}: {len(entries)} modules", *rows]
