import subprocess
import sys

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
    assert printed(capsys) == "0.8.0"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian demo", "command 'trian' is unknown; perhaps you meant train"),
        ("go demo", "command 'go' is unknown; there are: train, eval, predict, features"),
        ("train", "usage: polyvit-fast train EXPERIMENT"),
        ("train smok", "experiment 'smok' is unknown; perhaps you meant smoke"),
        ("train mine.py", "mine.py does not exist"),
        ("train schedules", "The files of schedules are made by: python -m polyvit_fast.experiments.schedules_data"),
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_change_the_exit_code(closed):
    done = subprocess.run(["/bin/sh", "-c", f'exec "$0" -m polyvit_fast list {closed}', sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("smoke" in done.stdout) == (closed == "2>&-")


def test_no_file_gets_the_number_of_a_closed_stream():
    code = "import os; from polyvit_fast.__main__ import _open_what_is_closed as o; o(); print(os.open(os.devnull, os.O_RDONLY))"
    done = subprocess.run(["/bin/sh", "-c", f'exec "$0" -c "{code}" 2>&- <&-', sys.executable], capture_output=True, text=True)
    assert done.stdout == "3\n"


def test_help_into_a_pipe_that_is_closed_ends_with_0():
    command = [sys.executable, "-m", "polyvit_fast", "train", "polyvit_b16", "--help-all"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_usage_names_the_whole_command(capsys):
    assert cli.run(["plot", "schedule", "--schedule", "uniform", "smoke"]) == 2
    assert "polyvit-fast plot schedule smoke --schedule uniform" in capsys.readouterr().err
    assert cli.run(["plot"]) == 2
    assert "usage: polyvit-fast plot RUN [--option value ...]" in capsys.readouterr().err
