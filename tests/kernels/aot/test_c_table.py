"""What the C library is made of."""

import json
from dataclasses import replace

from polyvit_kernels.aot import c_table
from polyvit_kernels.aot.compiled_kernel import CompiledKernel, Parameter
from polyvit_kernels.aot.cubin import Usage
from polyvit_kernels.aot.jobs import BACKEND_CHOICE, CompiledTile
from polyvit_kernels.tiles.table import TABLE

FILES = ("polyvit_table.c", "polyvit_cubins.bin", "lookups.txt")


def image(cubin):
    usage = Usage(registers=77, stack=0, spill_stores=0, spill_loads=0, inner_spills=0, tensor={})
    parameters = (Parameter(name="p_x", type="*bf16", multiple=16), Parameter(name="eps", type="fp32", multiple=1))
    constants = {"WIDTH": "768", "p_residual": "none"}
    sizes = {"arch": 90, "num_warps": 8, "num_stages": 1, "shared": 2048, "columns": 0}
    return CompiledKernel(
        name="k", parameters=parameters, constants=constants, usage=usage, multiplies=False, messages=(), cubin=cubin, **sizes
    )


def test_the_same_table_gives_the_same_bytes(tmp_path):
    tile = next(tile for tile in TABLE if tile.op == "layer_norm_forward")
    entries = [CompiledTile(tile=tile, dtype="bf16", arch=90, kernels=(1, 0)), CompiledTile(tile=tile, dtype="fp16", arch=90, kernels=())]
    for name in ("one", "two"):
        c_table.write(tmp_path / name, entries, [image(b"abc"), image(b"d" * 65)])
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "polyvit_cubins.bin").read_bytes() == b"abc".ljust(64, b"\0") + (b"d" * 65).ljust(128, b"\0")
    source = (tmp_path / "one" / "polyvit_table.c").read_text()
    assert '{"k", 90, 8, 2048, 77, 2, 2, parameters_1, constants_1, polyvit_cubins + 64, 65},' in source
    assert f'{{"layer_norm_forward", "bf16", "triton", 90, 1, {1 << 30}, {tile.features}, 2, kernels_0}},' in source
    assert f'{{"layer_norm_forward", "fp16", "triton", 90, 1, {1 << 30}, {tile.features}, 0, NULL}},' in source


def test_hoppers_own_kernels_are_left_out(tmp_path):
    tile = next(tile for tile in TABLE if tile.op == "layer_norm_forward")
    rows = [(replace(tile, backend="hopper"), (0, 2)), (tile, (3, 1))]
    entries = [CompiledTile(tile=tile, dtype="bf16", arch=90, kernels=kernels) for tile, kernels in rows]
    c_table.write(tmp_path / "all", entries, [image(letter * 64) for letter in (b"a", b"b", b"c", b"d")])
    c_table.write(tmp_path / "portable", [replace(entries[1], kernels=(1, 0))], [image(letter * 64) for letter in (b"b", b"d")])
    for name in FILES:
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "portable" / name).read_bytes()


def test_every_row_is_looked_up_at_its_borders(table_folder, compiled_rows):
    lines = (table_folder / "lookups.txt").read_text().split("\n")
    lookups = {tuple(line.split()[:5]): int(line.split()[5]) for line in lines if line}
    for tile in (tile for tile in compiled_rows if 90 in tile.archs and "bf16" in tile.dtypes):
        for tokens in {*tile.tokens, tile.tokens[1] + 1}:
            for features in (tile.features, tile.features + 1):
                assert (tile.op, "bf16", "90", str(tokens), str(features)) in lookups
    assert {index for index in lookups.values() if index >= 0} == set(range(max(lookups.values()) + 1))
    for missing in ("attention_sideways", BACKEND_CHOICE):
        assert {index for key, index in lookups.items() if key[0] == missing} == {-1}
    assert {index for key, index in lookups.items() if key[2] == "75"} == {-1}


def test_the_images_are_what_the_table_says(table_folder):
    records = json.loads((table_folder / "table.json").read_text())
    assert (table_folder / "polyvit_cubins.bin").stat().st_size >= max(record["bytes"] for record in records)
    assert (table_folder / "polyvit_cubins.bin").read_bytes()[:4] == b"\x7fELF"
