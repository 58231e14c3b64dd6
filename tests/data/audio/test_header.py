import struct

import numpy as np
import pytest
import soundfile
from sound_files import FLAC, PLAIN, RATE, WAVE, encode, mux, noise, read_waves

from polyvit_fast.data.audio.header import SoundHeader, read_header
from polyvit_fast.media import Media, MediaError


def header(path, content):
    path.write_bytes(content)
    return read_header(Media(str(path)))


@pytest.mark.parametrize("tag", [b"ID3\x04\0\0\0\0\1\0" + bytes(128), b"ID3\x03" + bytes(6), b"ID3\x04\0\x10\0\0\0\x05" + bytes(15)])
@pytest.mark.parametrize("kind", ["wav", "flac", "aiff"])
def test_a_tag_in_front_is_passed_over(tmp_path, tag, kind):
    """libsndfile counts the offset of the samples from the tag's start, and loses as many bytes at the end."""
    content = {"wav": PLAIN, "flac": FLAC, "aiff": encode(noise(1, RATE), RATE, ".aiff")}[kind]
    without = header(tmp_path / "a", content)
    assert header(tmp_path / "b", tag + content) == SoundHeader(RATE, 1, without.samples, len(content), len(tag))
    assert np.array_equal(*read_waves(tmp_path / "a", tmp_path / "b"))
    with pytest.raises(MediaError, match="truncated"):
        read_into(tmp_path / "b", tag + content[: len(content) // 2])


def test_numbers_that_are_none(tmp_path):
    """Infinite rates and sizes beyond all files are refused, and nothing is read for them."""
    caf = encode(noise(1, RATE), RATE, ".caf")
    for rate in (float("inf"), float("nan"), -1.0, 1e300):
        with pytest.raises(MediaError, match=r"its sample rate is -?\d+ Hz; 1000 to 768000 are supported|not a sound that can be decoded"):
            read_into(tmp_path / "a", caf[:20] + struct.pack(">d", rate) + caf[28:])
    aiff = encode(noise(1, RATE), RATE, ".aiff")
    with pytest.raises(MediaError):
        read_into(tmp_path / "a", aiff[:28] + b"\x7f\xff" + b"\xff" * 8 + aiff[38:])
    with pytest.raises(MediaError, match=r"truncated: it ends after 1\.0 of the \d+\.\d seconds"):
        read_into(tmp_path / "a", caf.replace(b"data\0\0\0\0\0", b"data\0\0\x70\0\0"))


def read_into(path, content):
    path.write_bytes(content)
    return read_waves(path)


def test_flac_of_32_bits_is_ffmpegs(tmp_path):
    """libsndfile has no more than 24."""
    content = bytearray(FLAC)
    content[20] |= 1  # five bits of the number less one, over two bytes
    content[21] |= 0xF0
    assert header(tmp_path / "a", FLAC)
    assert header(tmp_path / "a", bytes(content)) is None


@pytest.mark.parametrize("kind", [".wav", ".aiff", ".au", ".caf", ".w64", ".voc", ".ogg", ".mp3", ".m4a", ".flac"])
def test_the_first_bytes_of_a_file_are_refused(tmp_path, kind):
    content = encode(noise(1, 48_000), 48_000, kind)
    for length in (0, 1, 4, 9, 12, 16, 20, 25, 30, 43):
        with pytest.raises(MediaError):
            read_into(tmp_path / "a", content[:length])


def test_more_samples_than_the_header_tells_are_held_to_the_limit(tmp_path):
    """libsndfile goes by the size of the file there."""
    soundfile.write(tmp_path / "a", noise(12, 44_100), 44_100, format="XI", subtype="DPCM_8")
    content = bytearray((tmp_path / "a").read_bytes())
    struct.pack_into("<I", content, 298, 5000)
    (tmp_path / "a").write_bytes(content)
    assert read_header(Media(str(tmp_path / "a"))).samples <= 5000
    with pytest.raises(MediaError, match="it lasts more than max_seconds = 10"):
        read_waves(tmp_path / "a", max_seconds=10.0)


def test_a_file_ends_where_its_header_says(tmp_path):
    """libsndfile goes by the size of the file here too, but the rest does not reach it."""
    wave = noise(1, RATE)
    soundfile.write(tmp_path / "a", wave, RATE, format="MPC2K")
    content = bytearray((tmp_path / "a").read_bytes())
    struct.pack_into("<I", content, 30, 5000)
    (tmp_path / "a").write_bytes(content)
    [found] = read_waves(tmp_path / "a")
    assert len(found) == 5000
    assert np.abs(found - wave[:5000, 0]).max() < 1e-4


def test_a_long_vorbis_file_is_ffmpegs(tmp_path):
    assert header(tmp_path / "a", encode(noise(5, RATE), RATE, ".ogg")) is None
    assert header(tmp_path / "a", mux(noise(1, 48_000)[:, 0], 48_000, "ogg", "libopus")) is None
    assert header(tmp_path / "a", encode(0 * noise(1, RATE), RATE, ".ogg")).samples == len(WAVE)
