import csv
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import tile_task

from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.data.sources.label_cells import format_classes, format_labels
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.shards import Shards
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "class folder .*dog is empty$"),
        ((".DS_Store",), "class folder .*dog is empty of media; left out because of their names: 1 .DS_Store"),
        (("1.txt", "2.txt", "Thumbs.db"), "class folder .*dog is empty of media; left out because of their names: 2 .txt, 1 Thumbs.db"),
        (("1.wav",), "class folder .*dog is empty of media; left out because of their names: 1 .wav"),
    ],
)
def test_an_empty_class_folder_is_named(tmp_path, names, message):
    fill(tmp_path, "cat/a.jpg", *(f"dog/{name}" for name in names))
    (tmp_path / "dog").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        Folder(path=str(tmp_path)).samples(tile_task(num_classes=2, modality=Image(size=32)))


def test_what_a_folder_leaves_out_is_remarked(tmp_path):
    fill(tmp_path, "cat/a.jpg", "cat/Thumbs.db", "cat/a.txt", "dog/b.jpg", "dog/b.txt", "loose.jpg", "notes.txt", "__MACOSX/._cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "all").symlink_to(".")
    task = tile_task(num_classes=2, modality=Image(size=32))
    source = Folder(path=str(tmp_path))
    assert listed(source.samples(task)) == [(f"{tmp_path}/cat/a.jpg", (0,)), (f"{tmp_path}/dog/b.jpg", (1,))]
    assert source.remarks(task) == [
        f"{tmp_path}: left out, as their names are not those of image files: 2 .txt, 1 Thumbs.db",
        f"{tmp_path}: left out, because they are in no class folder: 1 .jpg",
        f"{tmp_path}: 2 links or folders lead to what is already listed ({tmp_path}/all, {tmp_path}/cat/up): counted once",
    ]
    assert Folder(path=str(fill(tmp_path / "plain", "x/a.jpg", "y/b.jpg"))).remarks(task) == []


def test_a_linked_class_and_a_linked_folder_in_a_class(tmp_path):
    fill(tmp_path, "data/cat/a.jpg", "store/dog/b.jpg", "store/more/c.jpg")
    (tmp_path / "data" / "dog").symlink_to("../store/dog")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "store" / "more")
    samples = Folder(path=str(tmp_path / "data")).samples(tile_task(num_classes=2))
    assert listed(samples) == [
        (f"{tmp_path}/data/{name}", (label,)) for name, label in [("cat/a.jpg", 0), ("cat/more/c.jpg", 0), ("dog/b.jpg", 1)]
    ]


def test_one_folder_as_two_classes_is_refused(tmp_path):
    fill(tmp_path, "cat/a.jpg")
    (tmp_path / "kitten").symlink_to("cat")
    with pytest.raises(ValueError, match=r"folder .*/cat belongs to two classes: it is in .*/cat and, as .*/kitten, in .*/kitten"):
        Folder(path=str(tmp_path)).samples(tile_task(num_classes=2))


def test_a_class_that_is_a_link_to_nowhere_is_named(tmp_path):
    fill(tmp_path, "cat/a.jpg", "dog/b.jpg")
    (tmp_path / "emu").symlink_to("/unmounted/emu")
    with pytest.raises(ValueError, match=r"link .*/emu leads nowhere: /unmounted/emu is missing"):
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
    source = manifest(tmp_path, "path,labels\na,0 4\nb,3;1\nc,\nd,2\ne,1;\nf,[4]\n")
    assert [sample.labels for sample in source.samples(task)] == [(0, 4), (3, 1), (), (2,), (1,), (4,)]


@pytest.mark.parametrize("cell", ["0;0;1;0;1", "0 0 1 0 1", "1;1", "[0, 0, 1]", "1;01", "1;1;", "2;1;2"])
@pytest.mark.parametrize("multi_label", [True, False])
def test_a_class_that_is_named_twice_is_refused(tmp_path, cell, multi_label):
    task = tile_task(num_classes=5, loss="sigmoid", multi_label=multi_label)
    with pytest.raises(ValueError, match=r"list.csv, line 3: class \d is named twice"):
        manifest(tmp_path, f'path,labels\na,4\nb,"{cell}"\n').samples(task)


@pytest.mark.parametrize("cell", ["cat;cat", "cat cat", "café;cafe\u0301", '[""cat"", ""cat""]'])
def test_a_name_that_stands_twice_is_refused(tmp_path, cell):
    (tmp_path / "classes.txt").write_text("cat\ncafé\ndog\n")
    source = manifest(tmp_path, f'path,labels\na,"{cell}"\n', classes=str(tmp_path / "classes.txt"))
    with pytest.raises(ValueError, match=r"list.csv, line 2: class [01] is named twice"):
        source.samples(tile_task(loss="sigmoid", multi_label=True))


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
        ('path,label\n"a.jpg,1\nb.jpg,1\n', r"line 2: a double quote is opened there .*line 3: unexpected end of data"),
        ("path,label,label\na.jpg,1,0\n", "list.csv, line 1: 2 columns are named label"),
        ("path,label\na.jpg,1\nb.jpg,0\n./a.jpg,2\n", "line 4: ./a.jpg has other labels than on line 2; a file's labels stand on one line"),
        ("path,label\na\x00.jpg,1\n", r"line 2: the path .* holds a NUL character"),
        ("path,label\nno.tar:a.jpg,1\n", "line 2: shard .*no.tar: No such file or directory"),
    ],
)
def test_faults_are_reported_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        manifest(tmp_path, text).samples(tile_task())


def test_a_missing_table_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"manifest .*no.csv: No such file or directory"):
        Manifest(path=str(tmp_path / "no.csv")).samples(tile_task())


@pytest.mark.parametrize(
    ("names", "cell", "message"),
    [
        ("cat\ndog\nbird\n", "dgo", r"list.csv, line 2: label 'dgo' is not among the 3 names in .*classes.txt"),
        ("cat\ndog\nbird\n", "1", r"line 2: label '1' is not among the 3 names"),
        ("cat\ndog\n", "cat", r"classes .*classes.txt: it lists 2 names where num_classes = 3"),
        ("cat\ndog\ncat\n", "cat", r"classes .*classes.txt: 'cat' appears twice"),
        (
            "cafe\u0301\ndog\ncafé\n",
            "dog",
            r"classes .*classes.txt: it lists 3 names, but 'cafe\\u0301' and 'caf\\xe9' are one name to Unicode",
        ),
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


def test_what_a_table_may_be_mistaken_in_is_remarked(tmp_path):
    lines = [" a.jpg,0", "b.jpg ,0", "c\\d.jpg,0", "~/e.jpg,0", "f.jpg,0", "./f.jpg,0", '"g.jpg', 'h.jpg",0']
    source = manifest(tmp_path, "path,label\n" + "\n".join(lines) + "\n")
    table = f"{tmp_path}/list.csv"
    assert source.remarks(tile_task(num_classes=9)) == [
        f"{table}, line 2 and 1 more: its path begins or ends with blanks, which belong to the file's name (' a.jpg')",
        f"{table}, line 4: its path holds a backslash, which separates no folders here; use / ('c\\\\d.jpg')",
        f"{table}, line 5: its path begins with ~, which is not replaced by the home folder ('~/e.jpg')",
        f"{table}, line 7: it repeats an earlier line, so that its sample counts once more ('./f.jpg')",
        f"{table}, line 8: its path holds a line break: a double quote may be missing ('g.jpg\\nh.jpg')",
        f"{table} names 1 of the task's 9 classes; none has 1, 2, 3, …",
    ]
    assert manifest(tmp_path, "path,label\na,0\nb,1\nc,2\n").remarks(tile_task()) == []


def test_a_column_that_pandas_renamed_is_remarked(tmp_path):
    [remark] = manifest(tmp_path, "path,label,label.1\na,0,1\nb,1,0\nc,2,2\n").remarks(tile_task())
    assert remark == f"{tmp_path}/list.csv, line 1: column label.1 is not read; two columns may have had one name"


def test_names_that_the_training_split_does_not_have_are_remarked(tmp_path):
    numbers = manifest(tmp_path, "path,label\na,0\nb,1\n")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    named = manifest(tmp_path, "path,label\nc,cat\nd,dog\n", "val.csv", classes=str(tmp_path / "classes.txt"))
    folder = Folder(path=str(fill(tmp_path / "val", "cat/a.jpg", "dog/b.jpg")))
    for val, order in ((folder, "0 is cat, 1 is dog"), (named, "0 is dog, 1 is cat")):
        task = tile_task(train=numbers, val=val, num_classes=2)
        [remark] = val.remarks(task)
        assert remark.startswith("class numbers of the training split were compared with no names; ")
        assert remark.endswith(f" sets their order: {order}")
        assert numbers.remarks(task) == val.remarks(replace(task, train=val)) == []


def test_flags_for_two_classes_are_remarked(tmp_path):
    source = manifest(tmp_path, "path,labels\na,0;1\nb,1;0\n")
    [remark] = source.remarks(tile_task(num_classes=2, loss="sigmoid", multi_label=True))
    assert remark == f"{tmp_path}/list.csv gives every class to every sample: labels are a list of classes, not a flag for each"


def test_a_table_of_utf_16(tmp_path):
    (tmp_path / "list.tsv").write_bytes("path\tlabel\né.jpg\t2\n".encode("utf-16"))
    (tmp_path / "classes.txt").write_bytes("a\nb\né\n".encode("utf-16"))
    assert listed(Manifest(path=str(tmp_path / "list.tsv")).samples(tile_task())) == [(f"{tmp_path}/é.jpg", (2,))]
    assert Manifest(path="t", classes=str(tmp_path / "classes.txt")).class_names(tile_task()) == ("a", "b", "é")


def test_samples_written_as_a_table_of_names_come_back_whatever_the_names(tmp_path):
    names = ["1", "2", "10", "a;b", "c, d", "x y", "x", "y", 'q"t', "[1]", '["1"]', "été", os.fsdecode(b"\xe9t\xe9"), "-1", " blank ", "~"]
    fill(tmp_path, *(f"data/{name}/1.jpg" for name in names))
    folder = Folder(path=str(tmp_path / "data"))
    task = tile_task(train=folder, num_classes=len(names), loss="sigmoid", multi_label=True)
    listed_names = class_list(task)
    assert listed_names
    samples = [Sample(sample.media, tuple({*sample.labels, number % 7})) for number, sample in enumerate(folder.samples(task))]
    with open(tmp_path / "list.csv", "w", newline="", errors="surrogateescape") as file:
        rows = [(sample.media.path, format_labels(sample.labels, listed_names, len(names))) for sample in samples]
        csv.writer(file).writerows([("path", "labels"), *rows])
    (tmp_path / "classes.txt").write_text(format_classes(listed_names), errors="surrogateescape")
    plain, named = (
        Manifest(path=str(tmp_path / "list.csv")),
        Manifest(path=str(tmp_path / "list.csv"), classes=str(tmp_path / "classes.txt")),
    )
    assert plain.samples(task) == samples
    assert named.samples(task) == samples
    assert named.samples(replace(task, train=named, val=named)) == samples
    assert plain.samples(replace(task, train=plain, val=named)) == samples


@pytest.mark.parametrize("form", [str, Path])
def test_relative_paths_start_where_the_command_runs(form, tmp_path, monkeypatch, unchecked_types):
    """Of all sources, but for the paths in a table, which start from its root or its own folder."""
    fill(tmp_path, "photos/a/1.jpg", "photos/b/2.jpg")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/classes.txt").write_text("a\nb\n")
    (tmp_path / "lists/names.csv").write_text("path,label\na/1.jpg,a\n")
    (tmp_path / "lists/own.csv").write_text("path,label\n../photos/a/1.jpg,0\n")
    with tarfile.open(tmp_path / "lists/s.tar", "w") as tar:
        tar.add(tmp_path / "photos/a/1.jpg", "1.jpg")
        label = tarfile.TarInfo("1.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"0"))
    monkeypatch.chdir(tmp_path)
    task = tile_task(num_classes=2, modality=Image())
    for source, path in (
        (Folder(path=form("photos")), "photos/a/1.jpg"),
        (Manifest(path=form("lists/names.csv"), root=form("photos"), classes=form("lists/classes.txt")), "photos/a/1.jpg"),
        (Manifest(path=form("lists/own.csv")), "lists/../photos/a/1.jpg"),
        (Shards(paths=(form("lists/s.tar"),)), "lists/s.tar"),
    ):
        sample = source.samples(replace(task, train=source, val=source))[0]
        assert sample.media.path == path
        assert sample.media.read() == b"content"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Folder(path="nowhere"), "folder {}/nowhere: No such file or directory"),
        (Manifest(path="nowhere.csv"), "manifest {}/nowhere.csv: No such file or directory"),
        (Manifest(path="a.csv", classes="nowhere.txt"), "classes {}/nowhere.txt: No such file or directory"),
        (Manifest(path="."), "manifest {}/.: Is a directory"),
        (Manifest(path="a.csv"), "a.csv, line 2: shard {}/none.tar: No such file or directory"),
        (Shards(paths=("nowhere.tar",)), "shard {}/nowhere.tar: no such file"),
        (Shards(paths=("nowhere-*.tar",)), "shard {}/nowhere-*.tar: no such file"),
    ],
    ids=str,
)
def test_what_is_missing_is_shown_with_its_whole_path(source, message, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("path,label\nnone.tar:1.jpg,0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        source.samples(tile_task(train=source, val=source))
    assert str(caught.value) == message.format(tmp_path)
