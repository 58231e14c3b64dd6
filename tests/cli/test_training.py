import json
import re

import pytest
from PIL import Image as Pillow

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
        ("x = 1\nfrom polyvit_fast.config import Task\ntask = Task(steps=0)\nconfig = ", "line 4: invalid syntax"),
        ("x = 1\n\nimport no_such_package", "line 3: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_an_error_in_an_experiment_file_is_reported_with_its_line(here, capsys, text, words):
    (here / "mine.py").write_text(text)
    assert cli.run(["train", "mine.py"]) == 2
    assert words in printed(capsys)


def test_train_eval_and_plot_of_a_users_own_file(here, capsys):
    (here / "mine.py").write_text(EXPERIMENT)
    assert cli.run(["train", "mine.py", "--device", "cpu", "--log-every-steps", "2"]) == 0
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


def test_plot_needs_the_metrics_alone(here, capsys):
    run = here / "runs" / "mine"
    run.mkdir(parents=True)
    assert cli.run(["plot", "runs/mine"]) == 2
    assert "runs/mine is not a run folder: it is empty" in printed(capsys)
    (run / "metrics.jsonl").touch()
    assert cli.run(["plot", "runs/mine"]) == 2
    assert "metrics.jsonl holds no points: nothing was logged yet" in printed(capsys)
    line = {"step": 5, "kind": "train", "tasks": {"b": {"loss": 1.0}, "a": {"loss": 2.0}}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for content in (None, "{", '{"config": {"tasks": {"a": {}, "b": {}}}}'):
        if content:
            (run / "config.json").write_text(content)
        assert cli.run(["plot", "runs/mine"]) == 0
        assert printed(capsys) == "drawn: runs/mine/curves.png"
    assert cli.run(["plot", "runs/mine", "--out", "mine.pdf"]) == 0
    assert (here / "mine.pdf").read_bytes().startswith(b"%PDF")
    assert cli.run(["plot", "runs/mine", "--out", "mine.doc"]) == 2
    assert "mine.doc: a picture's name ends in .png, .pdf, .svg or .jpg" in printed(capsys)


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


def test_only_makes_a_baseline_of_some_tasks(here, capsys):
    """For every command that takes an experiment, and for those that take its run folder."""
    few = ("--device", "cpu", "--only", "clips", "--tasks.clips.steps", "3")
    assert cli.run(["train", "smoke", *few]) == 0
    folder = here / "runs" / "smoke-only-clips"
    assert "tasks: clips" in (folder / "log.txt").read_text()
    stored = json.loads((folder / "config.json").read_text())["config"]
    assert list(stored["tasks"]) == ["clips"]
    assert cli.run(["train", "smoke", *few]) == 0  # resumes
    assert "resumed from step 3 of 3" in (folder / "log.txt").read_text()
    assert cli.run(["eval", str(folder)]) == 0
    assert cli.run(["plot", str(folder)]) == 0
    capsys.readouterr()
    assert cli.run(["plan", "smoke", "--optim.lr", "0.1", "--only", "sounds", "pictures"]) == 0
    assert "2 tasks, 28 steps" in capsys.readouterr().out
    assert cli.run(["plot", "schedule", "smoke", *few]) == 0
    assert (folder / "schedule.png").exists()
    assert cli.run(["check", "smoke", "--only", "clips"]) == 0
    assert "pictures" not in capsys.readouterr().out.partition("drawn")[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "clip"], "--only: there is no task clip; there are pictures, clips, sounds"),
        (["--only", "clips", "x", "y"], "--only: there is no task x, y; there are pictures, clips, sounds"),
        (["--only"], "--only: no task is named; there are pictures, clips, sounds"),
        (["--only", "--optim.lr", "1"], "--only: no task is named"),
    ],
)
def test_only_names_the_tasks_that_there_are(here, capsys, flags, words):
    assert cli.run(["plan", "smoke", *flags]) == 2
    assert words in capsys.readouterr().err


def test_help_shows_only_and_the_flags_of_the_tasks_that_are_left(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit):
        cli.run(["train", "smoke", "--only", "clips", "--help-all"])
    text = capsys.readouterr().out
    assert "--only" in text
    assert "--tasks.clips.steps" in text
    assert "--tasks.sounds.steps" not in text
    flags = [
        "--optim.freeze",
        "--optim.layer-decay",
        "--tasks.clips.lr-schedule",
        "--tasks.clips.warmup-steps",
        "--tasks.clips.loss-weight",
    ]
    assert all(flag in text for flag in [*flags, "--tasks.clips.cutmix", "--early-stop-evaluations"])


OWN_MODALITY = """
from dataclasses import dataclass

from helper import SIZE
from polyvit_fast.config import Model, Task, Train
from polyvit_fast.data import Folder, Image


@dataclass(frozen=True, kw_only=True)
class Mine(Image):
    size: int = SIZE


pictures = Folder(path="pictures")
config = Train(
    tasks={"p": Task(modality=Mine(patch=8), train=pictures, val=pictures, num_classes=2, steps=2)},
    model=Model(dim=32, depth=1, num_heads=2, mlp_dim=64),
)
"""


def test_check_knows_classes_of_the_experiment_file_and_its_neighbours(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN_MODALITY)
    (tmp_path / "helper.py").write_text("SIZE = 16\n")
    for label in ("a", "b"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        Pillow.new("RGB", (20, 20)).save(tmp_path / "pictures" / label / "0.png")
    (tmp_path / "pictures" / "a" / "1.png").write_bytes(b"no picture")
    assert cli.run(["check", "mine.py", "--num-workers", "1"]) == 65
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "1.png: not an image that can be decoded" in out
