"""What `test_loop.py` leaves out: the times of a run, its folder among other processes, and its warnings."""

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from long_forms import mark_long
from processes import Command
from tiny_runs import tiny_config

from polyvit_fast import cli
from polyvit_fast.config import Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.clock import Clock, TaskTime
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.log import PeerLog
from polyvit_fast.train.run import Run
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.lock import LOCK, RUNNING
from polyvit_fast.train.schedule import LearningRates, make_step_plan
from polyvit_fast.train.step import Step


@pytest.fixture
def run(config):
    step = Step(PolyViT.from_config(config), config)
    times = {name: TaskTime() for name in config.tasks}
    plan = make_step_plan(config)
    clock, rates = Clock(torch.device("cpu")), LearningRates(config, plan)
    run = Run(config, plan, World(), step, {}, {}, PeerLog(1), clock, {}, {}, rates, interval_times=times)
    run.seconds = dict.fromkeys(config.tasks, 0.0)
    return run


def test_time_is_counted_for_the_interval_and_for_the_whole_run(run, monkeypatch):
    now = [run.clock.last]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(2):
        for name, seconds in (("a", 0.01), ("b", 0.02)):
            now[0] += seconds
            run.clock.mark_data_ready()
            run.clock.end(name)
        run.count_time(run.clock.lap())
        if run.seconds["a"] < 0.015:
            run.interval_times["a"].seconds = run.interval_times["a"].waited = 0.0
    assert run.seconds["a"] == pytest.approx(0.02)
    assert run.seconds["b"] == pytest.approx(0.04)
    assert run.interval_times["a"].seconds == pytest.approx(0.01)
    assert run.interval_times["b"].waited == run.interval_times["b"].seconds


SMOKE = [
    "train",
    "smoke",
    "--device",
    "cpu",
    "--tasks.pictures.steps",
    "100000",
    "--save-every-steps",
    "10",
    "--compute-threads",
    "1",
    "--out",
]


@pytest.fixture
def living(tmp_path) -> Iterator[Callable[[], Command]]:
    """A function that starts a long training in the folder `run` and waits until it has saved."""
    started = []

    def start() -> Command:
        saved = len(list((tmp_path / "run").glob("checkpoints/step_*")))
        process = Command(*SMOKE, str(tmp_path / "run"), folder=tmp_path)
        started.append(process)
        while process.poll() is None and len(list((tmp_path / "run").glob("checkpoints/step_*"))) <= saved:
            time.sleep(0.1)
        return process

    yield start
    for process in started:
        process.kill()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What a start writes or deletes, but not what a run adds to: which file it is and when it was changed."""
    kept = {"config.json", "command.txt", "versions.json", LOCK}
    kept |= {str(path.relative_to(folder)) for path in folder.glob("checkpoints/.tmp-*-of-the-other")}
    found = {name: (folder / name).stat() for name in kept}
    grown = {name: (folder / name).stat().st_ino for name in ("log.txt", "metrics.jsonl", RUNNING)}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()} | {name: (ino, 0) for name, ino in grown.items()}


def test_a_second_run_is_refused_before_it_touches_anything_and_readers_are_not(tmp_path, living, capsys):
    folder = tmp_path / "run"
    process = living()
    before = files(folder)
    for flags in ([], ["--seed", "3"], ["--no-resume"]):  # whatever else is wrong, this comes first
        assert cli.run([*SMOKE, str(folder), *flags]) == 2
        printed = capsys.readouterr().err
        assert f"the run folder {folder} is in use: process {process.pid} on " in printed
    assert files(folder) == before
    assert cli.run(["eval", str(folder)]) == 0
    assert cli.run(["plot", str(folder)]) == 0
    assert process.poll() is None
    assert "was not saved" not in (folder / "log.txt").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def test_a_run_goes_on_at_once_after_the_kill_of_the_one_before(tmp_path, living):
    folder = tmp_path / "run"
    living().kill()
    newest = checkpoint.find_newest(folder)
    assert newest
    again = living()
    assert again.poll() is None
    log = (folder / "log.txt").read_text()
    assert "resumed from step" in log
    assert json.loads((folder / RUNNING).read_text())["pid"] == again.pid


def test_a_warmup_that_never_ends_is_warned_of(tmp_path):
    config = tiny_config(optim=Optim(name="adamw", warmup_steps=20), schedule="accumulating", out=str(tmp_path))
    train(config, "test", ["test"])
    assert "warning: The warm-up of 10 steps does not end within the run of 10: lower" in (tmp_path / "log.txt").read_text()


def forget_warmup(folder: Path) -> None:
    """Make the newest checkpoint one of a version that did not note its warm-up."""
    newest = checkpoint.find_newest(folder)
    assert newest
    text = json.dumps({key: value for key, value in newest.state.items() if key != "warmup_steps"}).encode()
    (newest.path / "state.json").write_bytes(text)
    manifest = json.loads((newest.path / checkpoint.MANIFEST).read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (newest.path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


WARNED_OF = [("weighted", 0, False), ("weighted", 7, False), ("weighted", 8, True), ("accumulating", 0, False), ("accumulating", 4, True)]


@pytest.mark.parametrize(("schedule", "warmup_steps", "is_warned_of"), mark_long(WARNED_OF, WARNED_OF[1:3]))
def test_an_earlier_versions_run_whose_rates_were_others_is_warned_of(tmp_path, schedule, warmup_steps, is_warned_of):
    optim = Optim(warmup_steps=warmup_steps)
    config = tiny_config(schedule=schedule, optim=optim, save_every_steps=7, keep=9, out=str(tmp_path))
    train(config, "test", ["test"])
    for found in checkpoint.iterate(tmp_path):
        if found.step > 7:
            shutil.rmtree(found.path)
    forget_warmup(tmp_path)
    train(config, "test", ["test"])
    log = (tmp_path / "log.txt").read_text()
    assert "resumed from step 7" in log
    assert ("is of an earlier version, whose warm-up began at a rate of 0" in log) == is_warned_of
