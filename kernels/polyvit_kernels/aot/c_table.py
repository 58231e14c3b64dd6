"""The tile table and its images as the C library holds them (`csrc/polyvit_table.h`), with the lookups that its test repeats.

Rows of other backends than triton are left out: Hopper's own kernels take tensor descriptors, which the library does not make.
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


def write(folder: Path, entries: Sequence[CompiledTile], images: Sequence[CompiledKernel]) -> None:
    """`polyvit_table.c`, `polyvit_cubins.bin` and `lookups.txt`: the same bytes for the same table and images.

    The images may differ: for sm_100, ptxas itself does not repeat its bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, images = _portable(entries, images)
    cubins = [image.cubin + b"\0" * (-len(image.cubin) % _ALIGNMENT) for image in images]
    (folder / "polyvit_cubins.bin").write_bytes(b"".join(cubins))
    (folder / "polyvit_table.c").write_text("\n".join(_source(entries, images, [len(cubin) for cubin in cubins])) + "\n")
    (folder / "lookups.txt").write_text("\n".join(_lookups(entries)) + "\n")


def _portable(entries: Sequence[CompiledTile], images: Sequence[CompiledKernel]) -> tuple[list[CompiledTile], list[CompiledKernel]]:
    """The rows that the library holds, and the images that they need."""
    kept = [entry for entry in entries if entry.tile.backend == "triton"]
    numbers = {old: new for new, old in enumerate(sorted({place for entry in kept for place in entry.kernels}))}
    return [replace(entry, kernels=tuple(numbers[k] for k in entry.kernels)) for entry in kept], [images[k] for k in numbers]


def _source(entries: Sequence[CompiledTile], images: Sequence[CompiledKernel], sizes: Sequence[int]) -> Iterator[str]:
    yield "/* Written by python -m polyvit_kernels.aot. */"
    yield '#include "polyvit_table.h"'
    offset, kernels = 0, []
    for place, (image, size) in enumerate(zip(images, sizes, strict=True)):
        parameters = (f'{{"{p.name}", "{p.type}", {p.multiple}}}' for p in image.parameters)
        yield from _array(f"static const polyvit_parameter parameters_{place}[]", parameters)
        yield from _array(f"static const polyvit_constant constants_{place}[]", (f'{{"{n}", "{v}"}}' for n, v in image.constants.items()))
        numbers = (image.arch, image.num_warps, image.shared, image.usage.registers, len(image.parameters), len(image.constants))
        arrays = f"parameters_{place}, constants_{place}, polyvit_cubins + {offset}, {len(image.cubin)}"
        kernels.append(f'{{"{image.name}", {", ".join(map(str, numbers))}, {arrays}}}')
        offset += size
    yield from _array("const polyvit_kernel polyvit_images[]", kernels)
    yield f"const size_t polyvit_num_images = {len(images)};"
    rows = []
    for place, entry in enumerate(entries):
        if entry.kernels:
            yield from _array(f"static const polyvit_kernel *const kernels_{place}[]", (f"&polyvit_images[{k}]" for k in entry.kernels))
        tile = entry.tile
        numbers = (entry.arch, *tile.tokens, tile.features, len(entry.kernels))
        pointer = f"kernels_{place}" if entry.kernels else "NULL"
        rows.append(f'{{"{tile.op}", "{entry.dtype}", "{tile.backend}", {", ".join(map(str, numbers))}, {pointer}}}')
    yield from _array("const polyvit_row polyvit_rows[]", rows)
    yield f"const size_t polyvit_num_rows = {len(entries)};"
    archs = sorted({arch for tile in TABLE for arch in tile.archs})
    yield from _array("const int32_t polyvit_archs[]", map(str, archs))
    yield f"const size_t polyvit_num_archs = {len(archs)};"


def _array(name: str, values: Iterable[str]) -> Iterator[str]:
    yield f"{name} = {{"
    yield from (f"    {value}," for value in values)
    yield "};"


def _lookups(entries: Sequence[CompiledTile]) -> Iterator[str]:
    """Lines of op, dtype, arch, tokens, features and the place of the row that `tiles.pick` takes, −1 where the library has none."""
    places = {(id(entry.tile), entry.dtype, entry.arch): place for place, entry in enumerate(entries) if entry.kernels}
    ops = sorted({tile.op for tile in TABLE})
    known = sorted({arch for tile in TABLE for arch in tile.archs})
    archs = sorted({known[0] - 5, *known, *(arch + 1 for arch in known)})
    for op in (*ops, "attention_sideways"):
        rows = [tile for tile in TABLE if tile.op == op]
        tokens = _around(size for tile in rows for size in tile.tokens)
        features = _around(tile.features for tile in rows)
        for dtype, arch, count, width in product(tiles.DTYPES, archs, tokens, features):
            tile = tiles.pick(op, arch, dtype, tokens=count, features=width, portable=True)
            older = max((a for a in known if a <= arch), default=0)
            place = places.get((id(tile), tiles.DTYPES[dtype], older), -1) if tile.backend == "triton" else -1
            yield f"{op} {tiles.DTYPES[dtype]} {arch} {count} {width} {place}"


def _around(sizes: Iterable[int]) -> list[int]:
    """The sizes, with those one below and one above."""
    return sorted({1} | {near for size in sizes for near in (size - 1, size, size + 1) if near > 0})
