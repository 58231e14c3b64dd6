"""Runs that earlier versions stopped half way are resumed, evaluated, drawn, used and exported.

tests/files/record_run_folders.py has made them.
"""

import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import polyvit_fast as pf
from polyvit_fast import cli
from polyvit_fast.train.run_folder.checkpoint import find_newest
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.earlier_versions import is_older_than_0_5, upgrade
from polyvit_fast.train.run_folder.rebuild import rebuild

ROOT = Path(__file__).parents[3]
FILES = ROOT / "tests" / "files"
RECORDED = FILES / "run_folders"
VERSIONS = sorted(path.name for path in RECORDED.iterdir() if path.name != "pictures")
ROUNDING = 1e-3
"""By how much a loss may differ, for other CPUs round otherwise. The same CPU gives the same numbers."""


def import_recorder() -> Any:
    spec = importlib.util.spec_from_file_location("record_run_folders", FILES / "record_run_folders.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDER = import_recorder()


@dataclass(frozen=True)
class OldRun:
    version: str
    name: str
    folder: Path

    @property
    def command(self) -> list[str]:
        """The arguments that it was trained with."""
        return shlex.split((self.folder / "command.txt").read_text().splitlines()[0])[1:]

    def read(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def straight(self) -> list[dict]:
        """What the version's own code logged of the run that nobody stopped."""
        return [json.loads(line) for line in (RECORDED / self.version / f"{self.name}-straight.jsonl").read_text().splitlines()]


@pytest.fixture(params=[(version, name) for version in VERSIONS for name in ("adamw", "sgd")], ids="-".join)
def old(request, tmp_path, monkeypatch) -> OldRun:
    """A run of an earlier version, with its pictures, in the folder that commands are started in."""
    version, name = request.param
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RECORDED / "pictures", "pictures")
    shutil.copytree(RECORDED / version / name, Path("runs") / name)
    # As the run has it; in git our own checks would read it.
    Path("runs", name, "experiment.py").write_text(RECORDER.write_experiment(version))
    return OldRun(version, name, Path("runs") / name)


def losses(lines: list[dict], kind: str) -> dict[str, float]:
    return {f"{line['step']} {task}": row["loss"] for line in lines if line["kind"] == kind for task, row in line["tasks"].items()}


def test_it_is_evaluated_drawn_loaded_exported_and_started_from(old, capsys):
    """Without its experiment, which is gone: all its classes are the package's."""
    found = find_newest(old.folder)
    assert cli.run(["eval", str(old.folder)]) == 0
    before, now = old.read("evaluations.jsonl")
    assert before["step"] == now["step"] == found.step
    for task, row in before["tasks"].items():
        expected = {name: value for name, value in row.items() if name != "examples_per_second"}
        assert {name: now["tasks"][task][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "warning" not in capsys.readouterr().err
    assert cli.run(["plot", str(old.folder)]) == 0
    assert (old.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    shutil.move("pictures", "elsewhere")
    model = pf.load(old.folder)
    assert (model.step, model.weights, list(model.tasks)) == (
        found.step,
        "ema" if old.name == "adamw" else "model",
        ["pictures", "clips", "sounds"],
    )
    expected = found.load_tensors(model.weights)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items())
    if old.name == "sgd":
        assert pf.load(old.folder, "best").step == 5
        return  # nothing that follows depends on the optimizer
    assert cli.run(["export", str(old.folder), "--task", "pictures", "--to", "safetensors", "--out", "exported"]) == 0
    shutil.move("elsewhere", "pictures")
    assert cli.run(["predict", str(old.folder), "pictures/val/red"]) == 0
    started = rebuild(upgrade(found.config))
    tasks = {"clips": replace(started.tasks["clips"], steps=1)}
    outcome = pf.train(replace(started, tasks=tasks, init=str(old.folder)), out="started")
    assert outcome.step == 1
    assert f"{old.folder} (run, step {found.step})" in Path("started/init.txt").read_text()


def test_it_is_resumed_by_its_own_command_to_the_end_that_it_would_have_had(old, capsys):
    Path("tiny.py").write_text(RECORDER.IMPORTS + RECORDER.EXPERIMENT)
    found, command = find_newest(old.folder), old.command
    if is_older_than_0_5(found.config):  # what has another default since then is named
        assert cli.run(command) == 2
        fields = re.findall(r"([\w.]+): \S+ -> ", capsys.readouterr().err.partition("it differs in: ")[2])
        then = {"tasks.sounds.modality.padding": "waveform", **({"optim.absent": "coast"} if old.name == "adamw" else {})}
        assert set(fields) == then.keys()
        command += [word for name in fields for word in (f"--{name}", then[name])]
    assert cli.run(command) == 0
    assert f"resumed from step {found.step}" in (old.folder / "log.txt").read_text()
    lines = old.read("metrics.jsonl")
    for kind in ("train", "eval"):
        assert losses(lines, kind) == pytest.approx(losses(old.straight, kind), rel=ROUNDING)
    assert find_newest(old.folder).step == old.straight[-1]["step"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_stored_record_has_todays_fields(version):
    """Whoever adds a field to a record says in earlier_versions.ADDED what was done before there was one."""
    stored = json.loads((RECORDED / version / "records.json").read_text())
    upgraded = upgrade(stored)
    config = rebuild(upgraded)
    assert {type(source).__name__ for task in config.tasks.values() for source in (task.train,)} == {
        "DemoFiles",
        "Folder",
        "Manifest",
        "Shards",
        "Synthetic",
    }
    assert list_fields(upgraded) == list_fields(to_json(config))


def list_fields(values: Any, path: str = "") -> set[str]:
    """The dotted names of all fields."""
    if not isinstance(values, dict):
        return {path}
    return {name for key, value in values.items() for name in list_fields(value, f"{path}.{key}")}


def test_every_version_since_0_3_has_left_a_run():
    """A release's own run is recorded by its code, before the next one."""
    released = re.findall(r"^## (\d+\.\d+\.\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(VERSIONS) >= set(released[1 : released.index("0.3.0") + 1])
