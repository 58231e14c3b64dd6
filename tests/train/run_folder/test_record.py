import os
import platform
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import change, tiny_config

from polyvit_fast import experiments
from polyvit_fast.config import LogOptions, Train
from polyvit_fast.train.run_folder import record
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.record import describe_run, load_run, resume_differences


def test_a_resumed_run_may_differ_only_where_no_number_depends_on_it():
    old = tiny_config()
    free = {"out": "elsewhere", "log_every_steps": 1, "eval_every_steps": 9, "save_every_steps": 3, "keep": 5, "num_threads": 7}
    free |= {"prefetch": 1, "decode_timeout_seconds": 5.0, "max_bad_ratio": 0.5, "nonfinite_patience": 3, "resume": False}
    free |= {"changed_files": "allow", "early_stop_evaluations": 2}
    free |= {"capture": False, "recompute": True, "sharded": True}
    names = {name.split(".")[-1] for name in record.MAY_CHANGE - {"log"}}
    assert set(free) == names | {field.name for field in fields(LogOptions)}
    assert resume_differences(to_json(old), to_json(change(old, **free))) == []
    old = change(old, precision="bf16")
    for bound in ({"seed": 1}, {"residual": "bf16"}, {"device": "cuda"}, {"optim": replace(old.optim, lr=2.0)}, {"schedule": "uniform"}):
        found = resume_differences(to_json(old), to_json(change(old, **bound, **free)))
        assert len(found) == 1, found
        assert next(iter(bound)) in found[0].partition(":")[0]


def test_a_run_folder_describes_its_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    changed = tiny_config(seed=5)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo", "--out", "my run"], changed)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo"], changed)
    assert sorted(path.name for path in folder.iterdir()) == ["command.txt", "config.json", "versions.json"]
    run = load_run(folder, {"demo": tiny_config()}.__getitem__)
    assert (run.folder, run.experiment, run.config) == (folder, "demo", changed)
    assert run.commands == ["polyvit-fast train demo --out 'my run'", "polyvit-fast train demo"]
    assert run.versions["torch"] == torch.__version__
    assert run.versions["python"] == platform.python_version()
    assert run.versions["numpy"] == np.__version__
    assert run.versions.keys() == {"polyvit_fast", "commit", "python", "torch", "dali", "numpy", "av", "platform"}


def test_a_users_experiment_is_copied_and_used_when_his_own_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, loaded = Path("mine.py"), []

    def load(name: str) -> Train:
        loaded.append(name)
        return tiny_config()

    mine.write_text("seed = 1\n")
    describe_run(Path("run"), "mine.py", ["polyvit-fast"], tiny_config(seed=9))
    assert Path("run/experiment.py").read_text() == "seed = 1\n"
    assert load_run(Path("run"), load).config.seed == 9
    mine.write_text("seed = 2\n")
    load_run(Path("run"), load)
    mine.unlink()
    load_run(Path("run"), load)
    assert loaded == ["mine.py", "run/experiment.py", "run/experiment.py"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"is not a run folder: it has no config\.json"),
        ("config.json", '{"experiment": "demo",\n "config": {', r"config\.json is broken: line 2, column 13: "),
        ("config.json", "[]", r"config\.json is broken: it holds no JSON object"),
        ("config.json", '{"experiment": 3}', r"config\.json does not describe a run: it needs the fields experiment and config"),
        ("config.json", b"\xff\xfe", r"config\.json is broken: it is not text"),
        (
            "config.json",
            '{"experiment": "demo", "config": {"type": "Train"}}',
            r"does not fit its experiment demo: tasks: the experiment has it",
        ),
        ("versions.json", None, r"is not a whole run folder: versions\.json is missing"),
    ],
)
def test_a_folder_that_is_no_run_is_message(tmp_path, name, content, message):
    describe_run(tmp_path, "demo", ["x"], tiny_config())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path, lambda name: tiny_config())


def test_an_unwritable_run_folder_is_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the run folder .*file/run cannot be written: Not a directory; choose another with --out"):
        describe_run(tmp_path / "file" / "run", "demo", ["x"], tiny_config())


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    describe_run(tmp_path, "demo", ["x"], tiny_config())
    before = (tmp_path / "config.json").read_text()

    def refuse(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match="No space left on device"):
        describe_run(tmp_path, "demo", ["x"], tiny_config(seed=1))
    assert (tmp_path / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command.txt", "config.json", "versions.json"]


def test_the_commit_is_that_of_our_own_checkout_only(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert record._commit(tmp_path) == commit
    git("tag", "v1")
    (tmp_path / "file").write_text("2")
    assert record._commit(tmp_path) == f"{commit}-dirty"
    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert record._commit(installed) is None
    (installed / ".git").write_text("gitdir: /nowhere")
    assert record._commit(installed) is None


def test_a_run_of_some_tasks_is_read_back_as_such(tmp_path):
    smoke = experiments.load("smoke")
    part = replace(smoke.only(["clips"]), out=str(tmp_path))
    describe_run(tmp_path, "smoke", ["polyvit-fast"], part)
    assert load_run(tmp_path, experiments.load).config == part
