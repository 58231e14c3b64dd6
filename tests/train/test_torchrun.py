"""Whole runs of several real processes, as torchrun starts them."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import processes
import pytest
import torch
from fine_tuning import FROZEN, make_config, write_pictures
from tiny_runs import change

from polyvit_fast import cli, experiments
from polyvit_fast.config import Optim
from polyvit_fast.data.stream import DataError, Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.log import Log
from polyvit_fast.train.run import NonFiniteError
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.schedule import make_step_plan

ROOT = Path(__file__).parents[2]
# SGD, for AdamW divides by gradients that are zero but for rounding.
FLAGS = ("--optim.name", "sgd", "--optim.lr", "0.05", "--optim.warmup-steps", "2", "--log-every-steps", "8", "--compute-threads", "1")
LONG = ("--tasks.pictures.steps", "3000")
PATIENCE_SECONDS = 120
OTHER_RUNS = {"schedule": "accumulating", "sharded": True}
"""Of fine-tuning, besides the usual one."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.find_newest(folder)
    assert newest
    return newest.load_tensors("model")


def assert_equal_but_for_rounding(ours: Path, theirs: Path, start: dict[str, torch.Tensor], rounding: float = 1e-4) -> None:
    """The two runs' ways from `start` differ by less than `rounding` of their length."""
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    way = sum((b[name] - start[name]).square().sum() for name in b) ** 0.5
    apart = sum((a[name] - b[name]).square().sum() for name in b) ** 0.5
    assert way > 0.1
    assert apart < rounding * way, (apart, way)


def rows(folder: Path, kind: str) -> list[dict]:
    return [line for text in (folder / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == kind]


def run_smoke(folder: Path, changes: dict) -> None:
    optim = Optim(name="sgd", lr=0.05, warmup_steps=2)
    values = {"out": str(folder), "optim": optim, "log_every_steps": 8, "compute_threads": 1}
    config = change(experiments.load("smoke"), **(values | changes))
    train(config, "smoke", ["test"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process that the others are held to."""
    folder = tmp_path_factory.mktemp("alone")
    run_smoke(folder, {})
    return folder


@pytest.mark.parametrize(
    ("count", "changes", "rounding"),
    [
        pytest.param(2, {}, 1e-4, id="2"),
        pytest.param(4, {}, 1e-4, id="4", marks=pytest.mark.long),
        pytest.param(2, {"grad_reduce": "bf16"}, 2e-2, id="bf16", marks=pytest.mark.long),
        pytest.param(2, {"sharded": True, "recompute": True}, 1e-4, id="sharded", marks=pytest.mark.long),
    ],
)
def test_several_processes_are_one_with_the_same_batches(tmp_path, alone, count, changes, rounding):
    processes.run_processes(count, run_smoke, tmp_path, changes)
    assert_equal_but_for_rounding(tmp_path, alone, PolyViT.from_config(experiments.load("smoke")).state_dict(), rounding)
    for ours, theirs in zip(rows(tmp_path, "train"), rows(alone, "train"), strict=True):
        for name, row in theirs["tasks"].items():
            assert ours["tasks"][name]["loss"] == pytest.approx(row["loss"], rel=10 * rounding)
            assert ours["tasks"][name]["grad_norm"] == pytest.approx(row["grad_norm"], rel=20 * rounding)
            assert ours["tasks"][name]["clipped_ratio"] == row["clipped_ratio"]
    [ours], [theirs] = rows(tmp_path, "eval"), rows(alone, "eval")
    for name, row in theirs["tasks"].items():
        assert ours["tasks"][name]["num_examples"] == row["num_examples"]
        assert ours["tasks"][name]["loss"] == pytest.approx(row["loss"], rel=10 * rounding)


def tune(pictures: Path, folder: Path, changes: dict, stop_at: int = 0) -> None:
    """A run with every option of fine-tuning; with `stop_at` a signal stops it after so many steps."""
    tick = Log.tick

    def tick_and_signal(log: Log, done: int, task: str) -> None:
        tick(log, done, task)
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "tick", tick_and_signal)
        train(make_config(pictures, **({"out": str(folder)} | changes)), "test", ["test"])


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="weighted"), *(pytest.param({key: value}, id=key, marks=pytest.mark.long) for key, value in OTHER_RUNS.items())],
)
def test_fine_tuning_in_two_processes_is_that_of_one_and_resumes_to_the_bit(tmp_path, changes):
    pictures = tmp_path / "pictures"
    write_pictures(pictures)
    tune(pictures, tmp_path / "one", changes | {"sharded": False})
    for stop_at, folder in ((0, "two"), (5, "resumed"), (0, "resumed")):
        processes.run_processes(2, tune, pictures, tmp_path / folder, changes, stop_at)
    start = PolyViT.from_config(make_config(pictures)).state_dict()
    assert_equal_but_for_rounding(tmp_path / "two", tmp_path / "one", start)
    straight, resumed = weights(tmp_path / "two"), weights(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert "resumed from step 5" in (tmp_path / "resumed" / "log.txt").read_text()
    frozen = {name for name in start if any(fnmatchcase(name, pattern) for pattern in FROZEN)}
    assert {name for name in start if torch.equal(straight[name], start[name])} == frozen


def start_torchrun(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(processes.free_port())]
    command += ["--signals-to-handle", "SIGTERM,SIGUSR1", "-m", "polyvit_fast", "train", "smoke", "--out", str(folder), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_steps(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and bool(rows(folder, "train"))


@pytest.mark.long
def test_torchrun_itself_starts_an_accumulating_run(tmp_path):
    """And the plan of several tasks a step is the same too."""
    two = start_torchrun(tmp_path / "two", "--schedule", "accumulating")
    assert two.wait(PATIENCE_SECONDS) == 0
    run_smoke(tmp_path / "one", {"schedule": "accumulating"})
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in b)


@pytest.mark.long
def test_what_torchrun_hands_on_stops_all_and_meanwhile_another_run_is_refused(tmp_path):
    """torchrun hands SIGTERM, SIGINT and SIGHUP on by itself, others when it is asked to."""
    two = start_torchrun(tmp_path, *LONG)
    wait_for(lambda: has_steps(tmp_path))
    (first, message), (second, other) = processes.run_processes(2, run_command, tmp_path, *LONG)
    assert (first, second) == (2, 69)
    assert "is in use: process " in message
    assert "process 0 of the run failed; its own output says why" in other
    two.send_signal(signal.SIGUSR1)
    assert two.wait(PATIENCE_SECONDS) == 1  # torchrun's own code for a signal
    found = checkpoint.find_newest(tmp_path)
    assert found
    assert f"stopped by SIGUSR1 after step {found.step}; the checkpoint is saved" in (tmp_path / "log.txt").read_text()


def run_command(folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code of the command and what it prints."""
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
        return cli.run(["train", "smoke", "--out", str(folder), *FLAGS, *flags]), printed.getvalue()


def test_a_signal_to_one_process_stops_all_at_one_step_and_another_number_of_them_goes_on(tmp_path):
    with processes.start_processes(2) as both:
        both.submit(run_command, tmp_path, *LONG)
        wait_for(lambda: has_steps(tmp_path))
        os.kill(both.processes[1].pid, signal.SIGTERM)
        assert [code for code, _ in both.wait()] == [75, 75]
    found = checkpoint.find_newest(tmp_path)
    assert found
    assert 0 < found.step < 3000
    with processes.start_processes(1) as one:
        one.submit(run_command, tmp_path, *LONG)
        wait_for(lambda: rows(tmp_path, "train")[-1]["step"] > found.step)
        os.kill(one.processes[0].pid, signal.SIGINT)
        assert [code for code, _ in one.wait()] == [130]
    assert checkpoint.find_newest(tmp_path).step > found.step


def test_a_killed_process_ends_the_others_with_a_reason_and_a_checkpoint(tmp_path):
    with processes.start_processes(2) as both:
        both.submit(run_command, tmp_path, *LONG, "--save-every-steps", "100000")
        wait_for(lambda: has_steps(tmp_path))
        both.processes[1].kill()
        began = time.monotonic()
        (code, message), killed = both.wait()
    assert (code, killed) == (69, None)
    assert time.monotonic() - began < 60
    assert re.search(
        r"process 0, step \d+ \(task \w+\): another process of the run ended or cannot be reached .* goes on from the newest",
        " ".join(message.split()),
    )
    found = checkpoint.find_newest(tmp_path)
    assert found
    assert found.step > 0


def run_in_own_folder(folder: Path) -> str:
    with pytest.raises(ValueError, match="the run folder must be one that all processes see") as found:
        run_smoke(folder / os.environ["RANK"], {})
    return str(found.value)


def test_a_run_folder_that_not_all_processes_share_is_refused(tmp_path, alone):
    """Each process of this run has a folder of its own, and only the first one's holds a checkpoint."""
    shutil.copytree(alone, tmp_path / "0")
    first, second = processes.run_processes(2, run_in_own_folder, tmp_path)
    assert f"process 1 sees the checkpoint of step None in {tmp_path / '1'}, process 0 that of step 40" in second
    assert "process 0" in first


def run_diverging_on_one(folder: Path) -> str:
    """The second process has pictures that are not finite."""
    decode = Loader.load

    def poison(self: Loader, step: int):
        batch = decode(self, step)
        poisoned = os.environ["RANK"] == "1" and self.name == "pictures"
        return replace(batch, grid=torch.full_like(batch.grid, torch.nan, dtype=torch.float32)) if poisoned else batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "load", poison)
        with pytest.raises(NonFiniteError) as found:
            run_smoke(folder, {"nonfinite_patience": 3, "log_every_steps": 1000})
    return str(found.value)


def test_patience_ends_in_all_processes_with_the_same_step(tmp_path):
    messages = processes.run_processes(2, run_diverging_on_one, tmp_path)
    steps = [step for step, names in enumerate(make_step_plan(experiments.load("smoke"))) if names == ("pictures",)]
    for message in messages:
        assert f"task pictures: the loss or gradient was not finite in 3 of its steps in a row, the last one step {steps[2]} on" in message
    found = checkpoint.find_newest(tmp_path)
    assert found
    assert found.step == steps[2] + 1
    assert found.state["counters"][0][3:6] == [3.0, 3.0, steps[2]]


def run_broken_on_one(folder: Path) -> str:
    """The second process cannot read its files."""
    decode = Loader.load

    def fail_late(self: Loader, step: int):
        if os.environ["RANK"] == "1" and step == 7:
            raise DataError("task pictures: 5 of 100 files are broken")
        return decode(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "load", fail_late)
        with pytest.raises(DataError) as found:
            run_smoke(folder, {})
    return str(found.value)


def test_what_one_process_cannot_read_ends_all_with_its_reason_and_a_checkpoint(tmp_path):
    first, second = processes.run_processes(2, run_broken_on_one, tmp_path)
    assert (first, second) == ("process 1: task pictures: 5 of 100 files are broken", "task pictures: 5 of 100 files are broken")
    found = checkpoint.find_newest(tmp_path)
    assert found
    assert 0 < found.step < 40
