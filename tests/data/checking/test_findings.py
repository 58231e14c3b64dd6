import os
from dataclasses import replace

from tar_files import pair, write_shard
from tiny_runs import tile_task

from polyvit_fast.data.checking.findings import Verdict, write_clean_manifest
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.media import Media, Sample


def test_members_of_shards_and_odd_names_come_back(tmp_path):
    members = [("a, b.jpg", b"x"), ("a, b.json", b"[2, 0]"), ("1.jpg", b"xy"), ("1.json", b"[]"), ("a//b.jpg", b"x"), ("a//b.cls", b"1")]
    shard = write_shard(tmp_path / "s.tar", members)
    task = tile_task(loss="sigmoid", multi_label=True)
    samples = Shards(paths=(shard,)).samples(task)
    name = os.fsdecode(b'quote" \xe9\n.jpg')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_bytes(b"x")
    folder = Folder(path=str(tmp_path))
    samples = [*samples, *folder.samples(tile_task(train=folder, val=folder, num_classes=1))]
    write_clean_manifest(tmp_path / "out" / "list.csv", task, samples, [Verdict(0, "", ""), Verdict(1, "", "")])
    assert Manifest(path=str(tmp_path / "out" / "list.csv")).samples(task) == samples
    assert os.listdir(tmp_path / "out") == ["list.csv"]
    write_clean_manifest(tmp_path / "out" / "list.csv", task, samples, [Verdict(0, "", "broken"), Verdict(1, "", "")])
    assert Manifest(path=str(tmp_path / "out" / "list.csv")).samples(task) == samples[1:]


def test_names_of_classes_are_written_where_the_task_has_them(tmp_path):
    (tmp_path / "classes.txt").write_text("polar bear\nwolf\n7\n")
    (tmp_path / "in.csv").write_text("path,label\n/a.jpg,wolf\n/b.jpg,polar bear\n/c.jpg,7\n")
    source = Manifest(path=str(tmp_path / "in.csv"), classes=str(tmp_path / "classes.txt"))
    task = tile_task(train=source, val=source)
    write_clean_manifest(tmp_path / "out" / "t-train.csv", task, source.samples(task), [])
    assert (tmp_path / "out" / "t-classes.txt").read_text() == "polar bear\nwolf\n7\n"
    for classes in (tmp_path / "classes.txt", tmp_path / "out" / "t-classes.txt"):
        again = replace(source, path=str(tmp_path / "out" / "t-train.csv"), classes=str(classes))
        assert again.samples(replace(task, train=again)) == source.samples(task)


def test_paths_are_absolute_and_otherwise_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "far" / "x.jpg").write_bytes(b"the right one")
    (tmp_path / "here" / "x.jpg").write_bytes(b"another one")
    monkeypatch.chdir(tmp_path / "here")
    write_clean_manifest(tmp_path / "list.csv", tile_task(), [Sample(Media("link/../x.jpg"), (0,))], [])
    (sample,) = Manifest(path=str(tmp_path / "list.csv")).samples(tile_task())
    assert os.path.isabs(sample.media.path)
    assert sample.media.read() == b"the right one"


def test_shards_and_files_of_any_name_come_back(tmp_path):
    (tmp_path / "of.tar:").mkdir()
    shards = [
        write_shard(tmp_path / name, pair(f"{number}:x", 1)) for number, name in enumerate(("s.tar.000", "S.TAR", "of.tar:/s", "a:b.tar"))
    ]
    task = tile_task()
    samples = list(Shards(paths=tuple(shards)).samples(task))
    for name in ("12:30.jpg", "s.tar.000:file.jpg"):
        (tmp_path / name).write_bytes(b"x")
        samples.append(Sample(Media(str(tmp_path / name)), (2,)))
    write_clean_manifest(tmp_path / "list.csv", task, samples[::-1], [])
    assert Manifest(path=str(tmp_path / "list.csv")).samples(task) == samples[::-1]
