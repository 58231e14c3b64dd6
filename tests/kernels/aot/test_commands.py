"""The help of commands, and where they refuse to write."""

import pytest

from polyvit_kernels.aot import commands

DOC = "What it does to 1% of them.\n\n    command --number 3     an example\n"


def test_help_is_the_docstring_as_written_and_every_default():
    parser = commands.parser(DOC, "command")
    parser.add_argument("--number", type=int, default=0, help="how many")
    parser.add_argument("--names", nargs="+", default=("a", "b"), help="which")
    parser.add_argument("--file", help="where")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    text = parser.format_help()
    assert DOC in text
    assert "how many (default: 0)" in text
    assert "which (default: a b)" in text
    assert text.count("(default: ") == 2


def test_folders_are_made_and_may_be_there_already(tmp_path):
    for _ in range(2):
        commands.make_folder(commands.parser(DOC), "--out", tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("below", [(), ("a", "b")], ids=str)
def test_a_file_where_a_folder_is_needed_is_the_commands_error(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        commands.make_folder(commands.parser(DOC), "--out", (tmp_path / "file").joinpath(*below))
    assert f"--out: {tmp_path}/file is a file; a folder is needed" in capsys.readouterr().err


def test_what_else_is_wrong_with_a_folder_is_the_commands_error_too(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.make_folder(commands.parser(DOC), "--out", tmp_path / ("x" * 300))
    assert "--out: [Errno 36] File name too long" in capsys.readouterr().err
