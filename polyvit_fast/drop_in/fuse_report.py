"""What `fuse` reports: which modules it replaced, what that saves, which it left, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyvit_fast.drop_in.gains import Gain
from polyvit_fast.drop_in.verify import Comparison

UNKNOWN = "fuse does not know"
"""How the reason begins for a class without an adapter."""

_NOTHING_KNOWN = "nothing here that fuse knows: it replaces layer norms, attention, MLPs and blocks of Vision Transformers"


@dataclass(frozen=True)
class ModuleEntry:
    """A module of the model: where it is and its class; why it was left, or when its own `forward` still runs.

    `gains` and `measured` are those of `gains.py`, for a module that was replaced.
    """

    path: str
    what: str
    why: str = ""
    gains: tuple[Gain, ...] = ()
    measured: tuple[str, ...] = ()

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
        return "\n".join([*lines("replaced", self.replaced), *lines("left", self.left), *_gain_lines(self.replaced)])


def _gain_lines(entries: tuple[ModuleEntry, ...]) -> list[str]:
    """What a module of each class gains, and all together; then what was measured of the kernels that they run.

    Of those that lie in no other: a block's gains are its parts' too.
    """
    outermost: list[ModuleEntry] = []
    for entry in entries:  # a block before its parts
        if not any(entry.path.startswith(f"{other.path}.") or not other.path for other in outermost):
            outermost.append(entry)
    classes = list(dict.fromkeys((entry.what, entry.gains) for entry in outermost if entry.gains))
    if not classes:
        return []
    forward, backward = (sum(getattr(gain, way) for entry in outermost for gain in entry.gains) for way in ("forward", "backward"))
    widest = max(len(what) for what, _ in classes)
    rows = [f"  {what if not index else '':{widest}}  {_format(gain)}" for what, found in classes for index, gain in enumerate(found)]
    measured = [f"  {text}" for text in dict.fromkeys(text for entry in outermost for text in entry.measured)]
    title = f"gains: {forward} kernels over the tokens fewer forward and {backward} fewer backward than operation by operation, {_WHERE}"
    return [title, *rows, *([_MEASURED, *measured] if measured else [])]


_WHERE = "on a GPU in bf16 or fp16"
_MEASURED = "measured on an H100, in bf16, of the kernels alone (benchmarks/results/nvidia-h100-80gb-hbm3):"


def _format(gain: Gain) -> str:
    return f"{gain.what}: {gain.forward}, {gain.backward}" if gain.forward or gain.backward else gain.what


def lines(title: str, entries: tuple[ModuleEntry, ...]) -> list[str]:
    """The title with the number of entries, and below it a line per kind and reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        line = (*entry.kind, entry.why)
        counts[line] = counts.get(line, 0) + 1
    paths, classes = (max((len(line[column]) for line in counts), default=0) for column in (0, 1))
    rows = [f"  {path:{paths}}  {count:3} × {what:{classes}}  {why}".rstrip() for (path, what, why), count in counts.items()]
    return [f"{title}: {len(entries)} modules", *rows]
