"""The tuner's writing and telling, on real files, and its command without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tune
from candidates import CASES, label
from contest import Outcome

from polyvit_kernels import tiles
from polyvit_kernels.tiles import Tile
from polyvit_kernels.tiles import table as tile_table

SCRIPT = Path(tune.__file__)
CASE = CASES["attention"][0]
JOB = tune.job_of(CASE, "attention", (), is_small=False)
OLD = tune.row_in_use(CASE, 90, portable=True)
NEW = Tile(op=CASE.op, archs=(), blocks={**OLD.blocks, "BLOCK_M": 128}, num_warps=8)


def outcome(new=NEW, **seconds):
    return Outcome(job=JOB, old=OLD, new=new, seconds={label(OLD): [5e-5] * 3, label(NEW): [4e-5] * 3} | seconds, refused={"x": "spills"})


@pytest.fixture
def place(tmp_path):
    table = tmp_path / "tile_table.py"
    table.write_text(Path(tile_table.__file__).read_text())
    tune.rewrite(table, ())
    return tune.Place(table=table, folder=tmp_path / "nvidia-h200")


def test_an_outcome_becomes_a_row_and_a_record(place):
    tune.write(outcome(), 90, place)
    (row,) = tune.read_rows(place.table)
    assert (row.op, row.archs, row.tokens, row.features, row.dtypes) == (CASE.op, (90,), (193, 208), 64, ("bf16", "fp16"))
    assert (row.blocks, row.num_warps, row.source) == (NEW.blocks, 8, "nvidia-h200/tuning.json")
    (found,) = json.loads(place.results.read_text())["cases"]
    assert (found["old_us"], found["new_us"], found["refused"]) == (50.0, 40.0, {"x": "spills"})
    assert found["seconds"][label(NEW)] == [4e-5] * 3


def test_a_second_run_replaces_rows_and_records_of_this_card_only(place):
    tune.write(outcome(), 90, place)
    tune.write(outcome(), 80, tune.Place(table=place.table, folder=place.folder.parent / "nvidia-a100"))
    tune.write(outcome(new=OLD), 90, place)
    assert [(row.archs, row.blocks) for row in tune.read_rows(place.table)] == [((80,), NEW.blocks), ((90,), OLD.blocks)]
    (found,) = json.loads(place.results.read_text())["cases"]
    assert found["new"] == label(OLD)


def test_no_row_is_written_where_nothing_was_right_or_the_long_kernel_is_faster(place):
    text = place.table.read_text()
    tune.write(outcome(new=None), 90, place)
    tune.write(outcome(new=Tile(op="attention_long_forward", archs=(90,), blocks=NEW.blocks)), 90, place)
    assert place.table.read_text() == text


def test_old_and_new_are_told_in_a_line():
    assert tune.line(outcome()) == (
        f"attention_short_forward 128×197×12×64: {label(OLD)} 50.0 us → {label(NEW)} 40.0 us (1.25 times as fast); "
        "2 raced to the end, 1 refused"
    )
    assert tune.line(outcome(new=OLD)).startswith(f"attention_short_forward 128×197×12×64: stays {label(OLD)} 50.0 us")
    assert "no candidate is right" in tune.line(outcome(new=None))


def test_time_is_shared_and_what_is_left_goes_on():
    begin = time.monotonic()
    ends = dict(tune.deadlines(["attention", "mlp", "update"], 150))
    assert ends["attention"] - begin == pytest.approx(80, abs=1)
    assert ends["mlp"] - begin == pytest.approx(150 * 6 / 7, abs=1)
    assert ends["update"] - begin == pytest.approx(150, abs=1)


def test_where_there_is_no_short_row_the_long_kernel_is_what_is_in_use():
    assert tune.row_in_use(CASES["attention"][1], 120).op == "attention_long_backward"
    assert tune.row_in_use(CASES["attention"][1], 80).op == "attention_short_backward"


def test_a_card_that_the_table_does_not_know_is_not_tuned():
    assert tune.known(90)
    assert not tune.known(103)
    assert tiles.pick("sgd_update", 103, next(iter(tiles.DTYPES))).archs  # it takes an older card's rows


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_without_a_gpu_the_command_says_so():
    if tune.card.HAS_GPU:
        pytest.skip("there is one")
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA GPU" in done.stderr


def test_help_says_what_is_written_and_what_holds_unless_told_otherwise():
    done = run("--help")
    text = " ".join(done.stdout.split())
    assert not done.returncode
    for words in (
        "tile_table.py",
        "<card>/tuning.json",
        "start no new case after this many seconds (default: 180)",
        "--dry-run print what",
    ):
        assert words in text
