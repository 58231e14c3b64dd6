import io
from pathlib import Path

import numpy as np
import pytest
import torch

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.inference.inputs import list_items
from polyvit_fast.media import Media, MediaError, MemoryMedia

PICTURE = np.zeros((9, 8, 3), np.uint8)


def never(name, error):
    raise AssertionError(name)


def names(inputs, modality=None):
    return [item.name for item in list_items(inputs, modality or Image(size=32), never)]


def test_inputs_have_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"abc")
    path = tmp_path / "a.jpg"
    with open(path, "rb") as file:
        assert names([str(path), path, b"abc", file, io.BytesIO(b"abc"), Media("x"), PICTURE]) == [
            *(str(path), str(path), "input[2]", str(path), "input[4]", "x", "input[6]")
        ]
    assert names(b"abc") == names(PICTURE) == ["input"]
    assert names(np.stack([PICTURE] * 2)) == ["input[0]", "input[1]"]
    assert names([PICTURE, np.stack([PICTURE] * 2)]) == ["input[0]", "input[1][0]", "input[1][1]"]
    assert names([]) == []


def test_bytes_are_kept_as_they_are():
    for value in (b"abc", bytearray(b"abc"), memoryview(b"abc"), io.BytesIO(b"abc")):
        [item] = list_items(value, Image(size=32), never)
        assert item.content == MemoryMedia("input", content=b"abc")


def test_several_inputs_come_in_any_iterable_but_a_sound_is_a_pair(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    assert sorted(map(Path, names(tmp_path.glob("*.jpg")))) == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert names(("a.jpg", "b.jpg")) == ["a.jpg", "b.jpg"]
    wave = np.zeros(4000, np.float32)
    for value in (wave, torch.from_numpy(wave)):
        for rate in (8000, 8000.0, np.int64(8000)):
            assert names((value, rate), Audio()) == ["input"]
            assert names([(value, rate), (value, rate)], Audio()) == ["input[0]", "input[1]"]
    with pytest.raises(ValueError, match=r"input\[0\]: an input of type ndarray does not say its sample rate; wanted is a pair"):
        names((wave, wave), Audio())


def test_inputs_are_read_one_by_one(tmp_path):
    items = list_items([PICTURE, 3], Image(size=32), never)
    assert next(items).name == "input[0]"
    with pytest.raises(ValueError, match=r"input\[1\]: an input of type int is no picture; wanted is a picture of Pillow"):
        next(items)


def test_a_damaged_picture_is_skipped():
    from PIL import Image as Pillow

    found = []
    damaged = Pillow.fromarray(np.zeros((8, 8), np.float32))
    items = list(list_items([damaged, PICTURE], Image(size=32), lambda *one: found.append(one)))
    assert [item.name for item in items] == ["input[1]"]
    assert found[0][0] == "input[0]"
    assert isinstance(found[0][1], MediaError)


def test_what_is_no_file_of_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="input: a file open for text; open it for bytes"):
        names(io.StringIO("abc"))
    with pytest.raises(ValueError, match="is a folder; give a list of its files"):
        names(tmp_path)
    with pytest.raises(ValueError, match="input: an input of type NoneType is no picture"):
        names(None)
