import io
import os
import tarfile

import pytest
from tiny_runs import tile_task

from polyvit_fast.data.manifest import Folder, Manifest
from polyvit_fast.media import Media, Sample


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    return folder


def listed(samples):
    return [(sample.media.path, sample.labels) for sample in samples]


def test_class_folders_in_sorted_order(tmp_path):
    fill(tmp_path, "dog/b.jpg", "dog/a.JPEG", "cat/10.png", "cat/9.png", "Zebra/deep/er/x.webp", "Zebra/w", "notes.txt", ".cache/x.jpg")
    fill(tmp_path, "dog/.DS_Store", "dog/.hidden/a.jpg")
    samples = Folder(path=str(tmp_path)).samples(tile_task(num_classes=3))
    expected = [("Zebra/w", 0), ("Zebra/deep/er/x.webp", 0), ("cat/10.png", 1), ("cat/9.png", 1), ("dog/a.JPEG", 2), ("dog/b.jpg", 2)]
    assert listed(samples) == [(str(tmp_path / name), (label,)) for name, label in expected]


def test_an_empty_class_folder_is_named(tmp_path):
    fill(tmp_path, "cat/a.jpg", "dog/.DS_Store")
    with pytest.raises(ValueError, match=r"class folder .*dog is empty"):
        Folder(path=str(tmp_path)).samples(tile_task(num_classes=2))


def test_as_many_class_folders_as_classes(tmp_path):
    fill(tmp_path, *(f"class{i}/a.jpg" for i in range(4)))
    with pytest.raises(ValueError, match=r"4 class folders \(class0, class1, class2, …\) where num_classes = 3"):
        Folder(path=str(tmp_path)).samples(tile_task(num_classes=3))


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "No such file or directory"), ("a.jpg", "Not a directory")])
def test_a_folder_must_be_one(tmp_path, name, reason):
    fill(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=f"folder .*{name}: {reason}"):
        Folder(path=str(tmp_path / name)).samples(tile_task())


def manifest(tmp_path, text, name="list.csv", **fields):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return Manifest(path=str(path), **fields)


def test_a_table_of_numbers(tmp_path):
    source = manifest(tmp_path, 'path,label\na.jpg,0\n\n/data/b.jpg,2\n"c,d.jpg",1\n')
    expected = [(str(tmp_path / "a.jpg"), (0,)), ("/data/b.jpg", (2,)), (str(tmp_path / "c,d.jpg"), (1,))]
    assert listed(source.samples(tile_task())) == expected


def test_columns_may_stand_in_any_order_and_paths_start_at_root(tmp_path):
    source = manifest(tmp_path, "\ufeffsize\tLabel\tPath\n12\t1\tx y.jpg\n", "list.tsv", root="/data/images")
    assert listed(source.samples(tile_task())) == [("/data/images/x y.jpg", (1,))]


def test_several_labels(tmp_path):
    task = tile_task(num_classes=5, loss="sigmoid", multi_label=True)
    source = manifest(tmp_path, "path,labels\na,0 4\nb,3;1\nc,\nd,2\ne,1 1 ; 2\nf,1;1\n")
    with pytest.raises(ValueError, match=r"line 6: label '1 1 ; 2' is not a class number"):
        source.samples(task)
    source = manifest(tmp_path, "path,labels\na,0 4\nb,3;1\nc,\nd,2\nf,1;1\n")
    assert [sample.labels for sample in source.samples(task)] == [(0, 4), (3, 1), (), (2,), (1,)]


def test_class_names(tmp_path):
    (tmp_path / "classes.txt").write_text("Dog\nMale speech, man speaking\nMusic\n\n")
    text = 'path,labels\na,Dog\nb,"Male speech, man speaking"\nc,"Music;Male speech, man speaking"\nd,Music Dog\n'
    source = manifest(tmp_path, text, classes=str(tmp_path / "classes.txt"))
    samples = source.samples(tile_task(loss="sigmoid", multi_label=True))
    assert [sample.labels for sample in samples] == [(0,), (1,), (2, 1), (2, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv, line 1: the columns must be named, among them path and either label or labels; it names none"),
        ("a.jpg,0\nb.jpg,1\n", "line 1: the columns must be named, .* it names a.jpg, 0"),
        ("path,label,labels\na.jpg,0,0\n", "line 1: .* either label or labels"),
        ("path,label\n", "manifest .*list.csv: it lists no samples"),
        ("path,label\na.jpg,0\nb.jpg\n", "list.csv, line 3: 1 columns where the first line names 2: too few"),
        ("path,label\na,b.jpg,0\n", "line 2: 3 columns where the first line names 2: too many; put a path that holds the separator in"),
        ("path,label\na.jpg,0\nb.jpg,3\n", "list.csv, line 3: label 3 is out of range; num_classes = 3 allows 0 to 2"),
        ("path,label\na.jpg,-1\n", "line 2: label -1 is out of range"),
        ("path,label\na.jpg,dog\n", "line 2: label 'dog' is not a class number; to use names, set classes to a file that lists them"),
        ("path,label\na.jpg,1.0\n", "line 2: label '1.0' is not a class number"),
        ("path,label\na.jpg,1_0\n", "line 2: label '1_0' is not a class number"),
        ("path,label\na.jpg,\n", "line 2: it has no label"),
        ("path,labels\na.jpg,0;1\n", "line 2: 2 labels where the task has one per sample; set multi_label = True to allow several"),
        ("path,label\n,1\n", "line 2: the path '' is empty"),
        ('path,label\n"a.jpg,1\nb.jpg,1\n', "line 3: unexpected end of data"),
        ("path,label\na\x00.jpg,1\n", r"line 2: the path .* holds a NUL character"),
        ("path,label\nno.tar:a.jpg,1\n", "line 2: shard .*no.tar: No such file or directory"),
    ],
)
def test_faults_are_told_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        manifest(tmp_path, text).samples(tile_task())


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"manifest .*no.csv: No such file or directory"):
        Manifest(path=str(tmp_path / "no.csv")).samples(tile_task())


@pytest.mark.parametrize(
    ("names", "cell", "message"),
    [
        ("cat\ndog\nbird\n", "dgo", r"list.csv, line 2: label 'dgo' is not among the 3 names in .*classes.txt"),
        ("cat\ndog\nbird\n", "1", r"line 2: label '1' is not among the 3 names"),
        ("cat\ndog\n", "cat", r"classes .*classes.txt: it lists 2 names where num_classes = 3"),
        ("cat\ndog\ncat\n", "cat", r"classes .*classes.txt: 'cat' appears twice"),
        (None, "cat", r"classes .*classes.txt: No such file or directory"),
    ],
)
def test_faults_with_class_names(tmp_path, names, cell, message):
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    source = manifest(tmp_path, f"path,label\na.jpg,{cell}\n", classes=str(tmp_path / "classes.txt"))
    with pytest.raises(ValueError, match=message):
        source.samples(tile_task())


def test_members_of_shards(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("x/a.jpg", "x/b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(name[-5:].encode()))
    source = manifest(tmp_path, "path,label\ns.tar:x/b.jpg,1\n")
    [sample] = source.samples(tile_task())
    assert sample == Sample(Media(f"{tmp_path}/s.tar", sample.media.offset, 5, "x/b.jpg"), (1,))
    assert sample.media.read() == b"b.jpg"
    with pytest.raises(ValueError, match=r"line 2: shard .*s.tar has no media member 'x/c.jpg'"):
        manifest(tmp_path, "path,label\ns.tar:x/c.jpg,1\n").samples(tile_task())


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9.jpg,1\n")
    (tmp_path / name).write_bytes(b"content")
    [sample] = Manifest(path=str(tmp_path / "list.csv")).samples(tile_task())
    assert sample.media.read() == b"content"
