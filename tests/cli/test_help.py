import subprocess
import sys

import pytest

from polyvit_fast import cli, experiments
from polyvit_fast.cli.flags import list_flags
from polyvit_fast.cli.help import USED, merge_tasks

COMMANDS = [
    *(
        "train --help",
        "train demo --help",
        "train -h",
        "train demo --help-all",
        "plot --help",
        "plot schedule --help",
        "plot schedule demo -h",
    ),
    *("plan --help", "plan demo --help", "check --help", "check demo --help", "list --help", "eval --help", "eval runs/x --help"),
    *(
        "predict --help",
        "features --help",
        "probe --help",
        "export -h",
        "help train",
        "help plot schedule",
        "train demo --optim.lr 3 --help",
    ),
]


@pytest.fixture
def ask(capsys, monkeypatch):
    """A function that gives the help of a command, at a width of the terminal."""

    def run(command: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit, match="0"):
            cli.run(command.split())
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("asked", COMMANDS)
def test_every_command_helps_wherever_it_is_asked(asked, ask):
    text = ask(asked)
    words = [word for word in asked.split() if word not in ("help", "demo") and not word.startswith("-")]
    command = "plot schedule" if words[:2] == ["plot", "schedule"] else words[0]
    assert text.startswith(f"usage: polyvit-fast {command}")
    assert f"$ polyvit-fast {command}" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("command", ["train polyvit_b16 --help", "train polyvit_b16 --help-all", "eval --help"])
def test_no_word_is_broken_at_any_width(command, width, ask):
    words = set(ask(command, 10_000).split())
    text = ask(command, width)
    assert set(text.split()) == words
    assert 78 < max(map(len, text.splitlines())) <= min(width, 140) or width == 80


def test_first_the_fields_that_people_use_with_their_values(ask):
    text = ask("train demo --help")
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert 15 < len(flags) < 30
    assert len(text.splitlines()) < 120
    assert all(f"\n{title}\n" in text for title in USED)
    assert "--tasks.NAME.batch INT" in text
    one_line = " ".join(text.split())
    assert "shapes 1700, textures 1350, motion 350, tones 420, chords 180" in one_line
    assert "NAME is a task: shapes, textures, motion, tones, chords." in one_line
    assert "(default: 0.0007)" in text
    assert "--help-all shows all fields." in one_line
    assert "--tasks.shapes" not in text


def test_fields_of_nine_tasks_are_shown_once(ask):
    text = ask("train polyvit_b16 --help")
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --tasks.")]
    assert len(flags) < 10
    assert all(flags.count(flag) == (2 if flag.endswith("path") else 1) for flag in flags)  # folders and tables
    assert "imagenet data/imagenet/train, cifar100 data/cifar100/train" in " ".join(text.split())


def test_all_fields_are_shown_in_groups(ask):
    config = experiments.load("demo")
    text = ask("train demo --help-all")
    for entry in merge_tasks(list_flags(config), config):
        assert f"\n  {entry.name}" in text
    one_line = " ".join(text.split())
    for title in ("optim: The optimizer", "data: How files are read", "tasks.NAME.modality (of motion): "):
        assert title in one_line


def test_one_task_is_named(ask):
    text = ask("train smoke --only clips --help")
    assert "--tasks.clips.steps INT" in text
    assert "The task is clips." in text
    assert "pictures" not in text


def test_without_an_experiment_it_says_how_to_see_the_fields(ask):
    assert "`polyvit-fast train demo --help`" in " ".join(ask("train --help").split())
    assert "--num-workers INT" in ask("check --help")


def test_help_imports_no_pytorch():
    code = "import sys; from polyvit_fast import cli\ntry: cli.run(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    for command in (["--help"], ["train", "polyvit_b16", "--help"], ["list"]):
        subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
