import io
import json
import os
import tarfile

import pytest
from tar_files import pair, write_shard

from polyvit_fast.data.sources import shard_index
from polyvit_fast.data.sources.shard_index import read_index


def members_of(path):
    return [media.member for example in read_index(str(path)) for media in example.media]


def test_the_index_is_written_once_and_used(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    first = read_index(path)
    assert os.path.exists(f"{path}.index.json")
    monkeypatch.setattr(shard_index, "_scan", lambda shard: pytest.fail("the tar was read again"))
    assert read_index(path) == first


def test_a_changed_shard_is_read_again(tmp_path):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    before = read_index(path)
    status = os.stat(path)
    write_shard(path, [("0.txt", bytes(20_000)), *pair("0", 2)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size, the old time
    assert read_index(path)[0].labels == (2,)
    assert read_index(path)[0].media[1].offset != before[0].media[0].offset
    write_shard(path, [("0.txt", bytes(20_000)), *pair("0", 0)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the old size, another time
    assert read_index(path)[0].labels == (0,)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": 1}', "[" * 5000, "offset", "labels"])
def test_a_damaged_index_is_replaced(tmp_path, damage):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    good = read_index(path)
    index = tmp_path / "s.tar.index.json"
    text = index.read_text()
    if damage == "offset":
        damage = text.replace('["0.jpg", 512,', '["0.jpg", 51200000,')
    elif damage == "labels":
        damage = text.replace("[1]", "[1.5]")
    assert damage != text
    index.write_text(damage)
    assert read_index(path) == good
    assert index.read_text() == text


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))

    def fail(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shard_index, "write_atomically", fail)
    assert read_index(path)[0].labels == (1,)
    assert os.listdir(tmp_path) == ["s.tar"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    (tmp_path / "s.tar.index.json").mkdir()
    assert read_index(path)[0].labels == (1,)
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


def test_other_kinds_of_members_are_refused_by_their_kind(tmp_path):
    path = write_shard(tmp_path / "s.tar", [*pair("0", 1), ("1.jpg", b"x")], type=b"M")
    with pytest.raises(ValueError, match=r"member '0.jpg': it is of tar's kind 'M'; only plain files are allowed"):
        read_index(path)


def test_folders_and_the_name_of_a_tape_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        volume = tarfile.TarInfo("shard.of.jpg")
        volume.type = b"V"
        tar.addfile(volume)
        (tmp_path / "x").mkdir()
        tar.add(tmp_path / "x", "x.jpg")
        for name, content in pair("x.jpg/0", 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert members_of(tmp_path / "s.tar") == ["x.jpg/0.jpg"]


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "v7": None}


def tar_bytes(members, kind="pax", **options):
    """A tar in memory; `v7`: without the magic number that came later."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind] if FORMATS[kind] is not None else tarfile.USTAR_FORMAT, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = bytearray(out.getvalue())
    if kind == "v7":
        start = 0
        while content[start]:
            header = content[start : start + 345]
            header[257:345] = bytes(88)
            header[148:156] = b" " * 8
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            content[start : start + 345] = header
            start += 512 + -(-int(content[start + 124 : start + 135], 8) // 512) * 512
    return bytes(content)


@pytest.mark.parametrize("kinds", [("pax", "pax"), ("v7", "gnu", "pax"), ("ustar", "v7"), ("gnu", "ustar", "ustar", "gnu")])
@pytest.mark.parametrize("between", [0, 512, 10_240, 3 << 20])
def test_archives_that_were_concatenated_are_read_to_the_last_one(tmp_path, kinds, between):
    parts = [tar_bytes(pair(f"{number}/0", number), kind) for number, kind in enumerate(kinds)]
    (tmp_path / "s.tar").write_bytes(bytes(between).join(parts))
    examples = read_index(str(tmp_path / "s.tar"))
    assert [example.labels for example in examples] == [(number,) for number in range(len(kinds))]
    assert [example.media[0].read() for example in examples] == [f"pixels of {number}/0".encode() for number in range(len(kinds))]


def test_archives_appended_behind_cut_padding_or_with_none_left(tmp_path):
    first, second = tar_bytes(pair("0", 1)), tar_bytes(pair("1", 2))
    end = len(first.rstrip(b"\0")) // 512 * 512 + 512
    for number in (0, 512, 700, 1024, 2000):  # bytes of the end mark that are left
        (tmp_path / f"{number}.tar").write_bytes(first[: end + number] + second)
        assert members_of(tmp_path / f"{number}.tar") == ["0.jpg", "1.jpg"]


def test_long_names_in_every_part(tmp_path):
    names = [f"{'d' * 90}/{'n' * 150}{number}" for number in range(4)]
    parts = [tar_bytes(pair(name, 1), kind) for name, kind in zip(names, ("gnu", "pax", "gnu", "pax"), strict=True)]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    assert members_of(tmp_path / "s.tar") == [f"{name}.jpg" for name in names]


def test_global_headers_hold_for_their_own_archive(tmp_path):
    first = tar_bytes(pair("0", 1), pax_headers={"comment": "a commit"})
    (tmp_path / "s.tar").write_bytes(first + tar_bytes(pair("1", 1), pax_headers={"comment": "another"}) + tar_bytes(pair("2", 1), "gnu"))
    assert members_of(tmp_path / "s.tar") == ["0.jpg", "1.jpg", "2.jpg"]


def test_members_that_were_appended(tmp_path):
    path = write_shard(tmp_path / "s.tar", pair("0", 1))
    read_index(path)
    with tarfile.open(path, "a") as tar:
        for name, content in pair("1", 2):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert members_of(path) == ["0.jpg", "1.jpg"]
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("0.jpg")
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"member '0.jpg': it appears twice"):
        read_index(path)


def test_samples_of_concatenated_archives_are_not_mixed(tmp_path):
    one, two = tar_bytes(pair("x/0", 1, "png")), tar_bytes([("x/0.jpg", b"other"), ("x/0.json", b"0")])
    (tmp_path / "s.tar").write_bytes(one + two)
    with pytest.raises(
        ValueError, match=r"member 'x/0.jpg': sample x/0 is in two of the archives that are concatenated in this file; give"
    ):
        read_index(str(tmp_path / "s.tar"))
    pictures, labels = (tar_bytes(members) for members in zip(pair("0", 1), pair("1", 2), strict=True))
    (tmp_path / "s.tar").write_bytes(pictures + labels)  # a tar of pictures and a tar of their labels
    assert [(example.media[0].member, example.labels) for example in read_index(str(tmp_path / "s.tar"))] == [
        ("0.jpg", (1,)),
        ("1.jpg", (2,)),
    ]


def test_an_index_of_a_version_that_saw_the_first_archive_alone_is_not_used(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes(pair("0", 1)) + tar_bytes(pair("1", 2)))
    status = path.stat()
    old = {"version": 1, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "examples": [["0", [1], [["0.jpg", 512, 11]]]]}
    (tmp_path / "s.tar.index.json").write_text(json.dumps(old))
    assert members_of(path) == ["0.jpg", "1.jpg"]
    assert json.loads((tmp_path / "s.tar.index.json").read_text())["version"] == shard_index.INDEX_VERSION


@pytest.mark.parametrize("junk", [b"\n", b"junk" * 500, b"\x1f\x8b" + bytes(600), b"x" * 512 + bytes(1024)])
@pytest.mark.parametrize("second", [b"", tar_bytes(pair("1", 1))])
def test_what_is_no_archive_behind_an_end_mark_is_refused(tmp_path, junk, second):
    first = tar_bytes(pair("0", 1))
    (tmp_path / "s.tar").write_bytes(first + junk + second)
    with pytest.raises(
        ValueError, match=rf"s.tar: damaged: behind the tar's end mark, at byte {len(first)}, is something that is no tar header"
    ):
        read_index(str(tmp_path / "s.tar"))
    assert not os.path.exists(tmp_path / "s.tar.index.json")


@pytest.mark.parametrize("zeros", [0, 1, 511, 512, 20_000, 5 << 20])
def test_zeros_behind_the_end_mark_are_padding(tmp_path, zeros):
    (tmp_path / "s.tar").write_bytes(tar_bytes(pair("0", 1)) + bytes(zeros))
    assert members_of(tmp_path / "s.tar") == ["0.jpg"]


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (100, "damaged: behind the tar's end mark, at byte 10240, is something that is no tar header"),
        (515, "truncated at member '1.jpg' or behind it .unexpected end of data"),
        (1024, "truncated: the tar's end mark is missing"),
        (1100, "truncated: the tar's end mark is missing"),
        (2048, "truncated: the tar's end mark is missing"),
    ],
)
def test_a_cut_in_the_second_archive(tmp_path, left, message):
    (tmp_path / "s.tar").write_bytes(tar_bytes(pair("0", 1)) + tar_bytes(pair("1", 2))[:left])
    with pytest.raises(ValueError, match=rf"s.tar: {message}"):
        read_index(str(tmp_path / "s.tar"))


def test_members_of_one_sample_that_tell_its_class_twice(tmp_path):
    path = write_shard(tmp_path / "s.tar", [*pair("0", 1), ("0.CLS", b"2")])
    with pytest.raises(ValueError, match=r"member '0.CLS': '0.cls' states the classes of the same sample"):
        read_index(path)


def test_names_that_are_no_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9\n\t,\"'")
    for kind in ("pax", "gnu", "ustar"):
        (tmp_path / f"{kind}.tar").write_bytes(tar_bytes(pair(name, 1), kind, encoding="utf-8", errors="surrogateescape"))
        for _ in range(2):  # from the tar, from the index file
            (example,) = read_index(str(tmp_path / f"{kind}.tar"))
            assert (example.key, example.media[0].member, example.media[0].read()[:6]) == (name, f"{name}.jpg", b"pixels")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), r"not an uncompressed tar file, or a truncated one"),
        (lambda path: path.write_bytes(b"no tar" * 300), r"not an uncompressed tar file, or a truncated one"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), r"truncated at member '0.jpg' or behind it \(unexpected end of data\)"),
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
    with pytest.raises(ValueError, match=rf"shard .*s.tar: {message}"):
        read_index(str(path))
    assert not os.path.exists(f"{path}.index.json")


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_shards_are_refused_by_their_compression(tmp_path, mode, kind):
    with tarfile.open(tmp_path / "s.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(ValueError, match=f"s.tar: not an uncompressed tar file but one of {kind}: .* so unpack it first$"):
        read_index(str(tmp_path / "s.tar"))
