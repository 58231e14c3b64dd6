import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import change, tiny_config

import polyvit_fast
from polyvit_fast import experiments
from polyvit_fast.config import LogOptions, StepPlan, Train
from polyvit_fast.data import Synthetic
from polyvit_fast.train.run_folder import checkpoint, record
from polyvit_fast.train.run_folder.checkpoint import Checkpoint, read
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.earlier_versions import SCHEMA, LaterVersionError, stamp
from polyvit_fast.train.run_folder.record import describe_run, list_tasks, load_run, resume_differences


@dataclass(frozen=True, kw_only=True)
class OwnSource(Synthetic):
    """A user's own."""


def own_schedule(config: Train) -> StepPlan:
    return [(name,) for name in config.tasks]


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


def save(folder: Path, config: Train) -> Checkpoint:
    """A checkpoint of that configuration without tensors."""
    return read(checkpoint.save(folder, 3, {}, {"best_step": None}, to_json(config), keep=1))


def never(name: str) -> Train:
    """For what must not load an experiment."""
    raise AssertionError(name)


def test_a_run_folder_describes_its_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    smoke = replace(experiments.load("smoke"), seed=5)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo", "--out", "my run"], smoke)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo"], smoke)
    assert sorted(path.name for path in folder.iterdir()) == ["command.txt", "config.json", "versions.json"]
    content = json.loads((folder / "config.json").read_text())
    assert (content["schema"], content["version"]) == (SCHEMA, polyvit_fast.__version__)
    run = load_run(folder, save(folder, smoke), never)
    assert (run.folder, run.experiment, run.config, run.remark) == (folder, "demo", smoke, "")
    assert run.commands == ["polyvit-fast train demo --out 'my run'", "polyvit-fast train demo"]
    assert run.versions["torch"] == torch.__version__
    assert run.versions["python"] == platform.python_version()
    assert run.versions["numpy"] == np.__version__
    assert run.versions.keys() == {"polyvit_fast", "commit", "python", "torch", "dali", "numpy", "av", "platform"}


def test_a_users_classes_come_from_his_experiment_or_from_its_copy_when_his_own_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, loaded = Path("mine.py"), []

    def load(name: str) -> Train:
        loaded.append(name)
        return tiny_config()

    mine.write_text("seed = 1\n")
    describe_run(Path("run"), "mine.py", ["polyvit-fast"], tiny_config(seed=9))
    found = save(Path("run"), tiny_config(seed=9))
    assert Path("run/experiment.py").read_text() == "seed = 1\n"
    assert load_run(Path("run"), found, load).config.seed == 9
    mine.write_text("seed = 2\n")
    load_run(Path("run"), found, load)
    mine.unlink()
    load_run(Path("run"), found, load)
    assert loaded == ["mine.py", "run/experiment.py", "run/experiment.py"]


def test_no_experiment_is_loaded_where_the_packages_classes_suffice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("raise SystemExit\n")
    smoke = experiments.load("smoke")
    own = replace(smoke, tasks=smoke.tasks | {"clips": replace(smoke.tasks["clips"], val=OwnSource())}, schedule=own_schedule)
    for config, with_sources in ((smoke, True), (replace(smoke, schedule=own_schedule), True), (own, False)):
        describe_run(Path("run"), "mine.py", ["polyvit-fast"], config)
        assert load_run(Path("run"), save(Path("run"), config), never, with_sources=with_sources).config.model == smoke.model
    with pytest.raises(AssertionError, match=r"mine\.py"):
        load_run(Path("run"), save(Path("run"), own), never)


def test_an_experiment_that_is_needed_and_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import my_neighbour_that_is_gone\n")
    describe_run(Path("run"), "mine.py", ["polyvit-fast"], tiny_config())
    found = save(Path("run"), tiny_config())
    Path("mine.py").unlink()
    message = (
        r"step_00000003/config\.json: tasks\.a\.modality: Tile is no class of polyvit_fast, so its experiment mine\.py is needed, "
        r"and the modules that it imports next to run/experiment\.py: .*my_neighbour_that_is_gone"
    )
    with pytest.raises(ValueError, match=message):
        load_run(Path("run"), found, experiments.load)


@pytest.mark.parametrize("text", ["class Video:\n    pass\n", "from mine import Video\n", "from mine import Other as Video\n"])
def test_before_0_8_a_users_class_may_be_called_like_one_of_the_package(tmp_path, text):
    """It was stored as the package's own is; only the experiment tells them apart."""
    smoke = experiments.load("smoke")
    describe_run(tmp_path, "smoke", ["polyvit-fast"], smoke)
    found = save(tmp_path, smoke)
    for name in stamp():
        del found.config[name]
    (tmp_path / "experiment.py").write_text("from polyvit_fast.data import Audio, Image, Video\nimport json\n")
    assert load_run(tmp_path, found, never).config == smoke
    (tmp_path / "experiment.py").write_text(text)
    with pytest.raises(AssertionError, match=r"experiment\.py"):
        load_run(tmp_path, found, never)


def test_the_checkpoint_is_believed_and_what_the_folder_says_otherwise_is_told(tmp_path):
    smoke = experiments.load("smoke")
    found = save(tmp_path, smoke)
    assert load_run(tmp_path, found, never).remark == ""  # nothing else in the folder
    free = replace(smoke, out="elsewhere", data=replace(smoke.data, num_threads=9), log=replace(smoke.log, keep=7))
    describe_run(tmp_path, "smoke", ["polyvit-fast"], free)
    run = load_run(tmp_path, found, never)
    assert (run.config, run.remark) == (smoke, "")
    clips = replace(smoke.tasks["clips"], modality=replace(smoke.tasks["clips"].modality, frames=8))
    describe_run(tmp_path, "smoke", ["polyvit-fast"], replace(free, seed=3, tasks=smoke.tasks | {"clips": clips}))
    run = load_run(tmp_path, found, never)
    assert run.config == smoke
    assert run.remark == (
        f"{found.path} was trained with another configuration than {tmp_path / 'config.json'} says, and its own is used (its own -> the "
        "folder's): tasks.clips.modality.frames: 4 -> 8; seed: 0 -> 3"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"experiment": "demo",\n "config": {', r"config\.json is broken: line 2, column 13: "),
        ("config.json", "[]", r"config\.json is broken: it holds no JSON object; the checkpoint's own config\.json is used"),
        ("config.json", b"\xff\xfe", r"config\.json is broken: it is not text; the checkpoint's own config\.json is used"),
        ("config.json", '{"experiment": 3}', "^$"),
        ("config.json", None, "^$"),
        ("versions.json", None, "^$"),
    ],
)
def test_a_broken_description_is_told_and_does_no_harm(tmp_path, name, content, message):
    smoke = experiments.load("smoke")
    describe_run(tmp_path, "smoke", ["x"], smoke)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    run = load_run(tmp_path, save(tmp_path, smoke), never)
    assert run.config == smoke
    assert re.search(message, run.remark)


def test_a_description_of_a_later_version_is_refused(tmp_path):
    smoke = experiments.load("smoke")
    describe_run(tmp_path, "smoke", ["x"], smoke)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}').replace(polyvit_fast.__version__, "0.99.1"))
    with pytest.raises(LaterVersionError, match=r"config\.json was written by polyvit-fast 0\.99\.1, .*; upgrade: pip install"):
        load_run(tmp_path, save(tmp_path, smoke), never)


def test_the_order_of_the_tasks_can_be_read_alone(tmp_path):
    assert list_tasks(tmp_path) == []
    describe_run(tmp_path, "smoke", ["x"], experiments.load("smoke"))
    assert list_tasks(tmp_path) == ["pictures", "clips", "sounds"]
    for text in ("[]", "{", '{"config": 3}', '{"config": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert list_tasks(tmp_path) == []


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
    found = save(tmp_path, part)
    assert load_run(tmp_path, found, experiments.load).config == part
    own = replace(smoke, tasks={name: replace(task, val=OwnSource()) for name, task in smoke.tasks.items()})
    part = own.only(["clips"])
    assert load_run(tmp_path, save(tmp_path, part), lambda name: own).config == part
