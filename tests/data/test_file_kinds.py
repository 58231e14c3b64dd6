"""What is no picture, video or sound is called by its name."""

import gzip
import io
import re
import tarfile
import zipfile

import numpy as np
import pytest
from image_kinds import KINDS, PICTURE, saved
from sound_files import noise, write

from polyvit_fast.data.audio.waves import decode
from polyvit_fast.data.file_kinds import HEIC, describe_picture, name_kind
from polyvit_fast.data.image.file import read_for_dali
from polyvit_fast.data.video.frames import read_header
from polyvit_fast.media import Media, MediaError


def heic():
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(PICTURE).save(file)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr("a.jpg", KINDS["webp"])
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as written:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        written.addfile(member, io.BytesIO(b"abc"))
    return file.getvalue()


def array():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


OTHERS = {
    "an HTML page, perhaps from a download that failed": b"\n<!DOCTYPE html>\n<title>404</title>",
    "a Git LFS pointer; `git lfs pull` gets the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "nothing but zeros, perhaps from a copy that was cut short": bytes(4096),
    "an SVG drawing": b'<?xml version="1.0"?>\n<!-- drawn by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a PDF document": saved(PICTURE, "PDF"),
    "an EPS drawing": saved(PICTURE, "EPS"),
    "a JPEG XL picture": b"\xff\x0a" + bytes(range(1, 100)),
    "a ZIP archive": archive(),
    "a gzip archive": gzip.compress(b"abc"),
    "a tar archive": tar(),
    "a NumPy array": array(),
}
PICTURES = {
    "a JPEG picture": saved(PICTURE, "JPEG"),
    "a PNG picture": saved(PICTURE, "PNG"),
    "a WebP picture": saved(PICTURE, "WEBP"),
    "a TIFF picture": saved(PICTURE, "TIFF"),
    "an AVIF picture": saved(PICTURE, "AVIF"),
    HEIC: heic(),
}


@pytest.mark.parametrize("name", [*OTHERS, *PICTURES])
def test_files_are_known_by_their_first_bytes(name):
    assert name_kind((OTHERS | PICTURES)[name]) == name


def test_other_bytes_are_shown():
    assert name_kind(b"no picture") == ""
    assert describe_picture(b"no picture, but text") == "; it begins with b'no picture, but '"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_media_is_refused_by_its_name(tmp_path, name):
    media = Media(str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(OTHERS[name])
    reads = {
        "not an image that can be decoded": lambda: read_for_dali(media, 10**6),
        "not a video that can be opened|its format is none of .*": lambda: read_header(media, 10**6),
        "not a sound that can be decoded": lambda: decode(media, 60.0),
    }
    for refusal, read in reads.items():
        with pytest.raises(MediaError, match=f"^({refusal}): it is {re.escape(name)}$"):
            read()


def test_media_of_another_modality_are_called_by_their_names(tmp_path):
    picture, sound = tmp_path / "a.mp4", tmp_path / "a.wav"
    picture.write_bytes(PICTURES["a JPEG picture"])
    write(sound, noise(0.1, 8000), 8000)
    with pytest.raises(MediaError, match=r"it is a JPEG picture$"):
        decode(Media(str(picture)), 60.0)
    with pytest.raises(MediaError, match=r"^not an image that can be decoded: it is a WAV sound$"):
        read_for_dali(Media(str(sound)), 10**6)
