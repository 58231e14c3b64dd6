"""What `test_loop.py` leaves out: the times of a run, its folder among other processes, and its warnings."""

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fine_tuning import make_config, write_pictures
from long_forms import mark_long
from processes import Command, Processes
from tiny_runs import tiny_config

from polyvit_fast import cli
from polyvit_fast.config import Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.clock import Clock, TaskTime
from polyvit_fast.train.distributed.process_group import PeerLost, World
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


FAILING = {
    "device": (["--device", "cuda"], "PyTorch finds no NVIDIA GPU here"),
    "schedule": (["--schedule", "weigthed"], "schedule = 'weigthed' is unknown"),
    "memory": (["--model.dim", "512", "--model.mlp-dim", "1048576"], "the computer's memory is too small"),
    "weights": (["--init", "nowhere.safetensors"], "nowhere.safetensors"),
    "data": (["--tasks.p.train.path", "nowhere"], "If the files have moved"),
    "classes": (["--tasks.p.num-classes", "7"], "where num_classes = 7"),
    "held-out": (["--tasks.p.val.path", "nowhere"], "If the files have moved"),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, which holds an experiment, mine.py, and its files."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_pictures(tmp_path / "pictures" / split)
    (tmp_path / "mine.py").write_text(
        "import os, signal\nfrom dataclasses import dataclass\nfrom polyvit_fast.config import Model, Task, Train\n"
        "from polyvit_fast.data import Folder, Image\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Signalling(Folder):\n    number: int = 0\n\n"
        "    def samples(self, task):\n        if self.number:\n            os.kill(os.getpid(), self.number)\n"
        "        return super().samples(task)\n\n"
        "config = Train(\n    tasks={'p': Task(modality=Image(size=32, patch=16), train=Signalling(path='pictures/train'), "
        "val=Folder(path='pictures/val'), num_classes=3, batch=4, steps=4)},\n"
        "    model=Model(dim=32, depth=1, num_heads=2, mlp_dim=64),\n)\n"
    )
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for a device that is not there")
@pytest.mark.parametrize("case", mark_long(FAILING, ["device", "data", "memory"]))
def test_a_start_that_fails_leaves_no_folder_behind(here, capsys, request, case):
    flags, words = FAILING[case]
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    if case == "memory":  # one matrix takes two gigabytes
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_AS, limits))
    before = sorted(here.rglob("*"))
    assert cli.run(["train", "mine.py", "--out", "new/deep/run", *flags]) == 2
    assert words in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before
    (here / "empty").mkdir()  # a folder that was there stays
    assert cli.run(["train", "mine.py", "--out", "empty", *flags]) == 2
    assert not list((here / "empty").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_nor_does_one_that_a_signal_stops(here, number, code):
    before = sorted(here.rglob("*"))
    assert cli.run(["train", "mine.py", "--tasks.p.train.number", str(int(number)), "--out", "new/run"]) == code
    assert sorted(here.rglob("*")) == before


def test_a_start_that_fails_leaves_an_earlier_run_as_it_was(here, capsys):
    assert cli.run(["train", "mine.py", "--out", "run"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*") if path.is_file()}
    for flags in (["--seed", "3"], ["--no-resume"], ["--tasks.p.train.path", "nowhere"], ["--schedule", "nope"]):
        assert cli.run(["train", "mine.py", "--out", "run", *flags]) == 2
    assert before == {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [["plot", "schedule"], ["plan"], ["check"], ["train"]])
def test_no_command_about_an_experiment_leaves_a_folder_when_it_fails(here, capsys, command):
    before = sorted(here.rglob("*"))
    fault = ["--tasks.p.train.path", "nowhere"] if command == ["check"] else ["--schedule", "weigthed"]
    locations = ["--only", "p"] if command == ["check"] else []
    if command == ["check"]:
        fault += ["--tasks.p.val.path", "nowhere"]
    assert cli.run([*command, "mine.py", *locations, *fault]) == 2
    assert sorted(here.rglob("*")) == before


def start_where_rank_1_has_no_files(folder: Path) -> str:
    """The error of one of two processes, of which only the first finds the training files."""
    os.chdir(folder if os.environ["RANK"] == "0" else folder / "elsewhere")
    config = replace(make_config(Path("pictures")), out=str(folder / "new" / "run"))
    try:
        train(config, "test", ["test"])
    except (ValueError, PeerLost) as error:
        return str(error)
    return ""


def test_of_several_processes_one_that_fails_leaves_no_folder_either(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "elsewhere").mkdir()
    processes = Processes(2)
    try:
        processes.submit(start_where_rank_1_has_no_files, tmp_path)
        first, second = processes.wait()
    finally:
        processes.kill()
    assert "If the files have moved" in second
    assert "another process of the run ended" in first
    assert not (tmp_path / "new").exists()
