"""Measurements as lines of text: for the end of `pytest benchmarks`, for that of `gpu.py`, and of a file that one of them wrote.

python benchmarks/tables.py DIR/measurements.jsonl
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import before
from problem import OURS

from polyvit_fast import strict_json


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A contender's median time in seconds in a group, and what is known beside it."""

    group: str
    median: float
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contender(self) -> str:
        """Who ran."""
        return self.info["contender"]

    @property
    def race(self) -> str | None:
        """Those of one race took turns; a group may be raced twice, the second time with what had to be compiled."""
        return self.info.get("race")


def append(path: Path, measurement: Measurement, seconds: Sequence[float]) -> None:
    """A line more in a file; whoever is killed afterwards has it."""
    line = {"group": measurement.group, "median": measurement.median, "seconds": seconds, "info": measurement.info}
    with path.open("a") as file:
        file.write(strict_json.dumps(line) + "\n")


def read(path: Path) -> list[Measurement]:
    """What was appended; nothing where nothing was, and without a last line that was cut."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Measurement(**{name: value for name, value in json.loads(line).items() if name != "seconds"}) for line in lines]


def sections(measurements: Sequence[Measurement]) -> list[tuple[str, list[str]]]:
    """(title, lines) of the tables that there is something for."""
    steps = [row for row in measurements if row.info.get("kind") == "step"]
    kernels = [row for row in measurements if "absent" in row.info and row not in steps]
    rates = [row for row in measurements if "absent" not in row.info]
    tables = {
        "rates (median)": rate_lines(rates),
        "kernels (median)": kernel_lines(kernels),
        "training steps (median)": step_lines(steps),
    }
    return [(title, lines) for title, lines in tables.items() if lines]


def rate_lines(measurements: Iterable[Measurement]) -> list[str]:
    """A line for each contender: units per second, how many times as fast ours is, and what it says of itself."""
    lines = []
    for group, rows in _by_group(measurements).items():
        rates = {row.contender: row.info["amount"] / row.median for row in rows}
        for row in rows:
            rate = rates[row.contender]
            ratio = f"  ours / it = {rates[OURS] / rate:.2f}" if OURS in rates and row.contender != OURS else ""
            note = f"  {row.info['note']}" if row.info.get("note") else ""
            lines.append(f"{group:24} {row.contender:28} {rate:10.1f} {row.info['unit']}/s{ratio}{note}")
    return lines


def kernel_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each group: ours, the floor, the share of it, what ours was in version 0.3.0, how many times as fast as the best peer it
    is, the peers from fast to slow.

    Contenders in brackets do less than ours, or are ours, and are no peers to beat. The last lines say which are absent, and why.
    """
    groups = _by_group(measurements)
    width = max(map(len, groups), default=0)
    lines = [f"{'':{width}} {'ours':>10} {'floor':>10} {'of floor':>8} {'0.3.0':>10} {'/ best':>6}  peers"] if groups else []
    lines += [f"{group:{width}} {_ours_and_peers(rows)}" for group, rows in groups.items()]
    return lines + _absent_lines(groups)


def step_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each contender, of each group ours first and then the others from fast to slow, and the absent ones.

    It has units a second, how many times as fast ours is, MFU, memory, and the share of a step that Python takes to queue it; that of
    ours also what it was in version 0.3.0.
    """
    lines = []
    groups = _by_group(measurements)
    width = max(map(len, groups), default=0)
    for group, rows in groups.items():
        ours = _ours(rows)
        others = sorted((row for row in rows if row.contender != OURS), key=lambda row: row.median)
        for row in [*filter(None, [ours]), *others]:
            rate = row.info["amount"] / row.median
            found = None if row is ours else _ratio(row, rows)
            ratio = "" if found is None else f"ours / it = {found:.2f}"
            earlier = before.seconds(group, row.info.get("card", "")) if row is ours else None
            was = "" if earlier is None else f"0.3.0: {row.info['amount'] / earlier:.1f}"
            mfu = "" if row.info["mfu"] is None else f"MFU {row.info['mfu']:.1%}"
            memory = "" if row.info["peak_gib"] is None else f"{row.info['peak_gib']:.1f} GiB"
            share = row.info.get("host_share")
            host = "" if share is None else f"host {share:.1%}"
            words = filter(None, (ratio, was, mfu, memory, host, row.info["note"]))
            lines.append(f"{group:{width}} {row.contender:22} {rate:9.1f} {row.info['unit']}/s  {', '.join(words)}".rstrip())
    return lines + _absent_lines(groups)


def _ours(rows: Iterable[Measurement]) -> Measurement | None:
    """That of the first race."""
    return next((row for row in rows if row.contender == OURS), None)


def _ratio(row: Measurement, rows: Iterable[Measurement]) -> float | None:
    """How many times as fast ours was in the very race of `row`."""
    ours = _ours(other for other in rows if other.race == row.race)
    return ours and row.median / ours.median


def _absent_lines(groups: Mapping[str, list[Measurement]]) -> list[str]:
    """A line for each reason; where a contender was there for other groups, also for which it was not."""
    present = {row.contender for rows in groups.values() for row in rows}
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group, rows in groups.items():
        for name, reason in {name: reason for row in rows for name, reason in row.info["absent"].items()}.items():
            where[reason, name].append(group)
    names: dict[str, list[str]] = defaultdict(list)
    for (reason, name), missed in where.items():
        names[reason].append(f"{name} ({', '.join(missed)})" if name in present else name)
    return [f"absent, {reason}: {', '.join(who)}" for reason, who in names.items()]


def _ours_and_peers(rows: list[Measurement]) -> str:
    ours = _ours(rows)
    once = {row.contender: row for row in reversed(rows)}  # of its first race
    peers = sorted((row for row in once.values() if row is not ours), key=lambda row: row.median)
    ratios = [ratio for row in peers if row.info["alike"] and (ratio := _ratio(row, rows))]
    best = min(ratios, default=None)
    time = "-" if ours is None else _time(ours.median)
    some = ours or rows[0]
    floor, was = some.info.get("floor_us"), before.seconds(some.group, some.info.get("card", ""))
    floor, was = ("-" if value is None else _time(value) for value in (floor and floor / 1e6, was))
    share = "-" if ours is None or ours.info["share_of_floor"] is None else f"{ours.info['share_of_floor']:.0%}"
    told = ", ".join(_told(row) for row in peers)
    return f"{time:>10} {floor:>10} {share:>8} {was:>10} {'-' if best is None else f'{best:.2f}':>6}  {told}"


def _told(row: Measurement) -> str:
    text = f"{row.contender} {_time(row.median)}"
    return text if row.info["alike"] else f"({text})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def _by_group(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    groups = defaultdict(list)
    for measurement in measurements:
        groups[measurement.group].append(measurement)
    return groups


def lines_of(measurements: Sequence[Measurement]) -> list[str]:
    """All tables, each below its title."""
    return [line for title, table in sections(measurements) for line in ("", title, *table)]


if __name__ == "__main__":
    print("\n".join(lines_of([row for path in sys.argv[1:] for row in read(Path(path))])))
