"""Every row of the tile table compiled ahead of time, on a machine that needs no GPU, and held to its budget.

    python -m polyvit_kernels.aot --arch 80 90 100 120     the table of registers, spills, shared memory, instructions and ptxas's messages
    python -m polyvit_kernels.aot --out build/aot          also the compiled kernels and the C table that CMakeLists.txt makes a library of
    python -m polyvit_kernels.aot --library                what the installed C library holds
    python -m polyvit_kernels.aot --library build/aot/libpolyvit_kernels.so      what that of `make aot` holds

Ends with status 1, and says which kernel it is, when one does not compile or is beyond its budget (`CompiledKernel.excesses`).
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from triton import knobs

from polyvit_kernels.aot import c_table, commands, library, listing
from polyvit_kernels.aot.compile import compile_all
from polyvit_kernels.aot.jobs import list_jobs
from polyvit_kernels.tiles import DTYPES
from polyvit_kernels.tiles.table import TABLE

ARCHS = (80, 90, 100, 120)
"""The GPUs that are compiled for unless others are asked for, the first of each generation: A100, H100, B200, RTX 50."""


def _capability(text: str) -> int:
    return int(text.removeprefix("sm_"))


def _parser() -> ArgumentParser:
    known = sorted({arch for tile in TABLE for arch in tile.archs})
    parser = commands.parser(__doc__, "python -m polyvit_kernels.aot")
    archs = {"type": _capability, "nargs": "+", "choices": known, "default": ARCHS}
    parser.add_argument("--arch", **archs, help="compute capabilities, 90 or sm_90 for Hopper")
    dtypes = {"nargs": "+", "choices": sorted(DTYPES.values()), "default": ["bf16", "fp16"]}
    parser.add_argument("--dtype", **dtypes, help="of the tensors that the kernels are compiled for")
    parser.add_argument("--out", type=Path, help="folder for the compiled kernels and the C table; without it, the table is only printed")
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
        listing.print_library(args.library)
        return
    if knobs.runtime.interpret:
        sys.exit("Triton's interpreter is chosen (TRITON_INTERPRET), which compiles nothing: unset it")
    if args.out:
        commands.make_folder(parser, "--out", args.out)
    if args.json:
        commands.make_folder(parser, "--json", args.json.parent)
        if args.json.is_dir():
            parser.error(f"--json: {args.json} is a folder; a file is needed")
    entries, jobs = list_jobs(TABLE, sorted(args.arch), args.dtype)
    kernels, failures = compile_all(jobs, lambda line: print(line, file=sys.stderr, flush=True))
    found = listing.describe_kernels(entries, kernels) if not failures else []
    if found and not args.quiet:
        listing.print_table([listing.HEADINGS, *map(listing.format_cells, found)])
    failures += [f"{listing.name_kernel(kernel)}: {excess}" for kernel in found for excess in kernel["excesses"]]
    total = sum(len(kernel.cubin) for kernel in kernels)
    print(f"{len(entries)} rows, {len(jobs)} kernels, {total} bytes of machine code, {len(failures)} failures")
    if args.json:
        args.json.write_text(json.dumps(found, allow_nan=False))
    if args.out and kernels:
        c_table.write(args.out, entries, kernels)
    if failures:
        sys.exit("\n".join(["not compiled, or beyond the budget:", *failures]))
