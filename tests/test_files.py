import os

import pytest

from polyvit_fast.files import absolute, make_folder, write_atomically


@pytest.mark.parametrize("durable", [False, True])
def test_the_file_is_replaced_whole(tmp_path, durable):
    path = tmp_path / "a.txt"
    for content, expected in (("first\n", b"first\n"), (b"\0\xff", b"\0\xff"), ("é\udcff\r\n", b"\xc3\xa9\xff\r\n")):
        write_atomically(path, content, durable=durable)
        assert path.read_bytes() == expected
    write_atomically(str(path), "")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_bytes() == b""


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new", durable=True)
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "a.txt", "text")


def test_the_whole_path_for_a_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/link/../b") == f"{tmp_path}/a/link/../b"
    assert absolute(tmp_path / "a") == f"{tmp_path}/a"


def test_a_folder_is_kept_with_what_was_put_in_and_else_gone_with_its_parents(tmp_path):
    folder = tmp_path / "there" / "deep" / "deeper"
    (tmp_path / "there").mkdir()
    with make_folder(folder):
        assert folder.is_dir()
    assert os.listdir(tmp_path / "there") == []
    with pytest.raises(KeyboardInterrupt), make_folder(folder):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "there") == []
    with make_folder(folder):
        (folder.parent / "a.txt").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "deep", "a.txt"]
    with make_folder(folder):
        (folder / "b.txt").touch()
    with make_folder(folder):
        (folder / "b.txt").unlink()
    assert folder.is_dir()  # it was there before
    with pytest.raises(NotADirectoryError), make_folder(folder.parent / "a.txt" / "x"):
        raise AssertionError("never entered")
