"""Every row of the tile table, compiled for GPUs that are not there."""

import json
import sys

import pytest
from ahead_of_time import run_python
from triton import knobs

from polyvit_kernels.aot import library, listing, main
from polyvit_kernels.aot.compiled_kernel import SHARED_BYTES
from polyvit_kernels.aot.jobs import BACKEND_CHOICE
from polyvit_kernels.tiles.table import TABLE

TENSOR_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

# These rows instead of the table.
ROWS = """
from polyvit_kernels.aot import main
from polyvit_kernels.tiles import Tile
main.TABLE = tuple(Tile(**row) for row in {rows})
main.main()
"""
FORWARD = {"BLOCK_D": 64, "BLOCK_M": 64, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0}
SPILLING = {"op": "attention_short_forward", "archs": (80,), "features": 64, "blocks": FORWARD | {"BLOCK_M": 128}}
# This row was in the table: 232 registers, no spill, and wgmma one after the other.
ADVISED = {
    "op": "attention_short_backward",
    "archs": (90,),
    "features": 64,
    "blocks": {"BLOCK_D": 64, "BLOCK_M": 256, "BLOCK_N": 32},
    "num_warps": 8,
    "num_stages": 2,
}
IMPOSSIBLE = {"op": "attention_short_forward", "archs": (80,), "features": 64, "blocks": FORWARD, "num_warps": 3}


def compile_rows(*rows, options):
    return run_python("-c", ROWS.format(rows=rows), "--dtype", "bf16", *options)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """The command in this process: (its status or message, what it printed, its errors)."""

    def run(*options, interpret=False):
        monkeypatch.setattr(knobs.runtime, "interpret", interpret)
        monkeypatch.setattr(sys, "argv", ["aot", *map(str, options)])
        status = 0
        try:
            main.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def records(table_folder):
    path = table_folder / "table.json"
    assert path.exists(), (table_folder / "stderr").read_text()
    found = json.loads(path.read_text())
    assert found, (table_folder / "stderr").read_text()
    return found


def name(record):
    constants = " ".join(f"{key}={value}" for key, value in record["constants"].items())
    return f"{record['op']} sm_{record['arch']} {record['kernel']} {constants}"


def test_every_row_is_compiled_for_every_gpu_that_it_serves(records, compiled_rows):
    wanted = {
        (tile.op, tile.tokens, tile.features, arch)
        for tile in compiled_rows
        for arch in main.ARCHS
        if tile.backend in ("triton", "hopper") and tile.op != BACKEND_CHOICE and arch in tile.archs
    }
    assert {(r["op"], tuple(r["tokens"]), r["features"], r["arch"]) for r in records} == wanted
    assert {r["arch"] for r in records} == set(main.ARCHS)


def test_nothing_spills_but_what_a_row_names_outside_of_inner_loops(records):
    named = {(tile.op, tile.tokens, tile.features, tile.backend) for tile in TABLE if tile.allowed_spills}
    spilling = [
        name(r)
        for r in records
        if r["inner_spills"]
        or (
            (r["spill_stores"] or r["spill_loads"] or r["stack"])
            and (r["op"], tuple(r["tokens"]), r["features"], r["backend"]) not in named
        )
    ]
    assert not spilling, "\n".join(spilling)


def test_an_sm_has_room_for_as_many_programs_as_a_row_says(records):
    assert not [name(r) for r in records if r["programs"] < r["programs_per_sm"]]


def test_every_kernel_fits_the_gpu(records):
    too_large = [
        f"{name(r)}: {r['registers']} registers, {r['shared']} bytes, {r['columns']} columns"
        for r in records
        if r["registers"] > 255 or r["registers"] * 32 * r["warps"] > 65536 or r["shared"] > SHARED_BYTES[r["arch"]] or r["columns"] > 512
    ]
    assert not too_large, "\n".join(too_large)


def test_ptxas_has_nothing_to_say(records):
    advised = [f"{name(r)}: {message}" for r in records for message in r["messages"]]
    assert not advised, "\n".join(advised)


def test_matrices_are_multiplied_by_the_tensor_cores_own_instructions(records):
    without = [f"{name(r)}: {r['tensor']}" for r in records if r["multiplies"] and not r["tensor"].get(TENSOR_INSTRUCTION[r["arch"]])]
    assert not without, "\n".join(without)
    multiplying = {r["op"] for r in records if r["multiplies"]}
    assert {op for op in multiplying if op.startswith("attention")} == {
        f"attention_{length}_{direction}" for length in ("short", "long") for direction in ("forward", "backward")
    }
    assert {"linear_gelu_forward", "linear_add_forward", "dgelu_backward"} <= multiplying


def test_the_command_succeeds_and_prints_a_line_per_kernel(records, table_folder):
    lines = (table_folder / "stdout").read_text().splitlines()
    assert len(lines) == len(records) + 2
    assert tuple(lines[0].split()) == listing.HEADINGS
    assert lines[-1].endswith(" 0 failures"), (table_folder / "stderr").read_text()


@pytest.mark.long
def test_kernels_beyond_the_budget_are_named_and_marked_in_the_table(tmp_path):
    done = compile_rows(SPILLING, ADVISED, options=("--arch", 80, 90, "--json", tmp_path / "table.json"))
    assert done.returncode == 1
    assert "beyond the budget:" in done.stderr
    name = "attention_short_forward triton bf16 sm_80, tokens any, features 64, 255 registers, attention_short_fwd_kernel HEAD_DIM=64"
    assert name in done.stderr
    assert "spill stores" in done.stderr
    headings, _, line, totals = done.stdout.splitlines()
    assert "messages" in headings
    assert "  (C7515) Potential Performance Loss  " in line
    assert totals.endswith(" 2 failures")
    (_, record) = json.loads((tmp_path / "table.json").read_text())
    (message,) = record["messages"]
    assert message in done.stderr
    assert message.startswith("(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized")


def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    done = compile_rows(IMPOSSIBLE, options=("--arch", 80, "--out", tmp_path / "table"))
    assert done.returncode == 1
    assert "attention_short_forward bf16 sm_80 tokens 1..1073741824 features 64, kernel 0: " in done.stderr
    assert "num_warps must be a power of 2" in done.stderr
    assert not list((tmp_path / "table").iterdir())


def test_the_interpreter_is_refused(run_main):
    status, _, _ = run_main(interpret=True)
    assert status == "Triton's interpreter is chosen (TRITON_INTERPRET), which compiles nothing: unset it"


@pytest.mark.parametrize("name", ["70", "sm_70"])
def test_an_unknown_gpu_is_refused(name, run_main):
    status, _, errors = run_main("--arch", name)
    assert status == 2
    assert "invalid choice: 70" in errors


def test_a_gpu_is_named_as_a_number_or_as_nvidia_does():
    assert main._parser().parse_args(["--arch", "90", "sm_100"]).arch == [90, 100]


def test_where_nothing_can_be_written_is_refused_before_anything_is_compiled(tmp_path, run_main):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for option, path, message in (
        ("--out", tmp_path / "file", f"--out: {tmp_path / 'file'} is a file; a folder is needed"),
        ("--out", tmp_path / "file" / "a" / "b", f"--out: {tmp_path / 'file'} is a file; a folder is needed"),
        ("--json", tmp_path / "file" / "table.json", f"--json: {tmp_path / 'file'} is a file; a folder is needed"),
        ("--json", tmp_path / "folder", f"--json: {tmp_path / 'folder'} is a folder; a file is needed"),
    ):
        status, printed, errors = run_main(option, path)
        assert (status, printed) == (2, "")
        assert message in errors
        assert "compiled" not in errors.replace("compiled for", "")


def test_help_has_examples_and_defaults():
    text = " ".join(main._parser().format_help().split())
    for words in ("--out build/aot", "(default: 80 90 100 120)", "(default: bf16 fp16)", "90 or sm_90"):
        assert words in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


def test_a_library_elsewhere_is_listed(c_library, run_main):
    status, printed, errors = run_main("--library", c_library)
    assert not status, errors
    assert tuple(printed.splitlines()[0].split()) == library.HEADINGS
    assert "attention_short_fwd_kernel" in printed


def test_an_install_without_the_library_says_so(run_main):
    status, _, _ = run_main("--library")
    assert "was built without its C library (POLYVIT_AOT=1 pip wheel --no-deps .)" in status
