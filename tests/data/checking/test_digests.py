import hashlib
import os
import subprocess

from tar_files import pair, write_shard

from polyvit_fast.data.checking.digests import (
    CheckedSplit,
    EqualPair,
    find_contradictions,
    find_leaks,
    format_digests,
    read_digests,
    sha256,
)
from polyvit_fast.data.sources.shard_index import read_index
from polyvit_fast.media import Media, Sample

NAMES = ["plain.jpg", "with  blanks.jpg", "new\nline", "back\\slash\\n", "car\rriage", os.fsdecode(b"caf\xe9"), "🐱", " leading", "\\n"]


def test_the_digest_of_a_file_and_of_a_member_of_a_shard(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    assert sha256(Media(str(tmp_path / "a"))) == hashlib.sha256(b"hello").hexdigest()
    (example,) = read_index(write_shard(tmp_path / "s.tar", pair("0", 1)))
    assert sha256(example.media[0]) == hashlib.sha256(b"pixels of 0").hexdigest()
    assert sha256(Media(str(tmp_path / "missing"))) == ""


def test_any_name_comes_back(tmp_path):
    digests = [(name, hashlib.sha256(os.fsencode(name)).hexdigest()) for name in NAMES]
    path = tmp_path / "x.sha256"
    path.write_text(format_digests([*digests, ("unknown", "")]), errors="surrogateescape", newline="")
    assert read_digests(path) == dict(digests)
    assert read_digests(tmp_path / "missing") == {}


def test_the_form_is_that_of_sha256sum(tmp_path):
    names = [name for name in NAMES if "\r" not in name]  # older versions do not escape it
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    text = format_digests([(name, sha256(Media(str(tmp_path / name)))) for name in names])
    (tmp_path / "list").write_text(text, errors="surrogateescape", newline="")
    assert subprocess.run(["sha256sum", "--check", "--strict", "list"], cwd=tmp_path, capture_output=True).returncode == 0


def checked(*files: tuple[str, str, int]) -> CheckedSplit:
    return CheckedSplit([Sample(Media(name), (label,)) for name, _, label in files], [digest for _, digest, _ in files])


def test_leaks_are_validation_files_with_the_bytes_of_a_training_file():
    train = checked(("a", "1", 0), ("b", "2", 0), ("c", "2", 0), ("broken", "", 1))
    val = checked(("x", "2", 1), ("y", "3", 0), ("broken too", "", 0), ("z", "1", 0))
    assert list(find_leaks(train, val)) == [
        EqualPair("val", "x", (1,), "train", "b", (0,)),
        EqualPair("val", "z", (0,), "train", "a", (0,)),
    ]


def test_contradictions_are_equal_files_with_other_labels():
    split = checked(("a", "1", 0), ("b", "1", 0), ("c", "1", 2), ("d", "", 0), ("e", "", 1))
    assert list(find_contradictions("train", split)) == [EqualPair("train", "c", (2,), "train", "a", (0,))]
    order = CheckedSplit([Sample(Media("a"), (0, 1)), Sample(Media("b"), (1, 0))], ["1", "1"])
    assert list(find_contradictions("val", order)) == []
