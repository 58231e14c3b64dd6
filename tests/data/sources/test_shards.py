import json

import pytest
from tar_files import pair, write_shard
from tiny_runs import tile_task

from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.media import MEDIA_SUFFIXES


def samples_of(*paths, task=None, **fields):
    return Shards(paths=paths, **fields).samples(task or tile_task())


def test_samples_are_read_at_their_offsets(tmp_path):
    long_name = "folder/" + "n" * 200 + ".jpg"
    members = [
        *pair("a/000", 2),
        *pair("b/000", 0),
        *reversed(pair("a/001", 1, "JPG")),
        (long_name, b"long"),
        (long_name[:-3] + "cls", b"1\n"),
    ]
    path = write_shard(
        tmp_path / "s.tar", [("._a.jpg", b"mac"), ("README", b"text"), ("notes.txt", b"text"), ("__meta__/info.json", b"{}"), *members]
    )
    samples = samples_of(path)
    assert [sample.media.name for sample in samples] == [f"{path}:{n}" for n in ("a/000.jpg", "b/000.jpg", "a/001.JPG", long_name)]
    assert [sample.labels for sample in samples] == [(2,), (0,), (1,), (1,)]
    assert [sample.media.read() for sample in samples] == [b"pixels of a/000", b"pixels of b/000", b"pixels of a/001", b"long"]


def test_labels_in_json(tmp_path):
    task = tile_task(num_classes=9, loss="sigmoid", multi_label=True)
    contents = [{"label": 3, "caption": "x"}, {"labels": [1, 8]}, {"labels": []}, 5]
    members = [m for i, c in enumerate(contents) for m in ((f"{i}.jpg", b"x"), (f"{i}.json", json.dumps(c).encode()))]
    path = write_shard(tmp_path / "s.tar", [*members, ("4.jpg", b"x"), ("4.json", b'{"label": 7.5}'), ("4.cls", b"6")])
    assert [sample.labels for sample in samples_of(path, task=task)] == [(3,), (1, 8), (), (5,), (6,)]


@pytest.mark.parametrize(
    ("wanted", "members", "found"),
    [
        ("png", ["x.png", "x.seg.png"], "x.png"),
        ("seg.png", ["x.png", "x.seg.png"], "x.seg.png"),
        (".Seg.PNG", ["x.png", "x.SEG.png"], "x.SEG.png"),
        ("png", ["x.jpg", "x.PNG"], "x.PNG"),
        ("jpg", ["v1.0/x.jpg", "v1.0/x.depth.jpg", "v1.0/x.jpg.jpg"], "v1.0/x.jpg"),
        ("mine", ["x.png", "x.mine"], "x.mine"),
        ("", ["x.seg.png", "x.txt", "x.npy", "x.png.sha256"], "x.seg.png"),
        ("", ["x.webm", "x.pyd"], "x.webm"),
    ],
)
def test_the_suffix_is_all_behind_the_first_dot_of_the_base_name(tmp_path, wanted, members, found):
    label = f"{members[0].rpartition('/')[0]}/x.cls".lstrip("/")
    path = write_shard(tmp_path / "s.tar", [*((name, name.encode()) for name in members), (label, b"1")])
    (sample,) = samples_of(path, media_suffix=wanted)
    assert sample.media.member == found
    assert sample.media.read() == found.encode()


@pytest.mark.parametrize("suffix", sorted(MEDIA_SUFFIXES))
def test_media_by_every_common_suffix(tmp_path, suffix):
    path = write_shard(tmp_path / "s.tar", pair("0", 1, suffix.upper()))
    assert [sample.media.member for sample in samples_of(path)] == [f"0.{suffix.upper()}"]


def test_keys_are_of_their_folder_and_apart_by_case(tmp_path):
    names = ("0", "a/0", "a.b/0", "A/0", "a/b/0", "./0")
    path = write_shard(tmp_path / "s.tar", [member for number, name in enumerate(names) for member in pair(name, number % 3)])
    samples = samples_of(path)
    assert [sample.media.member for sample in samples] == [f"{name}.jpg" for name in names]
    assert [sample.labels[0] for sample in samples] == [0, 1, 2, 0, 1, 2]


def test_keys_with_dots_fall_together_and_are_refused(tmp_path):
    path = write_shard(tmp_path / "s.tar", [member for number in range(7) for member in pair(f"n01.{number}", 1)])
    with pytest.raises(ValueError, match=r"sample n01: .* holds n01.0.jpg, .* and 2 more: a key ends at the first dot, so names must not"):
        samples_of(path)
    with pytest.raises(ValueError, match=r"must hold one .jpg member but holds .*; the suffix is all behind the first dot .* here 0.jpg"):
        samples_of(path, media_suffix="jpg")


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


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), r"paths = \(\) must be file names or patterns, such as"),
        (("a.tar", ""), r"paths = \('a.tar', ''\) must be file names or patterns"),
        ("train.tar", r'paths = "train.tar" must be a tuple of texts: write \("train.tar",\)'),
    ],
)
def test_paths_are_a_tuple_of_names(paths, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        Shards(paths=paths)


CLASS_FAULTS = {
    "no class": ([("0.jpg", b"x")], r"sample 0: it has no class; a sample needs a .cls member, or"),
    "json without class": ([("0.jpg", b"x"), ("0.json", b'{"caption": ""}')], r"member '0.json': it has no class"),
    "null": ([("0.jpg", b"x"), ("0.json", b'{"label": null}')], r"member '0.json': it has no class"),
    "no media": ([("0.cls", b"1"), ("0.pkl", b"x")], r"sample 0: it must hold one media member but holds 0.pkl$"),
    "nothing else": ([("0.cls", b"1")], r"sample 0: it must hold one media member but holds none$"),
    "no sample": ([("README.md", b"x"), ("a/b", b"x")], r"s.tar: it holds no samples; leave it out of paths"),
    "no member": ([], r"s.tar: it holds no samples"),
    "between": (pair("0", "1.0"), r"member '0.cls': '1.0' is not a class number \(digits 0 to 9 alone\) or a class name"),
    "out of range": (pair("0", 3), r"member '0.cls': label 3 is out of range; num_classes = 3 allows 0 to 2"),
    "negative": ([("0.jpg", b"x"), ("0.json", b"-1")], r"member '0.json': label -1 is out of range"),
    "several": ([("0.jpg", b"x"), ("0.json", b"[0, 1]")], r"member '0.json': 2 labels where the task has one per sample; set multi_label"),
    "flags": ([("0.jpg", b"x"), ("0.json", b'{"labels": [0, 0, 1, 0, 1]}')], r"member '0.json': class 0 is named twice among 5 labels"),
    "name twice": ([("0.jpg", b"x"), ("0.json", b'["a", "b", "c", "a"]')], r"member '0.json': class 0 is named twice among 4 labels"),
}


@pytest.mark.parametrize("kind", CLASS_FAULTS)
def test_faults_name_shard_and_member(tmp_path, kind):
    members, message = CLASS_FAULTS[kind]
    path = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        samples_of(path)
    assert f"shard {path}" in str(caught.value)


def named_task(train, val=None, num_classes=3, **changes):
    return tile_task(train=Shards(paths=train), val=Shards(paths=val or train), num_classes=num_classes, **changes)


def test_names_are_numbered_in_sorted_order_over_all_shards(tmp_path):
    first = write_shard(tmp_path / "1.tar", [*pair("0", "wolf\n"), *pair("1", "cat")])
    second = write_shard(tmp_path / "2.tar", [*pair("2", "polar bear"), *pair("3", "cat")])
    held_out = write_shard(tmp_path / "3.tar", [*pair("0", "cat"), *pair("1", "wolf")])
    task = named_task((first, second), (held_out,))
    assert task.train.class_names(task) == ("cat", "polar bear", "wolf")
    assert [sample.labels for sample in task.train.samples(task)] == [(2,), (0,), (1,), (0,)]
    assert [sample.labels for sample in task.val.samples(task)] == [(0,), (2,)]  # not (0,), (1,): that split lacks a class
    assert [sample.labels for sample in task.train.samples(task)] == [(2,), (0,), (1,), (0,)]  # from the index file


def test_a_name_that_the_training_shards_lack_is_refused(tmp_path):
    train = write_shard(tmp_path / "1.tar", [*pair("0", "cat"), *pair("1", "dog")])
    val = write_shard(tmp_path / "2.tar", [*pair("0", "cat"), *pair("1", "Dog")])
    task = named_task((train,), (val,), num_classes=2)
    with pytest.raises(
        ValueError, match=r"shards .*2.tar: they name 2 classes \(Dog, cat\), but 'Dog' is not in .*, which has 'dog'.*1.tar"
    ):
        task.val.samples(task)
    with pytest.raises(ValueError, match=r"shards .*1.tar: they name 2 classes \(cat, dog\) where num_classes = 5"):
        named_task((train,), num_classes=5).train.samples(named_task((train,), num_classes=5))


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    members = [*pair("0", "caf\u00e9"), *pair("1", "cafe\u0301"), *pair("2", "猫"), *pair("3", "🐱")]
    task = named_task((write_shard(tmp_path / "s.tar", members),))
    assert [sample.labels for sample in task.train.samples(task)] == [(0,), (0,), (1,), (2,)]


def test_several_names_of_a_sample(tmp_path):
    members = [("0.jpg", b"x"), ("0.json", b'{"labels": ["b", "a"]}'), ("1.jpg", b"x"), ("1.json", b'{"labels": []}'), *pair("2", "c")]
    task = named_task((write_shard(tmp_path / "s.tar", members),), loss="sigmoid", multi_label=True)
    assert [sample.labels for sample in task.train.samples(task)] == [(1, 0), (), (2,)]


def test_names_and_numbers_are_not_mixed(tmp_path):
    first = write_shard(tmp_path / "1.tar", [*pair("0", 1), *pair("1", 0)])
    second = write_shard(tmp_path / "2.tar", pair("7", "cat"))
    message = r"shard .*2.tar, member '7.cls' holds the name 'cat', but shard .*1.tar, member '0.cls' holds the number 1: all .* or all"
    with pytest.raises(ValueError, match=message):
        samples_of(first, second)
    mixed = write_shard(tmp_path / "3.tar", [("0.jpg", b"x"), ("0.json", b'[1, "cat"]')])
    with pytest.raises(ValueError, match=r"member '0.json' holds the name 'cat', but .*member '0.json' holds the number 1"):
        samples_of(mixed)
