"""The tile table and its compiled kernels as the C library holds them (`csrc/polyvit_table.h`), and the lookups that its test repeats.

Only rows of the triton backend are written: Hopper's own kernels take tensor descriptors, which the library does not make.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from polyvit_kernels import tiles
from polyvit_kernels.aot.compiled_kernel import CompiledKernel
from polyvit_kernels.aot.jobs import CompiledTile
from polyvit_kernels.tiles.table import TABLE

_ALIGNMENT = 64


def write(folder: Path, entries: Sequence[CompiledTile], kernels: Sequence[CompiledKernel]) -> None:
    """`polyvit_table.c`, `polyvit_cubins.bin` and `lookups.txt`: the same bytes for the same table and kernels.

    The kernels may differ from build to build: for sm_100, ptxas does not repeat its bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, kernels = _select_portable(entries, kernels)
    cubins = [kernel.cubin + b"\0" * (-len(kernel.cubin) % _ALIGNMENT) for kernel in kernels]
    (folder / "polyvit_cubins.bin").write_bytes(b"".join(cubins))
    (folder / "polyvit_table.c").write_text("\n".join(_write_source(entries, kernels, [len(cubin) for cubin in cubins])) + "\n")
    (folder / "lookups.txt").write_text("\n".join(_list_lookups(entries)) + "\n")


def _select_portable(entries: Sequence[CompiledTile], kernels: Sequence[CompiledKernel]) -> tuple[list[CompiledTile], list[CompiledKernel]]:
    """The rows that the library holds, and the kernels that they need."""
    kept = [entry for entry in entries if entry.tile.backend == "triton"]
    numbers = {old: new for new, old in enumerate(sorted({index for entry in kept for index in entry.kernels}))}
    return [replace(entry, kernels=tuple(numbers[k] for k in entry.kernels)) for entry in kept], [kernels[k] for k in numbers]


def _write_source(entries: Sequence[CompiledTile], kernels: Sequence[CompiledKernel], sizes: Sequence[int]) -> Iterator[str]:
    yield "/* Written by python -m polyvit_kernels.aot. */"
    yield '#include "polyvit_table.h"'
    offset, structs = 0, []
    for index, (kernel, size) in enumerate(zip(kernels, sizes, strict=True)):
        parameters = (f'{{"{p.name}", "{p.type}", {p.multiple}}}' for p in kernel.parameters)
        yield from _write_array(f"static const polyvit_parameter parameters_{index}[]", parameters)
        yield from _write_array(
            f"static const polyvit_constant constants_{index}[]", (f'{{"{n}", "{v}"}}' for n, v in kernel.constants.items())
        )
        numbers = (kernel.arch, kernel.num_warps, kernel.shared, kernel.usage.registers, len(kernel.parameters), len(kernel.constants))
        arrays = f"parameters_{index}, constants_{index}, polyvit_cubins + {offset}, {len(kernel.cubin)}"
        structs.append(f'{{"{kernel.name}", {", ".join(map(str, numbers))}, {arrays}}}')
        offset += size
    yield from _write_array("const polyvit_kernel polyvit_images[]", structs)
    yield f"const size_t polyvit_num_images = {len(kernels)};"
    rows = []
    for index, entry in enumerate(entries):
        if entry.kernels:
            yield from _write_array(
                f"static const polyvit_kernel *const kernels_{index}[]", (f"&polyvit_images[{k}]" for k in entry.kernels)
            )
        tile = entry.tile
        numbers = (entry.arch, *tile.tokens, tile.features, len(entry.kernels))
        pointer = f"kernels_{index}" if entry.kernels else "NULL"
        rows.append(f'{{"{tile.op}", "{entry.dtype}", "{tile.backend}", {", ".join(map(str, numbers))}, {pointer}}}')
    yield from _write_array("const polyvit_row polyvit_rows[]", rows)
    yield f"const size_t polyvit_num_rows = {len(entries)};"
    archs = sorted({arch for tile in TABLE for arch in tile.archs})
    yield from _write_array("const int32_t polyvit_archs[]", map(str, archs))
    yield f"const size_t polyvit_num_archs = {len(archs)};"


def _write_array(name: str, values: Iterable[str]) -> Iterator[str]:
    yield f"{name} = {{"
    yield from (f"    {value}," for value in values)
    yield "};"


def _list_lookups(entries: Sequence[CompiledTile]) -> Iterator[str]:
    """Lines of op, dtype, arch, tokens, features and the index of the row that `tiles.pick` takes, −1 where the library has none."""
    indices = {(id(entry.tile), entry.dtype, entry.arch): index for index, entry in enumerate(entries) if entry.kernels}
    ops = sorted({tile.op for tile in TABLE})
    known = sorted({arch for tile in TABLE for arch in tile.archs})
    archs = sorted({known[0] - 5, *known, *(arch + 1 for arch in known)})
    for op in (*ops, "attention_sideways"):
        rows = [tile for tile in TABLE if tile.op == op]
        tokens = _list_neighbours(size for tile in rows for size in tile.tokens)
        features = _list_neighbours(tile.features for tile in rows)
        for dtype, arch, count, width in product(tiles.DTYPES, archs, tokens, features):
            tile = tiles.pick(op, arch, dtype, tokens=count, features=width, portable=True)
            older = max((a for a in known if a <= arch), default=0)
            index = indices.get((id(tile), tiles.DTYPES[dtype], older), -1) if tile.backend == "triton" else -1
            yield f"{op} {tiles.DTYPES[dtype]} {arch} {count} {width} {index}"


def _list_neighbours(sizes: Iterable[int]) -> list[int]:
    """The sizes, with those one below and one above."""
    return sorted({1} | {near for size in sizes for near in (size - 1, size, size + 1) if near > 0})
