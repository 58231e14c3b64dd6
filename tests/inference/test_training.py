import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

import polyvit_fast as pf
from polyvit_fast import cli, experiments
from polyvit_fast.train.evaluate import evaluate_run
from polyvit_fast.train.run_folder.checkpoint import find_checkpoint
from polyvit_fast.train.run_folder.record import MADE_IN_PYTHON, load_run


def test_a_run_made_in_python_describes_itself(run):
    recorded = load_run(run.folder, find_checkpoint(run.folder, "newest"), experiments.load)
    assert recorded.experiment == MADE_IN_PYTHON
    assert recorded.config == replace(run.config, out=str(run.folder))
    assert len(recorded.commands) == 1
    assert Path(sys.orig_argv[0]).name in recorded.commands[0]


def test_the_command_line_evaluates_and_plots_it(run, capsys):
    assert cli.run(["eval", str(run.folder)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in run.config.tasks)
    assert cli.run(["plot", str(run.folder)]) == 0


def test_the_same_call_resumes(tmp_path):
    task = replace(experiments.load("smoke").tasks["pictures"], steps=4)
    config = replace(experiments.load("smoke"), tasks={"pictures": task}, out=str(tmp_path / "half"), device="cpu")
    straight = pf.train(config, out=tmp_path / "straight")
    half = replace(config, log=replace(config.log, save_every_steps=2, keep=5))
    pf.train(half)
    newest = tmp_path / "half" / "checkpoints" / "step_00000004"
    newest.rename(tmp_path / "gone")
    resumed = pf.train(half, out=str(tmp_path / "half"))
    assert (resumed.step, straight.step) == (4, 4)
    assert "resumed from step 2 of 4" in (tmp_path / "half" / "log.txt").read_text()
    weights = [pf.load(tmp_path / name).model.state_dict() for name in ("straight", "half")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_experiment_by_name_or_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from dataclasses import replace\nfrom polyvit_fast import experiments\nsmoke = experiments.load('smoke')\n"
    text += "tasks = {'pictures': replace(smoke.tasks['pictures'], steps=2)}\nconfig = replace(smoke, tasks=tasks, out='', device='cpu')\n"
    Path("mine.py").write_text(text)
    assert pf.train(Path("mine.py")).step == 2
    Path("mine.py").unlink()
    assert pf.load("runs/mine").step == 2
    assert json.loads(Path("runs/mine/config.json").read_text())["experiment"] == "mine.py"
    with pytest.raises(ValueError, match="experiment 'smok' is unknown; perhaps you meant smoke"):
        pf.train("smok")


def test_a_configuration_without_a_folder_is_refused():
    with pytest.raises(ValueError, match=r"polyvit_fast\.train\(config, out='runs/mine'\)"):
        pf.train(tiny_config())


def test_classes_of_a_users_own_are_given_again(tmp_path):
    config = tiny_config()
    outcome = pf.train(config, out=tmp_path)
    with pytest.raises(ValueError, match=r"tasks\.a\.modality: Tile is no class of polyvit_fast; .*load\(run, config=config\)"):
        pf.load(tmp_path)
    model = pf.load(tmp_path, config=config)
    assert model.config.out == str(tmp_path)
    rows = evaluate_run(tmp_path, model.config, "newest", (), lambda *done: None).rows
    assert rows["a"]["top1"] == outcome.metrics["a"]["top1"]
    with pytest.raises(ValueError, match="does not fit the configuration given: tasks"):
        pf.load(tmp_path, config=experiments.load("smoke"))


def test_the_folder_of_modules_and_the_function_have_one_name():
    from polyvit_fast.train import loop

    assert pf.train is sys.modules["polyvit_fast.train"]
    assert pf.train.loop is loop
    assert callable(pf.train)
