import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from polyvit_fast.media import MEDIA_SUFFIXES, Media, MediaError, MemoryMedia, printable


def test_a_file_of_its_own(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"hello")
    assert Media(str(path)).read() == b"hello"
    assert Media(str(path)).name == str(path)


def test_a_tar_member_reads_and_seeks_within_its_bounds(tmp_path):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(f"{name[0]}1234".encode()))
    with tarfile.open(shard) as tar:
        members = {m.name: Media(str(shard), m.offset_data, m.size, m.name) for m in tar}
    media = members["b.txt"]
    assert media.name == f"{shard}:b.txt"
    assert media.read() == b"b1234"
    with media.open() as stream:
        assert stream.seek(-2, os.SEEK_END) == 3
        assert stream.read(100) == b"34"
        assert stream.seek(1) == 1
        assert stream.read(2) == b"12"
        assert stream.seek(1, os.SEEK_CUR) == 4
        assert stream.read() == b"4"
        assert stream.read() == b""


def test_bytes_in_memory_are_read_like_a_file():
    media = MemoryMedia("mine", content=b"0123456789")
    assert (media.name, media.read()) == ("mine", b"0123456789")
    assert "0123" not in repr(media)
    part = replace(media, offset=3, size=4)
    assert part.read() == b"3456"
    with part.open() as stream:
        assert stream.seek(-2, os.SEEK_END) == 2
        assert stream.read(100) == b"56"
    with media.find_path() as path:
        assert Path(path).read_bytes() == b"0123456789"
        assert Media(path, 2, 3).read() == b"234"
    assert not os.path.exists(path)
    with pytest.raises(MediaError, match="the file is empty"):
        MemoryMedia("mine").read()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "the file is missing"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "the file cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, make, reason):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(MediaError, match=reason):
        Media(str(path)).read()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
        ("a\nb\tc\rd\x1b[31m\x7f", "a\\nb\\tc\\rd\\x1b[31m\\x7f"),
        ("naïve 猫 🐱", "naïve 猫 🐱"),
        ("\u202eexe", "\\u202eexe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable_texts_are_one_line_that_any_terminal_can_show(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_suffixes_of_media_are_in_lower_case_and_none_of_them_is_a_label():
    assert all(suffix == suffix.lower() and "." not in suffix for suffix in MEDIA_SUFFIXES)
    assert {"jpg", "jfif", "jpe", "jp2", "avif", "m2ts", "mka", "y4m", "rf64", "aifc", "ac3"} <= MEDIA_SUFFIXES
    assert not {"cls", "json", "txt", "npy", "pyd", "pth", "xml", "mat"} & MEDIA_SUFFIXES


def test_of_a_missing_file_the_whole_path_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match=f"^the file is missing: {tmp_path}/photos/a.jpg$"):
        Media("photos/a.jpg").read()
    with pytest.raises(MediaError, match=r"^the file is missing$"):
        Media(f"{tmp_path}/photos/a.jpg").read()  # its name, which stands before the reason, is whole already
