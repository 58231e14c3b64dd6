import json
import re

import pytest

from polyvit_fast import cli, experiments

EXPERIMENT = '''"""A tiny run of our own."""
from dataclasses import replace
from polyvit_fast import experiments

def every_other(config):
    return [("pictures",), ("sounds",)] * 4

config = replace(experiments.load("smoke"), schedule=every_other, out="")
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = 3", "must define `config = Train(...)`"),
        ("x = 1\nfrom polyvit_fast.config import Task\ntask = Task(steps=0)\nconfig = ", "line 4: SyntaxError"),
        ("x = 1\n\nimport no_such_package", "line 3: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_an_error_in_an_experiment_file_is_reported_with_its_line(here, capsys, text, words):
    (here / "mine.py").write_text(text)
    assert cli.run(["train", "mine.py"]) == 2
    assert words in printed(capsys)


def test_train_eval_and_plot_of_a_users_own_file(here, capsys):
    (here / "mine.py").write_text(EXPERIMENT)
    assert cli.run(["train", "mine.py", "--log-every-steps", "2"]) == 0
    text = printed(capsys)
    assert "pictures" in text
    assert "top1" in text
    assert "mAP" in text
    folder = here / "runs" / "mine"
    assert {"config.json", "command.txt", "versions.json", "metrics.jsonl", "log.txt", "experiment.py", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    trained = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert trained[-1]["step"] == 8
    (here / "mine.py").unlink()  # the run folder is enough from here on
    assert cli.run(["eval", "runs/mine"]) == 0
    value = re.search(r"sounds .*?mAP .*?([01]\.\d+|\d+\.\d %)", printed(capsys))
    assert value
    assert cli.run(["eval", "runs/mine", "--checkpoint", "5"]) == 2
    assert "there are newest, best and the steps 8" in printed(capsys)
    assert cli.run(["plot", "runs/mine"]) == 0


def test_plot_schedule_draws_and_prints(here, capsys):
    assert cli.run(["plot", "schedule", "smoke", "--schedule", "alternating"]) == 0
    assert "drawn: runs/smoke/schedule.png" in printed(capsys)
    assert (here / "runs" / "smoke" / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_plan_says_what_a_run_costs(here, capsys):
    assert cli.run(["plan", "smoke"]) == 0
    text = printed(capsys)
    assert "pictures" in text
    assert f"{sum(t.steps for t in experiments.load('smoke').tasks.values())} steps" in text


def test_plan_list_and_help_make_no_data(here, capsys):
    assert cli.run(["plan", "demo"]) == 0
    assert "2,000" in printed(capsys)  # pictures of shapes, none of which is there
    assert cli.run(["list"]) == 0
    with pytest.raises(SystemExit, match="0"):
        cli.run(["train", "demo", "--help"])
    assert not list(here.iterdir())
    assert cli.run(["plot", "schedule", "demo"]) == 0
    assert [path.name for path in here.rglob("*") if path.is_file()] == ["schedule.png"]


def test_list_has_a_line_for_each_experiment(capsys):
    assert cli.run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == experiments.names()
    assert all(len(line.split()) > 3 for line in lines)


def test_check_names_broken_files_and_writes_clean_manifests(here, capsys):
    from PIL import Image

    for split in ("train", "val"):
        for label in ("red", "blue"):
            folder = here / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40), label).save(folder / f"{i}.png")
    (here / "train" / "red" / "1.png").write_bytes(b"")
    (here / "mine.py").write_text(
        "from polyvit_fast.config import Task, Train\nfrom polyvit_fast.data.image.modality import Image\n"
        "from polyvit_fast.data.sources.manifest import Folder\n"
        "config = Train(tasks={'colours': Task(modality=Image(size=32), train=Folder(path='train'), val=Folder(path='val'), "
        "num_classes=2, steps=3)})\n"
    )
    assert cli.run(["check", "mine.py"]) == 65
    text = printed(capsys)
    assert "train/red/1.png" in text
    assert "the file is empty" in text
    clean = (here / "clean-manifests" / "colours-train.csv").read_text()
    assert "train/red/0.png" in clean
    assert "train/red/1.png" not in clean
