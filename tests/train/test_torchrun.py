"""Whole runs of several real processes, through the command line, as torchrun starts them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import processes
import pytest
import torch
from tiny_runs import change

from polyvit_fast import experiments
from polyvit_fast.config import Optim
from polyvit_fast.data.stream import DataError, Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loop import train
from polyvit_fast.train.run_folder import checkpoint

ROOT = Path(__file__).parents[2]
# SGD, for AdamW divides by gradients that are zero but for rounding.
FLAGS = ("--optim.name", "sgd", "--optim.lr", "0.05", "--optim.warmup-steps", "2", "--log-every-steps", "8", "--compute-threads", "1")
PATIENCE_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, folder: Path, *flags: str, files: Sequence[Path] = ()) -> list[subprocess.Popen]:
    """A run's processes with the environment that torchrun gives them, each with its output in a file of `files`."""
    command = [sys.executable, "-m", "polyvit_fast", "train", "smoke", "--out", str(folder), *FLAGS, *flags]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = []
    with ExitStack() as stack:
        for rank in range(count):
            env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            output = stack.enter_context(open(files[rank], "w")) if files else subprocess.DEVNULL
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    return started


def end(started: Sequence[subprocess.Popen]) -> list[int]:
    """Their exit codes; whoever still runs after a while is killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(folder)
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
    config = change(experiments.load("smoke"), out=str(folder), optim=optim, log_every_steps=8, compute_threads=1, **changes)
    train(config, "smoke", ["test"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process that the others are held to."""
    folder = tmp_path_factory.mktemp("alone")
    processes.started(1, run_smoke, folder, {})
    return folder


@pytest.mark.parametrize(
    ("count", "changes", "rounding"),
    [(2, {}, 1e-4), (4, {}, 1e-4), (2, {"grad_reduce": "bf16"}, 2e-2), (2, {"sharded": True, "recompute": True}, 1e-4)],
    ids=["2", "4", "bf16", "sharded"],
)
def test_several_processes_are_one_with_the_same_batches(tmp_path, alone, count, changes, rounding):
    processes.started(count, run_smoke, tmp_path, changes)
    assert_equal_but_for_rounding(tmp_path, alone, PolyViT.from_config(experiments.load("smoke")).state_dict(), rounding)
    for ours, theirs in zip(rows(tmp_path, "train"), rows(alone, "train"), strict=True):
        for name, row in theirs["tasks"].items():
            assert ours["tasks"][name]["loss"] == pytest.approx(row["loss"], rel=10 * rounding)
    [ours], [theirs] = rows(tmp_path, "eval"), rows(alone, "eval")
    for name, row in theirs["tasks"].items():
        assert ours["tasks"][name]["num_examples"] == row["num_examples"]
        assert ours["tasks"][name]["loss"] == pytest.approx(row["loss"], rel=10 * rounding)


def test_torchrun_itself_starts_an_accumulating_run(tmp_path):
    """And the plan of several tasks a step is the same too."""
    flags = ["--schedule", "accumulating", "--out", str(tmp_path / "two"), *FLAGS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    two = subprocess.Popen([*torchrun, "-m", "polyvit_fast", "train", "smoke", *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert end([two]) == [0]
    processes.started(1, run_smoke, tmp_path / "one", {"schedule": "accumulating"})
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in b)


def wait_for(condition, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_steps(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and bool(rows(folder, "train"))


LONG = ("--tasks.pictures.steps", "3000")


def test_a_signal_to_one_process_stops_all_at_one_step_and_another_number_of_them_goes_on(tmp_path):
    folder = tmp_path / "run"
    both = start(2, folder, *LONG)
    wait_for(lambda: has_steps(folder))
    both[1].send_signal(signal.SIGTERM)
    assert end(both) == [75, 75]
    found = checkpoint.newest(folder)
    assert found
    assert 0 < found.step < 3000
    one = start(1, folder, *LONG)
    wait_for(lambda: checkpoint.newest(folder).step > found.step)
    one[0].send_signal(signal.SIGINT)
    assert end(one) == [130]


def test_what_torchrun_hands_on_stops_all_and_meanwhile_another_run_is_refused(tmp_path):
    """torchrun hands SIGTERM, SIGINT and SIGHUP on by itself, others when it is asked to."""
    folder, files = tmp_path / "run", [tmp_path / "0.txt", tmp_path / "1.txt"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    torchrun += ["--signals-to-handle", "SIGTERM,SIGUSR1", "-m", "polyvit_fast", "train", "smoke", "--out", str(folder), *FLAGS, *LONG]
    two = subprocess.Popen(torchrun, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: has_steps(folder))
    assert end(start(2, folder, *LONG, files=files)) == [2, 69]
    assert "is in use: process " in files[0].read_text()
    assert "the first process of the run failed; it tells why" in files[1].read_text()
    two.send_signal(signal.SIGUSR1)
    assert end([two]) == [1]  # torchrun's own code for a signal
    found = checkpoint.newest(folder)
    assert found
    assert f"stopped by SIGUSR1 after step {found.step}; the checkpoint is saved" in (folder / "log.txt").read_text()


def test_a_killed_process_ends_the_others_with_a_reason_and_a_checkpoint(tmp_path):
    folder, files = tmp_path / "run", [tmp_path / "0.txt", tmp_path / "1.txt"]
    both = start(2, folder, *LONG, "--save-every-steps", "100000", files=files)
    wait_for(lambda: has_steps(folder))
    both[1].kill()
    began = time.monotonic()
    assert end(both) == [69, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    told = " ".join(files[0].read_text().split())
    assert re.search(
        r"process 0, step \d+ \(task \w+\): another process of the run ended or cannot be reached .* goes on from the newest", told
    )
    found = checkpoint.newest(folder)
    assert found
    assert found.step > 0


def run_in_own_folder(folder: Path) -> str:
    with pytest.raises(ValueError, match="the run folder must be one that all of them share") as found:
        run_smoke(folder / os.environ["RANK"], {})
    return str(found.value)


def test_a_run_folder_that_not_all_processes_share_is_refused(tmp_path, alone):
    """Each process of this run has a folder of its own, and only the first one's holds a checkpoint."""
    shutil.copytree(alone, tmp_path / "0")
    first, second = processes.started(2, run_in_own_folder, tmp_path)
    assert f"process 1 sees the checkpoint of step None in {tmp_path / '1'}, the first process that of step 40" in second
    assert "process 0" in first


def run_broken_on_one(folder: Path) -> str:
    """The second process cannot read its share of the files."""
    decode = Loader.load

    def fail_late(self: Loader, step: int):
        if os.environ["RANK"] == "1" and step == 7:
            raise DataError("task pictures: 5 of 100 files are broken")
        return decode(self, step)

    Loader.load = fail_late
    with pytest.raises(DataError) as found:
        run_smoke(folder, {})
    return str(found.value)


def test_what_one_process_cannot_read_ends_all_with_its_reason_and_a_checkpoint(tmp_path):
    first, second = processes.started(2, run_broken_on_one, tmp_path)
    assert (first, second) == ("process 1: task pictures: 5 of 100 files are broken", "task pictures: 5 of 100 files are broken")
    found = checkpoint.newest(tmp_path)
    assert found
    assert 0 < found.step < 40
