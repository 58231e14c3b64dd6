import io
import json
import os
import tarfile
from types import SimpleNamespace

import pytest
from tiny_runs import tile_task

from polyvit_fast.data import shards
from polyvit_fast.data.shards import Shards, read_index


def write_shard(path, members, **changes):
    """A tar file of (name, content) pairs; `changes` are set on every header."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def pair(key, label, suffix="jpg"):
    return [(f"{key}.{suffix}", f"pixels of {key}".encode()), (f"{key}.cls", str(label).encode())]


def samples_of(*paths, task=None, **fields):
    return Shards(paths=paths, **fields).samples(task or tile_task())


def test_samples_are_read_by_their_place(tmp_path):
    long_name = "folder/" + "n" * 200 + ".jpg"
    members = [
        *pair("a/000", 2),
        *pair("b/000", 0),
        *reversed(pair("a/001", 1, "JPG")),
        (long_name, b"long"),
        (long_name[:-3] + "cls", b"1\n"),
    ]
    path = write_shard(tmp_path / "s.tar", [("._a.jpg", b"mac"), ("README", b"text"), ("notes.txt", b"text"), *members])
    samples = samples_of(path)
    assert [sample.media.name for sample in samples] == [f"{path}:{n}" for n in ("a/000.jpg", "b/000.jpg", "a/001.JPG", long_name)]
    assert [sample.labels for sample in samples] == [(2,), (0,), (1,), (1,)]
    assert [sample.media.read() for sample in samples] == [b"pixels of a/000", b"pixels of b/000", b"pixels of a/001", b"long"]


def test_labels_in_json(tmp_path):
    task = tile_task(num_classes=9, loss="sigmoid", multi_label=True)
    contents = [{"label": 3, "caption": "x"}, {"labels": [1, 8, 1]}, {"labels": []}, 5]
    members = [m for i, c in enumerate(contents) for m in ((f"{i}.jpg", b"x"), (f"{i}.json", json.dumps(c).encode()))]
    path = write_shard(tmp_path / "s.tar", [*members, ("4.jpg", b"x"), ("4.json", b'{"label": 7}'), ("4.cls", b"6")])
    assert [sample.labels for sample in samples_of(path, task=task)] == [(3,), (1, 8), (), (5,), (6,)]


def test_one_of_several_media_members(tmp_path):
    path = write_shard(tmp_path / "s.tar", [("0.mp4", b"video"), ("0.wav", b"audio"), ("0.cls", b"1")])
    assert samples_of(path, media_suffix="wav")[0].media.read() == b"audio"
    with pytest.raises(ValueError, match=r"sample 0: it must hold one media member but holds 0.mp4, 0.wav; set media_suffix to choose"):
        samples_of(path)
    with pytest.raises(ValueError, match=r"sample 0: it must hold one .flac member but holds 0.mp4, 0.wav"):
        samples_of(path, media_suffix="flac")


def test_patterns(tmp_path):
    for name in ("t-08", "t-09", "t-10", "v-b", "v-a"):
        write_shard(tmp_path / f"{name}.tar", pair(name, 1))

    def keys(*patterns):
        return [sample.media.member[:-4] for sample in samples_of(*(f"{tmp_path}/{pattern}" for pattern in patterns))]

    assert keys("t-{08..10}.tar") == ["t-08", "t-09", "t-10"]
    assert keys("v-{b,a}.tar", "t-08.tar") == ["v-b", "v-a", "t-08"]
    assert keys("*.tar") == ["t-08", "t-09", "t-10", "v-a", "v-b"]
    assert keys("{t,v}-?*.tar") == ["t-08", "t-09", "t-10", "v-a", "v-b"]
    with pytest.raises(ValueError, match=r"shard .*/t-11.tar: no such file"):
        keys("t-{08..11}.tar")
    with pytest.raises(ValueError, match=r"shard .*/w-\*.tar: no such file"):
        keys("w-*.tar")
    with pytest.raises(ValueError, match=r"shard .*/t-08.tar appears twice in paths"):
        keys("t-08.tar", "*.tar")


@pytest.mark.parametrize("paths", [(), "train.tar"])
def test_paths_are_a_tuple(paths):
    with pytest.raises(ValueError, match=r"paths = .* must be a tuple of file names or patterns"):
        Shards.__post_init__(SimpleNamespace(paths=paths))  # the constructor's types are checked here before its values


def test_the_index_is_written_once_and_used(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    first = read_index(path)
    assert os.path.exists(f"{path}.index.json")
    monkeypatch.setattr(shards, "_scan", lambda shard: pytest.fail("the tar was read again"))
    assert read_index(path) == first


def test_a_changed_shard_is_read_again(tmp_path):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    before = samples_of(path)
    status = os.stat(path)
    write_shard(path, [("0.txt", bytes(20_000)), *pair("0", 2)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size, the old time
    assert samples_of(path)[0].labels == (2,)
    assert samples_of(path)[0].media.offset != before[0].media.offset
    write_shard(path, [("0.txt", bytes(20_000)), *pair("0", 0)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the old size, another time
    assert samples_of(path)[0].labels == (0,)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": 1}', "[" * 5000, "offset", "labels"])
def test_a_damaged_index_is_replaced(tmp_path, damage):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    good = samples_of(path)
    index = tmp_path / "s.tar.index.json"
    text = index.read_text()
    if damage == "offset":
        damage = text.replace('["0.jpg", 512,', '["0.jpg", 51200000,')
    elif damage == "labels":
        damage = text.replace("[1]", '["x"]')
    assert damage != text
    index.write_text(damage)
    assert samples_of(path) == good
    assert index.read_text() == text


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    monkeypatch.setattr(shards, "uuid4", lambda: type("Name", (), {"hex": "no/such/folder"}))
    assert samples_of(path)[0].labels == (1,)
    assert os.listdir(tmp_path) == ["s.tar"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    (tmp_path / "s.tar.index.json").mkdir()
    assert samples_of(path)[0].labels == (1,)
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index.json"]


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../x.jpg", "a/../../x.jpg", "..", "a\\..\\x.jpg", "\\\\host\\x.jpg"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = write_shard(tmp_path / "s.tar", [*pair("0", 1), (name, b"x")])
    with pytest.raises(ValueError, match=r"shard .*s.tar, member .*: its name is absolute or leaves the folder"):
        read_index(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_shard(tmp_path / "s.tar", [("0.jpg", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match=r"shard .*s.tar, member '0.jpg': it is a link, a device or a sparse file"):
        read_index(path)


def test_sparse_members_are_refused(tmp_path):
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.jpg", "GNU.sparse.realsize": "4"}
    path = write_shard(tmp_path / "s.tar", [("0.jpg", b"1\n0\n4\n".ljust(512, b"\0") + b"data")], pax_headers=pax)
    with pytest.raises(ValueError, match=r"member '0.jpg': it is a link, a device or a sparse file"):
        read_index(path)


def test_folders_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        (tmp_path / "x").mkdir()
        tar.add(tmp_path / "x", "x.jpg")
        for name, content in pair("x.jpg/0", 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [sample.media.member for sample in samples_of(str(tmp_path / "s.tar"))] == ["x.jpg/0.jpg"]


MEMBER_FAULTS = {
    "twice": ([*pair("0", 1), ("0.jpg", b"x")], r"member '0.jpg': it appears twice"),
    "no class": ([("0.jpg", b"x")], r"sample 0: it has no class; it needs a .cls member, or"),
    "json without class": ([("0.jpg", b"x"), ("0.json", b'{"caption": ""}')], r"sample 0: it has no class"),
    "no media": ([("0.cls", b"1"), ("0.pkl", b"x")], r"sample 0: it must hold one media member but holds none"),
    "word": (pair("0", "dog"), r"member '0.cls': 'dog' is not a class number"),
    "broken json": ([("0.jpg", b"x"), ("0.json", b"{")], r"member '0.json': '{' is not JSON"),
    "deep json": ([("0.jpg", b"x"), ("0.json", b"[" * 100_000)], r"member '0.json': .* is not JSON"),
    "text label": ([("0.jpg", b"x"), ("0.json", b'{"label": "1"}')], r"member '0.json': '1' is not a class number or a list of them"),
    "true label": ([("0.jpg", b"x"), ("0.json", b'{"label": true}')], r"member '0.json': True is not a class number"),
    "huge label": ([("0.jpg", b"x"), ("0.json", b" " * (1 << 20) + b"1")], r"member '0.json': 1048577 bytes are too many for a label"),
    "out of range": (pair("0", 3), r"shard .*s.tar, sample 0: label 3 is out of range; num_classes = 3 allows 0 to 2"),
    "negative": (pair("0", -1), r"sample 0: label -1 is out of range"),
    "several": ([("0.jpg", b"x"), ("0.json", b"[0, 1]")], r"sample 0: 2 labels where the task has one per sample; set multi_label"),
}


@pytest.mark.parametrize("kind", MEMBER_FAULTS)
def test_faults_name_shard_and_member(tmp_path, kind):
    members, message = MEMBER_FAULTS[kind]
    path = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        samples_of(path)
    assert f"shard {path}" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), r"not an uncompressed tar file, or a truncated one"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(2000)), r"not an uncompressed tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), r"truncated one \(unexpected end of data\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:2048]), r"truncated: the tar's end mark is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:1024] + b"garbage!" * 300), r"damaged: no valid header at byte 1024"),
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    ],
)
def test_damaged_shards(tmp_path, make, message):
    path = tmp_path / "s.tar"
    write_shard(path, pair("0", 1))
    make(path)
    with pytest.raises(ValueError, match=rf"shard .*s.tar: {message}|shard .*s.tar: .*{message}"):
        read_index(str(path))
    assert not os.path.exists(f"{path}.index.json")
