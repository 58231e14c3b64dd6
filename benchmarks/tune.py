"""Measure candidates for the rows of the tile table on the card at hand, and rewrite that card's measured rows.

    python benchmarks/tune.py                           everything, in at most three minutes
    python benchmarks/tune.py --ops attention mlp       these only; rows of others stay
    python benchmarks/tune.py --seconds 60 --dry-run    print what would be chosen, write nothing

A candidate is refused when it does not compile, spills, wants more shared memory than there is, or is further from the truth than twice
torch's own error. The others take turns, the best eight again for longer, then the best and its neighbours. The row in use stays when it is
within 1% of the best. Two files are written: the rows to kernels/polyvit_kernels/tile_table.py, and everything measured to
benchmarks/results/<card>/tuning.json, which the new rows name as their source. Without a GPU there is nothing to tune: status 2.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import card
import measured
import torch
from candidates import CASES, Case, label
from contest import Crew, Lengths, Outcome, hold
from lab import Job

from polyvit_kernels import commands, tile_table, tiles
from polyvit_kernels.tiles import Tile

TABLE_PATH = card.ROOT / "kernels" / "polyvit_kernels" / "tile_table.py"
RESULTS = card.ROOT / "benchmarks" / "results"
SECONDS = 180
SHARES = {"attention": 8, "mlp": 6, "layer_norm": 3, "update": 1, "patch_embed": 2}
SAMPLES = {"attention": 2, "mlp": 1_500, "layer_norm": 3_001, "update": 1_000_003, "patch_embed": 3}
"""How much of a size is held to the truth."""
SMALL_ARCH = 90
NOBODY_HERE = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where choices are written to: the table, and the folder of the card's results."""

    table: Path
    folder: Path

    @property
    def results(self) -> Path:
        """Everything measured."""
        return self.folder / "tuning.json"

    @property
    def source(self) -> str:
        """What rows say where they come from."""
        return f"{self.folder.name}/{self.results.name}"


def job_of(case: Case, family: str, rows: tuple[Tile, ...], is_small: bool) -> Job:
    """A case at the sizes of a card, or of Triton's interpreter, which multiplies no bf16."""
    dtype = torch.float32 if is_small or case.op.endswith("_update") else torch.bfloat16
    if is_small:
        return Job(case=case, size=case.small, sample=case.small, dtype=dtype, rows=rows)
    sample = (min(case.size[0], SAMPLES[family]), *case.size[1:])
    return Job(case=case, size=case.size, sample=sample, dtype=dtype, rows=rows)


def row_in_use(case: Case, arch: int) -> Tile:
    """What the table gives for a case; where a short attention has no row, the long kernel does it."""
    tokens, features = case.question()
    dtype = next(dtype for dtype, name in tiles.DTYPES.items() if name == case.dtypes()[0])
    row = tiles.pick(case.op, arch, dtype, tokens=tokens, features=features)
    if row.backend == "torch" and case.op.startswith("attention_short"):
        return tiles.pick(case.op.replace("short", "long"), arch, dtype, tokens=tokens, features=features)
    return row


def deadlines(families: Sequence[str], seconds: float) -> Iterator[tuple[str, float]]:
    """(family, when it must end): each takes its share of what those before left."""
    end = time.monotonic() + seconds
    for index, family in enumerate(families):
        share = SHARES[family] / sum(SHARES[other] for other in families[index:])
        now = time.monotonic()
        yield family, now + share * (end - now)


def tune(families: Sequence[str], seconds: float, crew: Crew, *, is_small: bool) -> Iterator[Outcome | Job]:
    """Each case's outcome, or the job for which no time was left."""
    lengths = Lengths(first=(1, 1), last=(1, 1), candidates=2) if is_small else Lengths()
    rows: tuple[Tile, ...] = ()
    for family, end in deadlines(families, seconds):
        for case in CASES[family]:
            job = job_of(case, family, rows, is_small)
            if time.monotonic() >= end:
                yield job
                continue
            outcome = hold(job, row_in_use(case, crew.arch), crew, lengths, check_budget=not is_small)
            if outcome.new and outcome.new.op == case.op:
                rows = (*rows, case.row(outcome.new, crew.arch, "compiled"))
            yield outcome


def line(outcome: Outcome) -> str:
    """Old against new."""
    old, new = outcome.us(outcome.old), outcome.us(outcome.new)
    tried = f"{len(outcome.seconds)} raced to the end, {len(outcome.refused)} refused"
    if outcome.new is None:
        return f"{outcome.job.title}: no candidate is right; {tried}; the first: {next(iter(outcome.refused.items()), '')}"
    before = f"{label(outcome.old)} {'refused' if old is None else f'{old:.1f} us'}"
    if label(outcome.new) == label(outcome.old):
        return f"{outcome.job.title}: stays {before}; {tried}"
    gain = "" if old is None or new is None else f" ({old / new:.2f} times as fast)"
    return f"{outcome.job.title}: {before} → {label(outcome.new)} {new:.1f} us{gain}; {tried}"


def record(outcome: Outcome) -> dict[str, Any]:
    """For the file of results."""
    case = outcome.job.case
    return {
        "op": case.op,
        "tokens": case.tokens,
        "features": case.features,
        "size": outcome.job.size,
        "old": label(outcome.old),
        "old_source": outcome.old.source,
        "old_us": outcome.us(outcome.old),
        "new": outcome.new and label(outcome.new),
        "new_us": outcome.us(outcome.new),
        "seconds": outcome.seconds,
        "refused": outcome.refused,
        "clocks": card.clocks(),
    }


def write(outcome: Outcome, arch: int, place: Place) -> None:
    """Put an outcome into the results and its row into the table, in the place of this card's earlier ones."""
    classes = {(case.op, case.tokens, case.features) for cases in CASES.values() for case in cases}
    case, row = outcome.job.case, outcome.new
    if row and row.op == case.op:
        rows = measured.merged(measured.read(place.table), [case.row(row, arch, place.source)], arch, classes)
        measured.rewrite(place.table, rows)
    place.folder.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(place.results.read_text())["cases"] if place.results.exists() else []
    new = record(outcome)
    same = ("op", "tokens", "features")
    kept = [old for old in earlier if [old[key] for key in same] != json.loads(json.dumps([new[key] for key in same]))]
    found = {"card": card.name(), "arch": arch, "versions": card.versions(), "cases": [*kept, new]}
    place.results.write_text(json.dumps(found, indent=1) + "\n")


def known(arch: int) -> bool:
    """Whether the table has rows of this very card: with a few measured ones only, all its other operations would be torch's."""
    return arch in {a for row in tile_table.TABLE for a in row.archs}


def main() -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES), help="what to tune")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no new case after this many seconds")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--small", action="store_true", help="two candidates of tiny cases in Triton's interpreter; writes nothing")
    args = parser.parse_args()
    if not card.HAS_GPU and not args.small:
        print("there is no CUDA GPU here, so there is nothing to tune (--small tries the tuner itself on a CPU)", file=sys.stderr)
        return NOBODY_HERE
    if args.small:
        # For the processes that come: Triton reads it when a kernel is defined.
        os.environ["TRITON_INTERPRET"] = "1"
    arch = SMALL_ARCH if args.small else tiles.architecture(card.DEVICE)
    if not known(arch):
        print(f"the table has no rows for sm_{arch}: add {arch} to the archs in {TABLE_PATH} first", file=sys.stderr)
        return 1
    place = Place(table=TABLE_PATH, folder=RESULTS / card.folder_name())
    with Crew(arch) as crew:
        for outcome in tune(args.ops, args.seconds, crew, is_small=args.small):
            print(f"{outcome.title}: no time was left" if isinstance(outcome, Job) else line(outcome), flush=True)
            if not args.dry_run and not args.small and isinstance(outcome, Outcome):
                write(outcome, arch, place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
