"""Every benchmark, run on a CPU at tiny sizes by the command that people run."""

import json
import subprocess
import sys
from pathlib import Path

import machine
import pytest
from harness import OURS, read_rows
from long_forms import mark_long

HERE = Path(machine.__file__).parent
WHOLE = ("step", "data", "train")
KERNELS = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py")) if path.stem.removeprefix("bench_") not in WHOLE]


def run(folder, *subjects):
    files = [str(HERE / f"bench_{subject}.py") for subject in subjects]
    written = ("--rows", str(folder / "rows.jsonl"), f"--benchmark-json={folder / 'all.json'}")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tiny", "--rounds=1", "--calls=1", *written, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout, read_rows(folder / "rows.jsonl"), json.loads((folder / "all.json").read_text())["benchmarks"]


TITLES = {
    "attention": ("attention",),
    "linear": ("fc1 + GELU",),
    "mlp": ("MLP + residual",),
    "layer_norm": ("add + LayerNorm",),
    "patch_embed": ("patch embed",),
    "update": ("AdamW",),
    "schedule": ("plan, weighted", "learning rate"),
    "cross_entropy": (),  # without a candidate of ours
}


@pytest.mark.parametrize("subjects", mark_long([("attention", "schedule"), KERNELS], [("attention", "schedule")]), ids=["few", "all"])
def test_kernels_and_schedules(tmp_path, subjects):
    printed, rows, benchmarks = run(tmp_path, *subjects)
    groups = {row.group for row in rows if row.candidate == OURS}
    for title in (title for subject in subjects for title in TITLES[subject]):
        assert any(group.startswith(title) for group in groups), title
    assert any(row.group.startswith("soft cross-entropy") for row in rows) == ("cross_entropy" in subjects)
    assert {(row.group, row.candidate): row.seconds for row in rows} == {
        (each["group"], each["extra_info"]["candidate"]): each["stats"]["data"] for each in benchmarks
    }
    attention = next(each["extra_info"] for each in benchmarks if each["group"].startswith("attention"))
    assert {"tflops", "gb_per_second", "mfu", "device", "clocks", "versions"} <= attention.keys()
    assert any(line.startswith("  eager") and "ours / it" in line for line in printed.splitlines())


@pytest.mark.long
@pytest.mark.parametrize("subject", WHOLE)
def test_whole_steps_loops_and_decoding(tmp_path, subject):
    _, rows, benchmarks = run(tmp_path, subject)
    assert {row.candidate for row in rows} >= {OURS}
    assert len(benchmarks) == len(rows)
    expected = {"step": ("HF ViT", "each task apart"), "data": ("DALI alone", "DataLoader, PyAV"), "train": ()}[subject]
    assert {row.candidate for row in rows} >= set(expected)
