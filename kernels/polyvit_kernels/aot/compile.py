"""Every row of the tile table compiled ahead of time, on a machine that needs no GPU, and held to its budget.

    python -m polyvit_kernels.aot --arch 80 90 100 120     the table of registers, spills, shared memory, instructions and ptxas's messages
    python -m polyvit_kernels.aot --out build/aot          also the images and the C table that CMakeLists.txt makes a library of
    python -m polyvit_kernels.aot --library                what the installed C library holds
    python -m polyvit_kernels.aot --library build/aot/libpolyvit_kernels.so      what that of `make aot` holds

Ends with status 1, and says which kernel it is, when one does not compile or is beyond its budget (`images.Image.excesses`).
"""

import json
import multiprocessing
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from triton import knobs

from polyvit_kernels.aot import c_table, commands, library
from polyvit_kernels.aot.images import Image, build
from polyvit_kernels.aot.jobs import Entry, Job, plan, span
from polyvit_kernels.tiles import DTYPES
from polyvit_kernels.tiles.table import TABLE

ARCHS = (80, 90, 100, 120)
"""The GPUs that are compiled for unless others are asked for, the first of each generation: A100, H100, B200, RTX 50."""

_PROGRESS_EVERY = 20


def _compile(job: Job) -> Image:
    return build(job.variant(), job.arch)


def compile_all(jobs: Sequence[Job], tell: Callable[[str], None]) -> tuple[list[Image], list[str]]:
    """The images, and why there is none for some jobs; on all cores of this process, each a fresh interpreter."""
    cores = min(len(os.sched_getaffinity(0)), len(jobs)) or 1
    failures = []
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[Image]] = [pool.submit(_compile, job) for job in jobs]
        for number, _ in enumerate(as_completed(futures), 1):
            if number % _PROGRESS_EVERY == 0 or number == len(jobs):
                tell(f"compiled {number} of {len(jobs)} kernels")
    for job, future in zip(jobs, futures, strict=True):
        if error := future.exception():
            failures.append(f"{job}: {type(error).__name__}: {error}")
    return [future.result() for future in futures] if not failures else [], failures


def records(entries: Sequence[Entry], images: Sequence[Image]) -> list[dict]:
    """One for each kernel of each row, GPU and dtype: what the printed table shows."""
    return [
        {
            "op": entry.tile.op,
            "backend": entry.tile.backend,
            "source": entry.tile.source,
            "tokens": entry.tile.tokens,
            "features": entry.tile.features,
            "dtype": entry.dtype,
            "arch": entry.arch,
            "kernel": image.name,
            "warps": image.num_warps,
            "stages": image.num_stages,
            **asdict(image.usage),
            "shared": image.shared,
            "programs": image.programs(),
            "programs_per_sm": image.programs_per_sm,
            "columns": image.columns,
            "bytes": len(image.cubin),
            "multiplies": image.multiplies,
            "messages": image.messages,
            "constants": dict(image.constants),
            "excesses": image.excesses(),
        }
        for entry in entries
        for image in (images[place] for place in entry.kernels)
    ]


def _name(record: dict) -> str:
    sizes = f"tokens {span(*record['tokens'])}, features {span(record['features'])}"
    row = f"{record['op']} {record['backend']} {record['dtype']} sm_{record['arch']}"
    return f"{row}, {sizes}, {record['registers']} registers, {_kernel(record)}"


def _kernel(record: dict) -> str:
    return " ".join([record["kernel"], *(f"{name}={value}" for name, value in record["constants"].items())])


def _cells(record: dict) -> tuple[str, ...]:
    tensor = " ".join(f"{count} {name}" for name, count in record["tensor"].items())
    sizes = (span(*record["tokens"]), span(record["features"]))
    numbers = (record[name] for name in ("warps", "stages", "registers"))
    spills = f"{record['spill_stores']}/{record['spill_loads']}"
    messages = "; ".join(message.partition(":")[0] for message in record["messages"])
    rest = (
        spills,
        record["inner_spills"],
        record["shared"],
        record["programs"],
        tensor or "-",
        messages,
        record["bytes"],
        record["source"],
    )
    return (record["op"], record["backend"], *sizes, record["dtype"], f"sm_{record['arch']}", *map(str, (*numbers, *rest)), _kernel(record))


HEADINGS = (
    *("op", "backend", "tokens", "features", "dtype", "gpu", "warps", "stages", "registers", "spills", "inner", "shared", "programs"),
    *("tensor", "messages", "bytes", "source", "kernel"),
)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """In columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]))


def print_library(path: Path) -> None:
    """What a C library holds; ends with status 1 where there is none."""
    if path != library.PATH and not path.is_file():
        sys.exit(f"there is no file {path}")
    try:
        held = library.load(path.absolute())
    except OSError as error:
        sys.exit(str(error))
    except AttributeError as error:
        sys.exit(f"{path} is another library: {error}")
    print_table([library.HEADINGS, *(line for row in library.rows(held) for line in library.describe(row))])


def _capability(text: str) -> int:
    return int(text.removeprefix("sm_"))


def _parser() -> ArgumentParser:
    known = sorted({arch for tile in TABLE for arch in tile.archs})
    parser = commands.parser(__doc__, "python -m polyvit_kernels.aot")
    archs = {"type": _capability, "nargs": "+", "choices": known, "default": ARCHS}
    parser.add_argument("--arch", **archs, help="compute capabilities, 90 or sm_90 for Hopper")
    dtypes = {"nargs": "+", "choices": sorted(DTYPES.values()), "default": ["bf16", "fp16"]}
    parser.add_argument("--dtype", **dtypes, help="of the tensors that the kernels are compiled for")
    parser.add_argument("--out", type=Path, help="folder for the images and the C table; without it, the table is only printed")
    parser.add_argument("--json", type=Path, help="file for the table in JSON")
    parser.add_argument("--quiet", action="store_true", help="print the totals only")
    where = {"type": Path, "nargs": "?", "const": library.PATH, "metavar": "PATH"}
    parser.add_argument("--library", **where, help="compile nothing, list what the C library there holds; without PATH, the installed one")
    return parser


def main() -> None:
    """The command."""
    parser = _parser()
    args = parser.parse_args()
    if args.library:
        print_library(args.library)
        return
    if knobs.runtime.interpret:
        sys.exit("Triton's interpreter is chosen (TRITON_INTERPRET), which compiles nothing: unset it")
    if args.out:
        commands.make_folder(parser, "--out", args.out)
    if args.json:
        commands.make_folder(parser, "--json", args.json.parent)
        if args.json.is_dir():
            parser.error(f"--json: {args.json} is a folder; a file is needed")
    entries, jobs = plan(TABLE, sorted(args.arch), args.dtype)
    images, failures = compile_all(jobs, lambda line: print(line, file=sys.stderr, flush=True))
    found = records(entries, images) if not failures else []
    if found and not args.quiet:
        print_table([HEADINGS, *map(_cells, found)])
    failures += [f"{_name(record)}: {excess}" for record in found for excess in record["excesses"]]
    total = sum(len(image.cubin) for image in images)
    print(f"{len(entries)} rows, {len(jobs)} kernels, {total} bytes of images, {len(failures)} failures")
    if args.json:
        args.json.write_text(json.dumps(found, allow_nan=False))
    if args.out and images:
        c_table.write(args.out, entries, images)
    if failures:
        sys.exit("\n".join(["not compiled, or beyond the budget:", *failures]))
