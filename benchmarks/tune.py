"""Measure candidates for the rows of the tile table on the card at hand, and rewrite that card's measured rows.

    python benchmarks/tune.py                           everything, in at most three minutes
    python benchmarks/tune.py --ops attention mlp       these only; rows of others stay
    python benchmarks/tune.py --seconds 60 --dry-run    print what would be chosen, write nothing

A candidate is refused when it does not compile, spills, wants more shared memory than there is, or is further from the truth than twice
torch's own error. The others take turns, the best eight again for longer, then the best and its neighbours. The row in use stays when it is
within 1% of the best. Two files are written: the rows to kernels/polyvit_kernels/tile_table.py, and everything measured to
benchmarks/results/<card>/tuning.json, which the new rows name as their source. Without a GPU there is nothing to tune: status 2.
"""

import ast
import json
import os
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import card
import torch
from candidates import CASES, Case, label
from contest import Crew, Lengths, Outcome, hold
from lab import Job

from polyvit_fast import strict_json
from polyvit_kernels import tiles
from polyvit_kernels.aot import commands
from polyvit_kernels.tiles import ANY, Tile
from polyvit_kernels.tiles import table as tile_table

TABLE_PATH = card.ROOT / "kernels" / "polyvit_kernels" / "tile_table.py"
RESULTS = card.ROOT / "benchmarks" / "results"
SECONDS = 180
SHARES = {"attention": 8, "mlp": 6, "layer_norm": 3, "update": 1, "patch_embed": 2}
SAMPLES = {"attention": 2, "mlp": 1_500, "layer_norm": 3_001, "update": 1_000_003, "patch_embed": 3}
"""How much of a size is held to the truth."""
SMALL_ARCH = 90
NOBODY_HERE = 2
NAME = "_MEASURED"
"""Of the tuple of measured rows in the table."""
LINE_LENGTH = 140


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


def row_in_use(case: Case, arch: int, *, portable: bool = False) -> Tile:
    """What the table gives for a case; where a short attention has no row, the long kernel does it. `portable`: see `tiles.pick`."""
    tokens, features = case.question()
    dtype = next(dtype for dtype, name in tiles.DTYPES.items() if name == case.dtypes()[0])
    row = tiles.pick(case.op, arch, dtype, tokens=tokens, features=features, portable=portable)
    if row.backend == "torch" and case.op.startswith("attention_short"):
        return tiles.pick(case.op.replace("short", "long"), arch, dtype, tokens=tokens, features=features, portable=portable)
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
            outcome = hold(job, row_in_use(case, crew.arch, portable=is_small), crew, lengths, check_budget=not is_small)
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
        rows = merged(read_rows(place.table), [case.row(row, arch, place.source)], arch, classes)
        rewrite(place.table, rows)
    place.folder.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(place.results.read_text())["cases"] if place.results.exists() else []
    new = record(outcome)
    same = ("op", "tokens", "features")
    kept = [old for old in earlier if [old[key] for key in same] != json.loads(strict_json.dumps([new[key] for key in same]))]
    found = {"card": card.name(), "arch": arch, "versions": card.versions(), "cases": [*kept, new]}
    place.results.write_text(strict_json.dumps(found, indent=1) + "\n")


def class_of(row: Tile) -> tuple[str, tuple[int, int], int]:
    """The calls that a row is for on a card: op, tokens, features."""
    return row.op, row.tokens, row.features


def read_rows(path: Path) -> tuple[Tile, ...]:
    """The measured rows of a table's source."""
    return runpy.run_path(str(path))[NAME]


def merged(rows: Sequence[Tile], found: Sequence[Tile], arch: int, classes: set[tuple[str, tuple[int, int], int]]) -> tuple[Tile, ...]:
    """`rows` with those of one card replaced by what was found; of that card, rows of classes that are no more are left out."""
    replaced = {class_of(row) for row in found}
    kept = [row for row in rows if row.archs != (arch,) or class_of(row) in classes - replaced]
    return tuple(sorted((*kept, *found), key=lambda row: (row.archs, row.op, row.features, row.tokens)))


def rewrite(path: Path, rows: Sequence[Tile]) -> None:
    """Make `rows` the measured rows of a table's source; every other line stays, and the file is whole at any moment."""
    text = path.read_text()
    (place,) = (node for node in ast.parse(text).body if isinstance(node, ast.Assign) and _assigns(node))
    assert place.end_lineno
    lines = text.splitlines(keepends=True)
    # A comment may follow the tuple on its last line.
    after = lines[place.end_lineno :]
    new = "".join([*lines[: place.lineno - 1], tuple_text(rows), *after])
    draft = path.with_suffix(".draft")
    draft.write_text(new)
    os.replace(draft, path)


def _assigns(node: ast.Assign) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == [NAME]


def tuple_text(rows: Sequence[Tile]) -> str:
    """The statement, four lines a row, where the formatter's own way takes eleven."""
    if not rows:
        return f"{NAME} = ()\n"
    return f"{NAME} = (\n{''.join(map(row_text, rows))})  # fmt: skip\n"


def row_text(row: Tile) -> str:
    """A row as Python."""
    plain = Tile(op=row.op, archs=row.archs)
    first = [f'op="{row.op}"', f"archs={row.archs}"]
    first += [f"tokens=({row.tokens[0]}, {_number(row.tokens[1])})"] if row.tokens != plain.tokens else []
    first += [f"features={_number(row.features)}"] if row.features != plain.features else []
    first += [f"dtypes={_tuple(row.dtypes)}"] if row.dtypes != plain.dtypes else []
    first += [f'backend="{row.backend}"'] if row.backend != plain.backend else []
    if row.blocks or row.backend == "hopper":
        first += [f"num_warps={row.num_warps}", f"num_stages={row.num_stages}"]
    budget = ("max_registers", "programs_per_sm", "allowed_spills")
    second = [f"{name}={getattr(row, name)}" for name in budget if getattr(row, name) != getattr(plain, name)]
    if row.blocks:
        second += [f"blocks={{{', '.join(f'{_quoted(name)}: {value}' for name, value in row.blocks.items())}}}"]
    second += [f'source="{row.source}"']
    return f"    Tile(\n{''.join(map(_line, (*_wrapped(first), *_wrapped(second))))}    ),\n"


def _wrapped(parts: list[str]) -> Iterator[list[str]]:
    """As few lines as they fit."""
    line: list[str] = []
    for part in parts:
        if line and len(_line([*line, part])) > LINE_LENGTH + 1:
            yield line
            line = []
        line.append(part)
    yield line


def _line(parts: list[str]) -> str:
    return f"        {', '.join(parts)},\n"


def _number(value: int) -> str:
    return "ANY" if value == ANY else str(value)


def _tuple(words: tuple[str, ...]) -> str:
    return f"({', '.join(map(_quoted, words))}{',' if len(words) == 1 else ''})"


def _quoted(word: str) -> str:
    return f'"{word}"'


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
