"""Rows written into a copy of the real table, and read back by importing it."""

import ast
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tune

from polyvit_kernels.tiles import ANY, Tile
from polyvit_kernels.tiles import table as tile_table

SOURCE = Path(tile_table.__file__)
SHORT = Tile(
    op="attention_short_forward",
    archs=(90,),
    tokens=(193, 208),
    features=64,
    blocks={"BLOCK_D": 64, "BLOCK_M": 128, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0},
    num_warps=8,
    source="nvidia-h200/tuning.json",
)
LONG = Tile(
    op="attention_long_backward",
    archs=(90,),
    tokens=(2001, ANY),
    features=64,
    blocks={"BLOCK_D": 128, "BLOCK_M": 128, "BLOCK_N": 128, "KEYS_M": 128, "KEYS_N": 128},
    num_warps=16,
    num_stages=5,
    source="nvidia-rtx-pro-6000-blackwell-workstation-edition/tuning.json",
)
BACKEND = Tile(op="attention", archs=(90,), tokens=(257, 800), features=64, backend="flash", source="nvidia-h200/tuning.json")
UPDATE = Tile(op="sgd_update", archs=(90,), dtypes=("fp32",), blocks={"BLOCK": 4096}, num_warps=8, source="nvidia-h200/tuning.json")
BY_TORCH = Tile(op="linear_add_forward", archs=(90,), tokens=(1, 1024), backend="torch", source="nvidia-h200/tuning.json")
IN_GLUON = Tile(
    op="attention_short_forward",
    archs=(90,),
    tokens=(1, 192),
    features=64,
    backend="hopper",
    max_registers=168,
    programs_per_sm=3,
    allowed_spills=4,
    source="nvidia-h200/tuning.json",
)
LINEAR_IN_GLUON = Tile(
    op="linear_gelu_forward",
    archs=(90,),
    tokens=(1025, ANY),
    backend="hopper",
    blocks={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "REGISTERS": 160},
    max_registers=168,
    source="nvidia-rtx-pro-6000-blackwell-workstation-edition/tuning.json",
)
ROWS = (SHORT, LONG, BACKEND, UPDATE, BY_TORCH, IN_GLUON, LINEAR_IN_GLUON)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tile_table.py"
    path.write_text(SOURCE.read_text())
    tune.rewrite(path, ())
    return path


def lines_outside(path):
    text = path.read_text()
    (place,) = (node for node in ast.parse(text).body if isinstance(node, ast.Assign) and tune._assigns(node))
    lines = text.splitlines()
    return lines[: place.lineno - 1], lines[place.end_lineno :]


def test_rows_come_back_and_every_other_line_stays(table):
    before, text = lines_outside(table), table.read_text()
    tune.rewrite(table, ROWS)
    assert tune.read_rows(table) == ROWS
    assert lines_outside(table) == before
    tune.rewrite(table, ROWS[:1])
    assert tune.read_rows(table) == ROWS[:1]
    tune.rewrite(table, ())
    assert table.read_text() == text
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_the_rewritten_table_passes_the_formatter_and_the_linter(table):
    pytest.importorskip("ruff")
    tune.rewrite(table, ROWS)
    settings = ["--config", str(SOURCE.parents[2] / "pyproject.toml")]
    for command in (["format", "--check"], ["check", "--select", "E,F,W,I"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *settings, str(table)], capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr


def test_the_table_chooses_measured_rows_for_their_calls_and_no_others(table):
    def first(rows, op, arch, dtype, *sizes):
        return next(row for row in rows if row.op == op and arch in row.archs and dtype in row.dtypes and row.fits(*sizes))

    written = runpy.run_path(str(table))["TABLE"]
    tune.rewrite(table, (SHORT, UPDATE))
    rows = runpy.run_path(str(table))["TABLE"]
    assert first(rows, "attention_short_forward", 90, "bf16", 197, 64) == SHORT
    assert first(rows, "sgd_update", 90, "fp32", 1, 1) == UPDATE
    for call in (
        ("attention_short_forward", 90, "bf16", 192, 64),
        ("attention_short_forward", 90, "bf16", 197, 32),
        ("attention_short_forward", 90, "bf16", 197, 80),
        ("attention_short_forward", 80, "bf16", 197, 64),
        ("sgd_update", 100, "fp32", 1, 1),
    ):
        assert first(rows, *call) == first(written, *call)


def test_a_card_replaces_its_own_rows_of_the_same_calls_only():
    other_card, classes = replace(SHORT, archs=(80,)), {tune.class_of(row) for row in ROWS}
    better = replace(SHORT, num_warps=4)
    assert tune.merged((other_card, *ROWS), [better], 90, classes) == tuple(
        sorted((other_card, better, *ROWS[1:]), key=lambda row: (row.archs, row.op, row.features, row.tokens))
    )


def test_rows_of_calls_that_are_no_more_go():
    classes = {tune.class_of(row) for row in (LONG, UPDATE)}
    found = tune.merged((replace(SHORT, archs=(80,)), *ROWS), [UPDATE], 90, classes)
    assert set(map(tune.class_of, found)) == {tune.class_of(row) for row in (SHORT, LONG, UPDATE)}
    assert [row.archs for row in found if row.op == SHORT.op] == [(80,)]
