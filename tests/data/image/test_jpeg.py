import os
import re
from random import Random

import numpy as np
import pytest
from generators import rngs
from image_files import photo
from image_kinds import KINDS, saved
from long_forms import every, mark_long
from PIL import Image as Pillow

from polyvit_fast import cli
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.jpeg import capture_stderr, check_codes, check_warnings, read_frame
from polyvit_fast.data.image.modality import Image
from polyvit_fast.media import Media, MediaError

LIMIT = 10**6
END = b"\xff\xd9"
PHOTO = photo(160, 200)
THUMBNAIL = b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(8) + saved(photo(40, 60), "JPEG")
WHOLE = {
    "baseline": saved(PHOTO, "JPEG"),
    "progressive": saved(PHOTO, "JPEG", progressive=True),
    "restarts": saved(PHOTO, "JPEG", restart_marker_rows=1),
    "many restarts": saved(PHOTO, "JPEG", restart_marker_blocks=1),
    "progressive with restarts": saved(PHOTO, "JPEG", progressive=True, restart_marker_rows=1),
    "4:4:4": saved(PHOTO, "JPEG", subsampling=0),
    "4:2:2": saved(PHOTO, "JPEG", subsampling=1),
    "optimized": saved(PHOTO, "JPEG", optimize=True),
    "grey": saved(PHOTO.convert("L"), "JPEG"),
    "rgb": saved(PHOTO, "JPEG", keep_rgb=True),
    "cmyk": saved(PHOTO.convert("CMYK"), "JPEG"),
    "with a thumbnail": saved(PHOTO, "JPEG", exif=THUMBNAIL),
}


@pytest.fixture(scope="module")
def thorough():
    return build_decoder(Image(size=32).thorough(), batch=2, train=False, num_threads=1)


@pytest.fixture(scope="module")
def plain():
    return build_decoder(Image(size=32), batch=2, train=False, num_threads=1)


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "a.jpg"

    def decode(decoder, content, seed=0):
        path.write_bytes(content)
        return decoder([Media(str(path))], rngs(1, seed))[0]

    return decode


def codes_start(content):
    return content.rindex(b"\xff\xda") + 14


def refusal(decode, decoder, content):
    try:
        decode(decoder, content)
    except MediaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("fraction", mark_long([0.0, 0.1, 0.3, 0.5, 0.8, 0.99], [0.0, 0.5, 0.99]))
def test_data_missing_before_the_end_mark(decode, thorough, plain, name, fraction):
    content = WHOLE[name]
    scan = content.index(b"\xff\xda", len(THUMBNAIL) + 20 if "thumbnail" in name else 0) + 14
    cut = content[: scan + int(fraction * (len(content) - scan - 10))] + END
    assert "truncated" in refusal(decode, thorough, cut)
    if "progressive" not in name or fraction < 0.5:  # of its last scan nothing but a little sharpness is missing then
        assert "truncated" in refusal(decode, plain, cut)


@pytest.mark.parametrize("name", WHOLE)
def test_good_files_are_good(decode, thorough, plain, name, capfd):
    content = WHOLE[name]
    expected = decode(plain, content)
    stamps = content[:2] + b"\xff" * 5 + content[2:]
    for good in (content, content + b"appended" * 1000, content + bytes(5000), content + content, content + content[:500], stamps):
        assert decode(thorough, good).equal(expected)
        assert decode(plain, good).equal(expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("extra", [b"\0", b"\0\1\2\3", bytes(3000), b"\xff" * 3000])
def test_padding_before_the_end_mark_is_no_damage(decode, thorough, plain, extra):
    content = WHOLE["baseline"]
    padded = content[:-2] + extra + END
    assert decode(thorough, padded).equal(decode(plain, content))


def test_a_harmless_warning_does_not_hide_another(decode, thorough):
    content = WHOLE["baseline"]
    scan = codes_start(content)
    odd = content[: scan - 2] + b"\x05" + content[scan - 1 :]  # the last coefficient that the scan is said to hold: libjpeg warns at once
    assert refusal(decode, thorough, odd) == ""
    assert "data of the JPEG is missing" in refusal(decode, thorough, odd[: len(odd) * 9 // 10] + END)


@pytest.mark.parametrize("name", every(3, WHOLE))
def test_damage_in_the_middle(decode, thorough, name):
    content, random = WHOLE[name], Random(0)
    start = codes_start(content)
    found = 0
    for _ in range(10):
        at = random.randrange(start, len(content) - 700)
        noise = bytes(byte % 255 for byte in random.randbytes(500))
        hole, zeros = content[:at] + content[at + 500 :], content[:at] + bytes(500) + content[at + 500 :]
        found += sum(bool(refusal(decode, thorough, bad)) for bad in (hole, zeros, content[:at] + noise + content[at:]))
    assert found >= (20 if name == "cmyk" else 26)  # random bytes may happen to hold as many codes as there should be


def test_libjpegs_words_are_the_reason(decode, thorough, capfd):
    content = WHOLE["baseline"]
    at = len(content) // 2
    assert (
        refusal(decode, thorough, content[:at] + END)
        == "truncated or damaged: libjpeg says: Corrupt JPEG data: premature end of data segment"
    )
    restarts = WHOLE["restarts"]
    extra = restarts.index(b"\xff\xd3")
    reason = refusal(decode, thorough, restarts[:extra] + bytes(range(1, 30)) + restarts[extra:])
    assert reason == "truncated or damaged: libjpeg says: Corrupt JPEG data: 29 extraneous bytes before marker 0xd3"
    progressive = WHOLE["progressive"]
    at = codes_start(progressive) + 100
    reason = refusal(decode, thorough, progressive[:at] + b"\xff\0" * 9 + progressive[at + 18 :])
    assert reason == "truncated or damaged: libjpeg says: Corrupt JPEG data: bad Huffman code"
    assert capfd.readouterr().err == ""


def test_the_guilty_one_of_a_batch_is_refused(tmp_path, thorough):
    (tmp_path / "good.jpg").write_bytes(WHOLE["baseline"])
    (tmp_path / "cut.jpg").write_bytes(WHOLE["baseline"][:5000] + END)
    good, cut = (Media(str(tmp_path / name)) for name in ("good.jpg", "cut.jpg"))
    assert len(thorough([good, good], rngs(2))) == 2
    for pair in ([good, cut], [cut, good]):
        with pytest.raises(MediaError, match="premature end"):
            thorough(pair, rngs(2))


@pytest.mark.parametrize("crop", ["inception", "resize_crop"])
@pytest.mark.parametrize("name", every(3, [name for name in WHOLE if "progressive" not in name]))
def test_no_training_picture_is_partly_grey(decode, name, crop):
    decoder = build_decoder(Image(size=32, crop=crop), batch=1, train=True, num_threads=1)
    cut = WHOLE[name][: len(WHOLE[name]) * 6 // 10] + END
    refused = 0
    for seed in range(30):
        try:
            grid = decode(decoder, cut, seed).squeeze().numpy().astype(int)
        except MediaError:
            refused += 1
        else:
            assert (np.ptp(grid, axis=(1, 2)) > 0).all()  # every row shows something
    assert refused


def test_scans_that_are_missing_altogether(decode, thorough, plain):
    content = WHOLE["progressive"]
    starts = [mark.start() for mark in re.finditer(rb"\xff\xda", content)]
    # Cut between two scans it is a coarser picture, as one may be made on purpose; but it needs something of each component.
    ends = [content.rindex(b"\xff\xc4", 0, start) for start in starts]
    for end in ends[1:]:
        assert refusal(decode, thorough, content[:end] + END) == refusal(decode, plain, content[:end] + END) == ""
    assert refusal(decode, plain, content[: ends[0]] + END)
    of_luma = content[: starts[0]] + b"\xff\xda\0\x08\1\1\0\0\0\1" + content[starts[0] + 14 : ends[3]] + END
    assert refusal(decode, plain, of_luma) == "truncated: the JPEG ends before its last scan"


def test_restart_markers_are_counted(decode, plain):
    content = WHOLE["restarts"]
    marks = [mark.start() for mark in re.finditer(rb"\xff[\xd0-\xd7]", content)]
    lost = content[: marks[2]] + content[marks[3] :]
    with pytest.raises(MediaError, match="of 9 restart markers in the JPEG some are missing"):
        read_frame(lost, LIMIT)
    assert "restart markers" in refusal(decode, plain, lost)
    one = content[: marks[2] + 20] + content[marks[3] :]
    assert "data of the JPEG is missing" in refusal(lambda _, content: check_codes(content), None, one)


def test_a_grey_picture_is_no_broken_one(decode, thorough, plain):
    grey = saved(Pillow.new("RGB", (50, 40), (128, 128, 128)), "JPEG")
    assert (decode(plain, grey) == 128).all()
    assert (decode(thorough, grey) == 128).all()


def test_arithmetic_codes_may_be_left_out(decode, thorough):
    content = KINDS["jpeg-arithmetic"]
    check_codes(content[:-10] + END)
    assert refusal(decode, thorough, content) == ""


def test_what_else_is_said_on_standard_error_is_kept_apart(capfd):
    with capture_stderr() as warnings:
        os.write(2, b"one line\nanother\n")
    assert warnings == ["one line", "another"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    check_warnings(WHOLE["baseline"], warnings)


EXPERIMENT = """
from polyvit_fast.config import DataOptions, Model, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder

data = Folder(path="train")
task = Task(modality=Image(size=32, crop="resize_crop"), train=data, val=data, num_classes=2, steps=4, batch=8)
model = Model(dim=32, depth=1, num_heads=2, mlp_dim=32)
config = Train(tasks={"pictures": task}, model=model, data=DataOptions(max_bad_ratio=0.2), out="run", device="cpu")
"""


@pytest.mark.parametrize(("command", "status"), mark_long([("train", 0), ("check", 65)], [("check", 65)]))
def test_a_cut_jpeg_is_named_and_replaced(tmp_path, monkeypatch, capfd, command, status):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            photo(40, 60, seed=i).save(tmp_path / "train" / name / f"{i}.jpg")
    (tmp_path / "train" / "a" / "cut.jpg").write_bytes(WHOLE["baseline"][:6000] + END)
    monkeypatch.chdir(tmp_path)
    assert cli.run([command, "mine.py"]) == status
    assert re.search(r"train/a/cut\.jpg: truncated or damaged", "".join(capfd.readouterr()))
