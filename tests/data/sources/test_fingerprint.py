import os
import shutil

import pytest
from tar_files import pair, write_shard
from tiny_runs import tile_task

from polyvit_fast.data.sources import fingerprint
from polyvit_fast.data.sources.fingerprint import (
    find_changes,
    find_missing,
    fingerprint_list,
    fingerprint_names,
    is_known_by_files,
    take_fingerprint,
)
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.media import Media, Sample


def files(folder, count=6):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(bytes([number]) * 1000)
    return [Sample(Media(str(folder / f"{number}.jpg")), (number % 2,)) for number in range(count)]


def touch(path, seconds=7):
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def replace_keeping_the_time(path, content):
    status = os.stat(path)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_is_the_same_has_the_same_fingerprint(tmp_path):
    samples = files(tmp_path / "a")
    assert take_fingerprint(samples) == take_fingerprint(samples)
    assert find_changes(take_fingerprint(samples), take_fingerprint(samples), samples) == ("", True)


def test_names_labels_and_order():
    samples = [Sample(Media(os.fsdecode(b"caf\xe9")), (0,)), Sample(Media("b"), (1, 2))]
    before = take_fingerprint(samples)
    assert before["list"] == fingerprint_names(samples) == "2 files, 3d958813d6444f243705bddb9d75decd"  # as in checkpoints of 0.1 to 0.7
    for other in (samples[::-1], samples[:1], [samples[0], Sample(Media("b"), (1,))], [samples[0], Sample(Media("c"), (1, 2))]):
        now = take_fingerprint(other)
        assert find_changes(before, now, other) == (f"names and labels: {before['list']}; now {now['list']}", False)


def test_another_size_is_named(tmp_path):
    samples = files(tmp_path / "a")
    before = take_fingerprint(samples)
    replace_keeping_the_time(tmp_path / "a" / "3.jpg", b"x")
    assert find_changes(before, take_fingerprint(samples), samples) == (f"sizes of {tmp_path}/a/3.jpg", True)
    for number in range(5):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(b"x")
    names = ", ".join(f"{tmp_path}/a/{number}.jpg" for number in range(3))
    assert find_changes(before, take_fingerprint(samples), samples) == (f"sizes of {names} and 2 more", True)


@pytest.mark.parametrize("position", [0, 500, 999])
def test_other_contents_of_the_same_size_and_time_are_named(tmp_path, position):
    samples = files(tmp_path / "a")
    before = take_fingerprint(samples)
    content = bytearray(bytes([2]) * 1000)
    content[position] = 77
    replace_keeping_the_time(tmp_path / "a" / "2.jpg", bytes(content))
    assert find_changes(before, take_fingerprint(samples), samples) == (f"contents of {tmp_path}/a/2.jpg", True)


def test_of_large_files_both_ends_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "CONTENT_BYTES", 6 * 100)
    samples = files(tmp_path / "a")
    before = take_fingerprint(samples)
    for position, seen in ((49, True), (50, False), (949, False), (950, True)):
        content = bytearray(bytes([2]) * 1000)
        content[position] = 77
        replace_keeping_the_time(tmp_path / "a" / "2.jpg", bytes(content))
        assert bool(find_changes(before, take_fingerprint(samples), samples)[0]) == seen


def test_a_copy_has_other_times_alone(tmp_path):
    samples = files(tmp_path / "a")
    before = take_fingerprint(samples)
    touch(tmp_path / "a" / "5.jpg")
    now = take_fingerprint(samples)
    assert find_changes(before, now, samples) == ("", True)
    assert {word for word in now if now[word] != before[word]} == {"times"}


def test_a_missing_file_and_a_source_without_files(tmp_path):
    samples = files(tmp_path / "a")
    before = take_fingerprint(samples)
    (tmp_path / "a" / "0.jpg").unlink()
    assert find_changes(before, take_fingerprint(samples), samples) == (f"sizes of {tmp_path}/a/0.jpg", True)
    synthetic = [Sample(Media(f"synthetic:{number}"), (0,)) for number in range(5)]
    assert find_changes(take_fingerprint(synthetic), take_fingerprint(synthetic), synthetic) == ("", True)


def test_a_word_of_an_earlier_version_knows_names_alone(tmp_path):
    samples = files(tmp_path / "a")
    before = fingerprint_names(samples)
    assert find_changes(before, take_fingerprint(samples), samples) == ("", True)
    assert find_changes(before, take_fingerprint(samples[1:]), samples[1:])[1] is False


def test_many_files_are_reported_in_chunks_of_which_the_first_and_last_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "NUM_CHUNKS", 4)
    monkeypatch.setattr(fingerprint, "CONTENT_FILES", 3)
    samples = files(tmp_path / "a", 10)
    before = take_fingerprint(samples)
    replace_keeping_the_time(tmp_path / "a" / "8.jpg", b"x")
    expected = f"sizes of some of the 3 files from {tmp_path}/a/7.jpg to {tmp_path}/a/9.jpg"
    assert find_changes(before, take_fingerprint(samples), samples) == (expected, True)
    monkeypatch.setattr(fingerprint, "MAX_FILES", 5)
    every_second = take_fingerprint(samples)
    assert find_changes(every_second, take_fingerprint(samples), samples) == ("", True)
    (tmp_path / "a" / "6.jpg").write_bytes(b"x")
    assert find_changes(every_second, take_fingerprint(samples), samples)[0].startswith("sizes of ")


def test_members_of_a_shard_have_its_size_and_their_contents(tmp_path):
    path = write_shard(tmp_path / "s.tar", [*pair("0", 1), *pair("1", 2)])
    samples = Shards(paths=(path,)).samples(tile_task())
    before = take_fingerprint(samples)
    shutil.copy(path, tmp_path / "copy.tar")
    os.replace(tmp_path / "copy.tar", path)
    assert find_changes(before, take_fingerprint(Shards(paths=(path,)).samples(tile_task())), samples) == ("", True)
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content.replace(b"pixels of 1", b"PIXELS of 1"))
    assert find_changes(before, take_fingerprint(samples), samples) == (f"contents of {path}:1.jpg", True)
    (tmp_path / "s.tar").write_bytes(content + bytes(512))
    assert find_changes(before, take_fingerprint(samples), samples)[0].startswith(f"sizes of {path}:0.jpg, {path}:1.jpg")


def test_the_list_is_that_of_the_names_within_the_folder_that_all_have_in_common(tmp_path):
    def samples(*names: str) -> list[Sample]:
        return [Sample(Media(name), (0,)) for name in names]

    here = fingerprint_list(samples("data/train/cat/1.jpg", "data/train/dog/1.jpg", "data/train/dog/2.jpg"))
    assert here == fingerprint_list(samples("/mnt/cat/1.jpg", "/mnt/dog/1.jpg", "/mnt/dog/2.jpg"))
    assert here == fingerprint_list(samples("cat/1.jpg", "dog/1.jpg", "dog/2.jpg"))
    assert here != fingerprint_list(samples("data/train/cat/1.jpg", "data/train/dog/2.jpg", "data/train/dog/1.jpg"))
    assert here != fingerprint_list(samples("data/train/cat/1.jpg", "data/train/dog/1.jpg", "data/train/fog/2.jpg"))
    assert here != fingerprint_list(samples("data/train/cat/1.jpg", "data/test/dog/1.jpg", "data/train/dog/2.jpg"))
    assert fingerprint_list(samples("a/x1.jpg", "a/x2.jpg")) != fingerprint_list(samples("a/y1.jpg", "a/y2.jpg"))  # no part of a name
    members = [[Sample(Media(f"{folder}/s.tar", 512, 9, member), (0,)) for member in ("a.jpg", "b.jpg")] for folder in ("x", "y/z")]
    assert fingerprint_list(members[0]) == fingerprint_list(members[1])


def test_a_source_with_a_decoder_of_its_own_is_not_known_by_its_files():
    assert is_known_by_files(Shards(paths=("a.tar",)))
    assert is_known_by_files(Folder(path="a"))
    assert not is_known_by_files(Synthetic())


def test_a_file_that_is_gone_is_found(tmp_path):
    samples = files(tmp_path / "a")
    assert find_missing(samples) == ""
    (tmp_path / "a" / "2.jpg").unlink()
    assert find_missing(samples) == f"{tmp_path}/a/2.jpg"
