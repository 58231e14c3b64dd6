import json

import pytest
from tiny_runs import change, tiny_config

from polyvit_fast import cli
from polyvit_fast.cli.probing import _choose_folder
from polyvit_fast.train.loop import train

EXPERIMENT = """
from tiny_runs import tile_task, tiny_config
from polyvit_fast.data.sources.synthetic import Synthetic

config = tiny_config(tasks={"new": tile_task(num_classes=4, train=Synthetic(num_samples=60, seed=5))})
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(change(tiny_config(), out=str(folder)), "test", ["test"])
    (folder.parent / "new.py").write_text(EXPERIMENT)
    return folder


def run(*arguments):
    return cli.run(["probe", *map(str, arguments)])


def test_a_table_with_random_weights_next_to_the_runs(trained, capsys, monkeypatch):
    monkeypatch.setattr("polyvit_fast.probe.heads.STEPS", (60, 60))
    flags = ["--experiment", trained.parent / "new.py", "--heads", "linear", "few-shot", "--shots", "2", "--random"]
    assert run(trained, *flags) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    header = next(line for line in lines if line[:2] == ["task", "head"])
    assert header == ["task", "head", "metric", "run", "random", "weights"]
    rows = json.loads((trained / "probe" / "probe.json").read_text())["results"]
    for head in ("linear", "2-shot"):
        row = next(line for line in lines if line[:2] == ["new", head])
        values = [one["estimate"]["value"] for one in rows if one["head"] == head]
        assert row[3:] == [f"{value:.4f}" for value in values]
    assert f"written: {trained / 'probe' / 'probe.json'}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: polyvit-fast probe SOURCE --experiment EXPERIMENT"),
        (["nowhere", "--experiment", "smoke"], "nowhere: there is no such file or folder"),
        (["nowhere", "--experiment", "smoke", "--tasks", "x"], "the experiment has no task x; it has pictures, clips, sounds"),
        (["nowhere", "--experiment", "none"], "none"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    printed = capsys.readouterr().out
    assert "polyvit-fast probe runs/demo --experiment birds.py --random" in " ".join(printed.replace("│", " ").split())
    for flag in ("--experiment", "--tasks", "--heads", "--shots", "--random", "--out", "--device"):
        assert flag in printed


def test_results_lie_with_what_was_probed(tmp_path):
    (tmp_path / "vit.npz").write_bytes(b"")
    assert _choose_folder(str(tmp_path)) == tmp_path / "probe"
    assert _choose_folder(f"{tmp_path}@best") == tmp_path / "probe"
    assert _choose_folder(str(tmp_path / "vit.npz")) == tmp_path / "probe"
    assert str(_choose_folder("owner/vit")) == "probe/owner--vit"
