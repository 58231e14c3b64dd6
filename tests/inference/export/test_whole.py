"""All tasks of a run, taken away with nothing but their weights."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

import polyvit_fast as pf
from polyvit_fast import cli, experiments
from polyvit_fast.train.run_folder.checkpoint import find_newest


def short(out, **optim):
    """The experiment `smoke`, of three steps a task."""
    config = experiments.load("smoke")
    tasks = {name: replace(task, steps=3) for name, task in config.tasks.items()}
    return replace(config, tasks=tasks, optim=replace(config.optim, **optim), out=str(out))


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["weights", "moving average"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    pf.train(short(folder, ema_decay=request.param))
    return folder


def test_the_weights_are_the_runs_and_nothing_else_is_there(trained, tmp_path):
    exported = pf.export(trained, "polyvit", tmp_path / "out")
    assert exported.comparison == "loaded again, every weight is equal to the run's"
    assert str(exported).startswith(f"all tasks, step {exported.step}: wrote README.md, ")
    ours, theirs = pf.load(tmp_path / "out"), pf.load(trained)
    assert ours.step == theirs.step
    assert list(ours.tasks) == list(theirs.tasks)
    weights = theirs.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.model.state_dict().items())
    found = find_newest(tmp_path / "out")
    assert found
    assert found.names == ("model",)
    size, before = (sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in (tmp_path / "out", trained))
    assert size < before / 2
    kept = find_newest(trained)
    assert kept
    average = "The weights are the moving average of the training's."
    assert (average in exported.remarks) == ("ema" in kept.names)
    assert (average in (tmp_path / "out" / "README.md").read_text()) == (average in exported.remarks)


def test_what_is_written_evaluates_and_starts_a_run(trained, tmp_path, capsys):
    pf.export(trained, "polyvit", tmp_path / "out")
    assert cli.run(["eval", str(trained)]) == 0
    first = capsys.readouterr().out
    assert cli.run(["eval", str(tmp_path / "out")]) == 0
    values = [re.findall(r"0\.\d{4}|1\.0000", text) for text in (first, capsys.readouterr().out)]
    assert values[0] == values[1] != []
    pf.train(replace(short(tmp_path / "next"), init=str(tmp_path / "out")))
    lines = (tmp_path / "next" / "init.txt").read_text().splitlines()
    assert str(tmp_path / "out") in lines[0]
    assert len(lines) > 20


def test_the_card_names_tasks_metrics_and_where_it_comes_from(trained, tmp_path):
    pf.export(trained, "polyvit", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    kept = find_newest(trained)
    assert kept
    metrics = kept.state["metrics"]
    for name, task in pf.load(trained).tasks.items():
        assert f"| {name} | {task.modality.name} | " in text
        assert f"{task.metric} {metrics[name][task.metric]:.4f} |" in text
    assert f'model = pf.load("{tmp_path / "out"}")' in text
    assert "Versions: " in text


def test_it_replaces_an_earlier_export_only_when_asked_and_takes_no_task(trained, tmp_path):
    out = tmp_path / "out"
    pf.export(trained, "polyvit", out)
    with pytest.raises(ValueError, match="is not empty"):
        pf.export(trained, "polyvit", out)
    (out / "mine.txt").write_text("stays")
    pf.export(trained, "polyvit", out, overwrite=True)
    assert (out / "mine.txt").read_text() == "stays"
    assert pf.load(out).step
    with pytest.raises(ValueError, match="takes all tasks; leave the task out"):
        pf.export(trained, "polyvit", tmp_path / "other", task="clips")
    assert not (tmp_path / "other").exists()


def test_a_task_can_be_exported_from_what_was_exported(trained, tmp_path):
    pf.export(trained, "polyvit", tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere")
    task = next(iter(pf.load(trained).tasks))
    ours, theirs = (
        pf.export(source, "safetensors", tmp_path / name, task=task) for name, source in (("a", tmp_path / "elsewhere"), ("b", trained))
    )
    assert ours.comparison == theirs.comparison
