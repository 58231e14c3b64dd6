"""Which candidate wins and which are refused, and that the table gives what was written: kernels are launched in Triton's interpreter."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import machine
import pytest
import torch
import tune
from launchers import KERNELS
from tune import CASES, TileCase, TuningOutcome, label

from polyvit_kernels.tiles import Tile, load_rows

pytestmark = pytest.mark.skipif(machine.HAS_GPU, reason="the sizes are those of the interpreter")

ALL = [case for cases in CASES.values() for case in cases]
SGD = next(case for case in ALL if case.op == "sgd_update")
SCRIPT = Path(tune.__file__)


def find_case(op: str) -> TileCase:
    """The first of an operation, at its smallest."""
    return next(case for case in ALL if case.op == op)


@pytest.mark.parametrize("op", sorted({case.op for case in ALL}))
def test_rows_in_use_are_right(op):
    case = find_case(op)
    inputs = KERNELS[op].inputs(case.small, torch.float32)
    assert tune.find_faults(KERNELS[op], inputs, [case.row_in_use()], torch.float32) == {}


def test_a_candidate_that_leaves_keys_out_or_lacks_a_block_is_refused():
    case = next(case for case in ALL if case.op == "attention_short_forward" and case.size[1] == 197)
    right = case.row_in_use()
    wrong = replace(right, blocks={**right.blocks, "KEYS_1": 0, "KEYS_2": 0})
    broken = replace(right, blocks={})
    inputs = KERNELS[case.op].inputs(case.small, torch.float32)
    faults = tune.find_faults(KERNELS[case.op], inputs, [right, wrong, broken], torch.float32)
    assert faults.keys() == {label(wrong), label(broken)}
    assert "result 0: error" in faults[label(wrong)]
    assert "KeyError" in faults[label(broken)]


def test_the_fastest_wins_but_the_row_in_use_gives_way_for_one_percent_only():
    us = {"a": 3.0, "b": 1.0, "c": 1.009}
    assert tune.rank(us, in_use="a") == ["b", "c", "a"]
    assert tune.rank(us, in_use="c") == ["c", "b", "a"]
    assert tune.rank(us, in_use="refused") == ["b", "c", "a"]
    assert tune.rank({}, in_use="a") == []


def test_candidates_are_the_row_in_use_and_others_with_blocks_that_its_kernel_has():
    for case in ALL:
        first, *others = tune.list_candidates(case)
        assert label(first) == label(case.row_in_use())
        assert len({label(row) for row in (first, *others)}) == 1 + len(others)
        assert case.op == "attention" or others
        assert all(row.blocks.keys() == first.blocks.keys() for row in others if row.backend == first.backend)


def test_a_wrong_row_in_use_is_replaced(monkeypatch):
    wrong = Tile(op="sgd_update", archs=(90,), dtypes=("fp32",), blocks={"BLOCK": 3})  # a block must be a power of two
    monkeypatch.setattr(TileCase, "row_in_use", lambda self: wrong)
    outcome = tune.decide(SGD, is_small=True, most_candidates=2)
    assert label(wrong) in outcome.refused
    assert outcome.new is not None
    assert outcome.new.blocks["BLOCK"] > 3


PICK = """
import torch
from polyvit_kernels import tiles
row = tiles.pick("sgd_update", 90, torch.float32)
print(row.blocks["BLOCK"], row.num_warps, row.source)
print(tiles.pick("sgd_update", 80, torch.float32).source)
"""


def test_the_table_gives_what_was_written(tmp_path):
    packages = tmp_path / "packages"
    shutil.copytree(machine.ROOT / "kernels" / "polyvit_kernels", packages / "polyvit_kernels")
    measured = packages / "polyvit_kernels" / "tiles" / "measured" / "new.json"
    chosen = replace(SGD.row_in_use(), blocks={"BLOCK": 2048}, num_warps=8)
    us = {label(SGD.row_in_use()): 50.0, label(chosen): 40.0}
    results = tmp_path / "nvidia-new" / "tuning.json"
    for new in (SGD.row_in_use(), chosen):  # the second replaces the first
        tune.write(TuningOutcome(case=SGD, old=SGD.row_in_use(), new=new, us=us, refused={"x": "spills"}), measured, results, 90)
    [row] = load_rows(measured)
    assert (row.op, row.archs, row.dtypes, row.blocks) == ("sgd_update", (90,), ("fp32",), {"BLOCK": 2048})
    [found] = json.loads(results.read_text())["cases"]
    assert (found["chosen"], found["us"], found["refused"]) == (label(chosen), us, {"x": "spills"})
    done = subprocess.run([sys.executable, "-c", PICK], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(packages)})
    assert done.stdout.splitlines() == ["2048 8 nvidia-new/tuning.json", "compiled"], done.stderr


def test_the_command_decides_writes_and_says_so(tmp_path, capsys):
    files = {"--measured": tmp_path / "new.json", "--results": tmp_path / "nvidia-new" / "tuning.json"}
    options = [str(word) for pair in files.items() for word in pair]
    assert tune.main(["--small", "--ops", "update", *options]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}_update" in printed for name in ("adamw", "sgd"))
    assert "3 timed, 0 refused" in printed
    assert {row.op for row in load_rows(files["--measured"])} == {"adamw_update", "sgd_update"}
    assert tune.main(["--small", "--ops", "update", "--seconds", "0", *options]) == 0
    assert "sgd_update 86567656: no time was left" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_so(capsys):
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_file_of_rows_has_the_name_of_the_model():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "nvidia-geforce-rtx-4090"}
    assert {name: machine.shorten(name) for name in names} == names
