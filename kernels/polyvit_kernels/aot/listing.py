"""What was compiled, or what a C library holds, as tables for people."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from polyvit_kernels.aot import library
from polyvit_kernels.aot.compiled_kernel import CompiledKernel
from polyvit_kernels.aot.jobs import CompiledTile, format_limits


def describe_kernels(entries: Sequence[CompiledTile], kernels: Sequence[CompiledKernel]) -> list[dict]:
    """A dictionary for each kernel of each row, GPU and dtype: what the printed table shows."""
    return [
        {
            "op": entry.tile.op,
            "backend": entry.tile.backend,
            "source": entry.tile.source,
            "tokens": entry.tile.tokens,
            "features": entry.tile.features,
            "dtype": entry.dtype,
            "arch": entry.arch,
            "kernel": kernel.name,
            "warps": kernel.num_warps,
            "stages": kernel.num_stages,
            **asdict(kernel.usage),
            "shared": kernel.shared,
            "programs": kernel.programs(),
            "programs_per_sm": kernel.programs_per_sm,
            "columns": kernel.columns,
            "bytes": len(kernel.cubin),
            "multiplies": kernel.multiplies,
            "messages": kernel.messages,
            "constants": dict(kernel.constants),
            "excesses": kernel.excesses(),
        }
        for entry in entries
        for kernel in (kernels[index] for index in entry.kernels)
    ]


def name_kernel(kernel: dict) -> str:
    """What a failure calls one of `describe_kernels`."""
    sizes = f"tokens {format_limits(*kernel['tokens'])}, features {format_limits(kernel['features'])}"
    row = f"{kernel['op']} {kernel['backend']} {kernel['dtype']} sm_{kernel['arch']}"
    return f"{row}, {sizes}, {kernel['registers']} registers, {_name_with_constants(kernel)}"


def _name_with_constants(kernel: dict) -> str:
    return " ".join([kernel["kernel"], *(f"{name}={value}" for name, value in kernel["constants"].items())])


def format_cells(kernel: dict) -> tuple[str, ...]:
    """`HEADINGS` of one of `describe_kernels`."""
    tensor = " ".join(f"{count} {name}" for name, count in kernel["tensor"].items())
    sizes = (format_limits(*kernel["tokens"]), format_limits(kernel["features"]))
    numbers = (kernel[name] for name in ("warps", "stages", "registers"))
    spills = f"{kernel['spill_stores']}/{kernel['spill_loads']}"
    messages = "; ".join(message.partition(":")[0] for message in kernel["messages"])
    rest = (
        spills,
        kernel["inner_spills"],
        kernel["shared"],
        kernel["programs"],
        tensor or "-",
        messages,
        kernel["bytes"],
        kernel["source"],
    )
    return (
        kernel["op"],
        kernel["backend"],
        *sizes,
        kernel["dtype"],
        f"sm_{kernel['arch']}",
        *map(str, (*numbers, *rest)),
        _name_with_constants(kernel),
    )


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
