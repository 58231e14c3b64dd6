import pytest
from tiny_runs import tiny_config

from polyvit_fast import cli


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_help_and_version(capsys):
    assert cli.run(["--help"]) == 0
    text = printed(capsys)
    for command in cli.COMMANDS:
        assert f"polyvit-fast {command}" in text
    assert cli.run(["--version"]) == 0
    assert printed(capsys) == "0.7.0"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian demo", "command 'trian' is unknown; perhaps you meant train"),
        ("go demo", "command 'go' is unknown; there are: train, eval, predict, features"),
        ("train", "usage: polyvit-fast train EXPERIMENT"),
        ("train smok", "experiment 'smok' is unknown; perhaps you meant smoke"),
        ("train mine.py", "mine.py does not exist"),
        ("eval runs/nothing", "runs/nothing"),
        ("train smoke --schedule nonsense", "schedule = 'nonsense' is unknown; there are: task-by-task"),
        ("train smoke --schedule wieghted", "schedule = 'wieghted' is unknown; perhaps you meant weighted"),
        ("plot runs/nothing", "runs/nothing"),
        ("list foo", "list takes no further arguments, but got foo"),
        ("plot runs/x y", "Unrecognized argument y; see `polyvit-fast plot RUN --help`"),
        ("check smoke --num-wrokers 3", "Unrecognized flag --num-wrokers: perhaps you meant --num-workers"),
        ("eval runs/x extra", "Unrecognized argument extra"),
    ],
)
def test_wrong_commands_end_with_a_message_and_exit_code_2(here, capsys, command, words):
    assert cli.run(command.split()) == 2
    text = printed(capsys)
    assert words in text
    assert "Traceback" not in text


def test_bugs_are_printed_with_their_traceback(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "list", lambda arguments: tiny_config().nonsense)
    assert cli.run(["list"]) == 1
    assert "Traceback" in printed(capsys)
