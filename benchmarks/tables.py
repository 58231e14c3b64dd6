"""Measurements as lines of text: for the end of `pytest benchmarks`, and for that of `gpu.py`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from problem import OURS
from race import told


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


def sections(measurements: Sequence[Measurement]) -> list[tuple[str, list[str]]]:
    """(title, lines) of the tables that there is something for; a row that no line can be made of is named at the end of its table."""
    steps = [row for row in measurements if row.info.get("kind") == "step"]
    kernels = [row for row in measurements if "absent" in row.info and row not in steps]
    rates = [row for row in measurements if "absent" not in row.info]
    tables = {
        "rates (median)": _guarded(rate_lines, rates),
        "kernels (median)": _guarded(kernel_lines, kernels),
        "training steps (median)": _guarded(step_lines, steps),
    }
    return [(title, lines) for title, lines in tables.items() if lines]


def _guarded(lines_of: Callable[[list[Measurement]], list[str]], rows: list[Measurement]) -> list[str]:
    whole, left_out = [], []
    for row in rows:
        try:
            lines_of([row])
            whole.append(row)
        except (KeyError, TypeError) as error:
            left_out.append(f"left out, {told(error)}: {row.group}, {row.info.get('contender')}")
    return lines_of(whole) + left_out


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
    """A line for each group: ours, its share of the floor, how many times as fast as the best peer it is, the peers from fast to slow.

    Contenders in brackets do less than ours and are no peers to beat. The last lines say which are absent, and why.
    """
    groups = _by_group(measurements)
    width = max(map(len, groups), default=0)
    lines = [f"{'':{width}} {'ours':>10} {'of floor':>8} {'/ best':>6}  peers"] if groups else []
    lines += [f"{group:{width}} {_ours_and_peers(rows)}" for group, rows in groups.items()]
    return lines + _absent_lines(groups)


def step_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each contender, of each group ours first and then the others from fast to slow, and the absent ones.

    It has units a second, how many times as fast ours is, MFU, memory, and the share of a step that Python takes to queue it; that of ours
    has the verdict on its targets.
    """
    lines = []
    groups = _by_group(measurements)
    width = max(map(len, groups), default=0)
    for group, rows in groups.items():
        ours = next((row for row in rows if row.contender == OURS), None)
        for row in sorted(rows, key=lambda row: (row is not ours, row.median)):
            rate = row.info["amount"] / row.median
            ratio = "" if ours is None or row is ours else f"ours / it = {row.median / ours.median:.2f}"
            mfu = "" if row.info["mfu"] is None else f"MFU {row.info['mfu']:.1%}"
            memory = "" if row.info["peak_gib"] is None else f"{row.info['peak_gib']:.1f} GiB"
            share = row.info.get("host_share")
            host = "" if share is None else f"host {share:.1%}"
            words = filter(None, (ratio, mfu, memory, host, row.info["note"], _step_verdict(row, rows) if row is ours else ""))
            lines.append(f"{group:{width}} {row.contender:22} {rate:9.1f} {row.info['unit']}/s  {', '.join(words)}".rstrip())
    return lines + _absent_lines(groups)


def _step_verdict(ours: Measurement, rows: list[Measurement]) -> str:
    """Which of the targets, which are for an H200, were reached, against the fastest contender that is not ours in another form."""
    if "H200" not in ours.info["card"]:
        return ""
    best = min((row for row in rows if not row.contender.startswith(OURS)), key=lambda row: row.median, default=None)
    rate, ratio, memory = (ours.info[f"target_{name}"] for name in ("rate", "ratio", "memory"))
    words = []
    if rate is not None:
        words.append(f"{rate:,.0f}/s {_reached(ours.info['amount'] / ours.median >= rate)}")
    if ratio is not None and best is not None:
        words.append(f"{ratio:.2f} times {best.contender} {_reached(best.median / ours.median >= ratio)}")
    if memory is not None and best is not None:
        words.append(f"{memory:.1f} times its memory {_reached(ours.info['peak_gib'] <= memory * best.info['peak_gib'])}")
    return f"target {', '.join(words)}" if words else ""


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def _absent_lines(groups: Mapping[str, list[Measurement]]) -> list[str]:
    """A line for each reason; where a contender was there for other groups, also for which it was not."""
    present = {row.contender for rows in groups.values() for row in rows}
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group, rows in groups.items():
        for name, reason in rows[0].info["absent"].items():
            where[reason, name].append(group)
    names: dict[str, list[str]] = defaultdict(list)
    for (reason, name), missed in where.items():
        names[reason].append(f"{name} ({', '.join(missed)})" if name in present else name)
    return [f"absent, {reason}: {', '.join(who)}" for reason, who in names.items()]


def _ours_and_peers(rows: list[Measurement]) -> str:
    ours = next((row for row in rows if row.contender == OURS), None)
    peers = sorted((row for row in rows if row.contender != OURS), key=lambda row: row.median)
    best = next((row for row in peers if row.info["alike"]), None)
    time = "-" if ours is None else _time(ours.median)
    share = "-" if ours is None or ours.info["share_of_floor"] is None else f"{ours.info['share_of_floor']:.0%}"
    ratio = "-" if ours is None or best is None else f"{best.median / ours.median:.2f}"
    told = ", ".join(_told(row) for row in peers)
    return f"{time:>10} {share:>8} {ratio:>6}  {told}{_verdict(ours, best)}"


def _told(row: Measurement) -> str:
    share = row.info["share_of_step"]
    text = f"{row.contender} {_time(row.median)}{'' if share is None else f' ({share:.2%} of a step)'}"
    return text if row.info["alike"] else f"({text})"


def _verdict(ours: Measurement | None, best: Measurement | None) -> str:
    """Whether the targets were reached, which are for an H200."""
    if ours is None or "H200" not in ours.info["card"]:
        return ""
    us, ratio = ours.info["target_us"], ours.info["target_ratio"]
    words = []
    if us is not None:
        words.append(f"{us:.0f} us {_reached(ours.median * 1e6 <= us)}")
    if ratio is not None and best is not None:
        words.append(f"{ratio:.2f} {_reached(best.median / ours.median >= ratio)}")
    return f"; target {', '.join(words)}" if words else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def _by_group(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    groups = defaultdict(list)
    for measurement in measurements:
        groups[measurement.group].append(measurement)
    return groups
