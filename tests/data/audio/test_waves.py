import re

import av
import numpy as np
import pytest
import soundfile
from sound_files import amplitude, encode, mux, noise, silent_video, tone, write, write_video

from polyvit_fast.data.audio.waves import decode, resample
from polyvit_fast.media import Media, MediaError, MemoryMedia

RATE = 44_100


def decoded(path, max_seconds=100.0):
    return decode(Media(str(path)), max_seconds)


def decibels(value):
    return 20 * np.log10(value + 1e-12)


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [
        (".aiff", "PCM_16"),
        (".aiff", "PCM_24"),
        (".aiff", "DOUBLE"),
        (".au", "PCM_16"),
        (".au", "FLOAT"),
        (".w64", "PCM_S8"),
        (".w64", "PCM_32"),
    ]
    + [(".caf", "PCM_24"), (".wav", "IMA_ADPCM"), (".ogg", "VORBIS"), (".ogg", "OPUS"), (".mp3", None)],
)
def test_equals_libsndfile(tmp_path, suffix, subtype):
    subtype = "PCM_U8" if subtype == "PCM_S8" else subtype
    rate = 48_000 if subtype == "OPUS" else RATE
    path = write(tmp_path / f"a{suffix}", noise(1, rate, 2), rate, subtype)
    theirs, _ = soundfile.read(path)
    got_rate, wave = decoded(path)
    lossy = subtype in ("VORBIS", "OPUS", None)
    assert (got_rate, wave.dtype) == (rate, np.float32)
    assert len(wave) == len(theirs)
    assert np.abs(wave - theirs.mean(1)).max() < (1e-4 if lossy else 1e-6)


@pytest.mark.parametrize("suffix", [".m4a", ".aac", ".webm", ".opus"])
def test_codecs_that_libsndfile_lacks(tmp_path, suffix):
    rate = 48_000
    both = np.stack([tone(1000, 2, rate), tone(3000, 2, rate, 0.2)], 1)
    got_rate, wave = decoded(write(tmp_path / f"a{suffix}", both, rate))
    assert got_rate == rate
    assert 0 <= len(wave) - 2 * rate < 3000  # the last packet is full
    assert amplitude(wave, 1000, rate) == pytest.approx(0.25, abs=0.005)
    assert amplitude(wave, 3000, rate) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("seconds", [0.3, 3])
def test_layer_2_of_mpeg(tmp_path, seconds):
    path = tmp_path / "a.mp2"
    path.write_bytes(mux(noise(seconds, RATE)[:, 0], RATE, "mp2", "mp2"))
    theirs, _ = soundfile.read(path)
    _, wave = decoded(path)
    assert soundfile.info(path).subtype == "MPEG_LAYER_II"
    assert len(wave) == len(theirs)
    assert np.abs(wave - theirs).max() < 1e-4


def test_layer_2_that_changes_its_rate_or_is_damaged(tmp_path):
    path = tmp_path / "a.mp2"
    contents = [mux(noise(1, rate)[:, 0], rate, "mp2", "mp2") for rate in (RATE, 48_000)]
    path.write_bytes(contents[0] + contents[1])
    with pytest.raises(MediaError, match="its sample rate or channels change midway"):
        decoded(path)
    path.write_bytes(overwritten(contents[0], 900))
    assert len(decoded(path)[1]) / RATE == pytest.approx(1, abs=0.15)


def test_all_channels_count_the_same(tmp_path):
    six = noise(0.5, RATE, 6)
    _, wave = decoded(write(tmp_path / "a.aiff", six, RATE, "FLOAT"))
    assert np.abs(wave - six.mean(1)).max() < 1e-7


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".opus", ".aac", ".mp3"])
def test_bytes_in_memory_are_decoded_like_their_file(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", noise(0.7, 48_000, channels=2), 48_000)
    rate, wave = decode(Media(str(path)), 60.0)
    memory = MemoryMedia("mine", content=path.read_bytes())
    again = decode(memory, 60.0)
    assert again[0] == rate == 48_000
    np.testing.assert_array_equal(again[1], wave)
    part = MemoryMedia("mine", 100, path.stat().st_size, content=b"x" * 100 + path.read_bytes() + b"y" * 50)
    np.testing.assert_array_equal(decode(part, 60.0)[1], wave)
    cut = path.read_bytes()[:60]
    path.write_bytes(cut)
    with pytest.raises(MediaError) as caught:
        decode(Media(str(path)), 60.0)
    with pytest.raises(MediaError, match=re.escape(str(caught.value))):
        decode(MemoryMedia("mine", content=cut), 60.0)


def test_a_member_of_a_tar_is_read_at_its_offset(tmp_path):
    content = encode(noise(1, RATE), RATE, ".mp3")
    (tmp_path / "a.mp3").write_bytes(content)
    (tmp_path / "a.tar").write_bytes(b"x" * 777 + content + content[:5000])
    _, alone = decoded(tmp_path / "a.mp3")
    _, inside = decode(Media(str(tmp_path / "a.tar"), 777, len(content), "a.mp3"), 100.0)
    assert np.array_equal(inside, alone)


@pytest.mark.parametrize("name", ["a b.mp3", "a%20:,,=[x];'q\".mp3", "ü\n\\.mp3", "http:a.mp3", "x%03d.mp3"])
def test_names_are_taken_as_they_are(tmp_path, name):
    assert len(decoded(write(tmp_path / name, noise(0.2, RATE), RATE))[1])


MP3 = encode(noise(10, RATE), RATE, ".mp3")
M4A = encode(noise(10, RATE), RATE, ".m4a")
WEBM = encode(noise(10, 48_000), 48_000, ".webm")
HALF = len(MP3) // 2
WITHOUT_COUNT = MP3[MP3.index(b"\xff\xfb", MP3.index(b"Xing") + 4) :]
JUNK = np.random.default_rng(0).bytes(30_000)


def overwritten(content, num_bytes):
    middle = len(content) // 2
    return content[:middle] + JUNK[:num_bytes] + content[middle + num_bytes :]


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (MP3, 10.0),
        (b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + MP3, 10.0),
        (MP3 + b"TAG" + bytes(125), 10.0),
        (MP3 + JUNK[:3000], 10.0),
        (overwritten(MP3, 2000), 9.8),
        (WITHOUT_COUNT, 10.03),
        (WITHOUT_COUNT[:HALF], 5.0),  # nothing tells that there was more
        (M4A + JUNK, 10.02),
    ],
)
def test_tags_and_small_damage_do_not_matter(tmp_path, content, seconds):
    (tmp_path / "a").write_bytes(content)
    assert len(decoded(tmp_path / "a")[1]) / RATE == pytest.approx(seconds, abs=0.1)


def test_a_guessed_length_is_no_promise(tmp_path):
    """By the bit rate of the silence that it begins with, this file would last half as long again."""
    content = encode(np.concatenate([np.zeros((RATE, 1)), noise(4, RATE)]), RATE, ".mp3")
    start = content.index(b"\xff\xfb", content.index(b"Xing") + 4)
    (tmp_path / "a.mp3").write_bytes(content[start:])
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert container.duration > 7e6
    assert len(decoded(tmp_path / "a.mp3")[1]) / RATE == pytest.approx(5, abs=0.1)


def test_the_sound_of_a_video_may_be_the_shorter_one_but_not_cut(tmp_path):
    path = write_video(tmp_path / "a.mp4", sound_seconds=4, video_seconds=8)
    assert len(decoded(path)[1]) / 48_000 == pytest.approx(4, abs=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"truncated: it ends after [12]\.\d of the 4\.0 seconds that its header promises"):
        decoded(path)


BAD = {
    "cut mp3": (MP3[:HALF], r"truncated: it ends after 4\.9 of the 10\.0 seconds that its header promises"),
    "cut mp3 with tags": (b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + MP3[:HALF], r"truncated: it ends after 4\.9 of the 10\.0 seconds"),
    "cut webm": (WEBM[: len(WEBM) // 2], r"truncated: it ends after 5\.\d of the 10\.0 seconds that its header promises"),
    "cut m4a": (M4A[: len(M4A) // 2], "not a sound that can be decoded: Invalid data"),
    "damaged m4a": (overwritten(M4A, 30_000), r"damaged: \d+ of its packets or more cannot be decoded"),
    "video without sound": (silent_video(), "there is no sound in it"),
    "random bytes": (JUNK, "not a sound that can be decoded: Invalid data"),
    "tag and random bytes": (b"ID3\x03" + bytes(6) + JUNK, "not a sound that can be decoded: Invalid data"),
    "text": (
        b"<html>404 not found</html>" * 50,
        "not a sound that can be decoded: it is an HTML page, perhaps from a download that failed",
    ),
    "zeros": (bytes(9000), "not a sound that can be decoded: it is nothing but zeros"),
    "list of files": (b"ffconcat version 1.0\nfile a.wav\n", "not a sound that can be decoded"),
    "playlist": (b"#EXTM3U\n#EXTINF:10,\na.mp3\n", "not a sound that can be decoded"),
    "two rates": (WITHOUT_COUNT + encode(noise(1, 48_000), 48_000, ".mp3"), "its sample rate or channels change midway"),
    "1 and 2 channels": (WITHOUT_COUNT + encode(noise(1, RATE, 2), RATE, ".mp3"), "its sample rate or channels change midway"),
    "no samples": (encode(noise(0, RATE), RATE, ".aiff"), None),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_say_why(tmp_path, kind):
    content, reason = BAD[kind]
    (tmp_path / "a.mp3").write_bytes(content)
    (tmp_path / "a.wav").write_bytes(encode(noise(1, RATE), RATE, ".wav"))
    if reason is None:
        assert len(decoded(tmp_path / "a.mp3")[1]) == 0
        return
    with pytest.raises(MediaError, match=reason) as caught:
        decoded(tmp_path / "a.mp3")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 2])
@pytest.mark.parametrize("suffix", [".mp3", ".m4a", ".webm"])
def test_half_of_a_short_file_is_truncated(tmp_path, suffix, seconds):
    """By the length that FFmpeg tells, whatever the container says of bytes."""
    content = (
        encode(noise(seconds, 48_000), 48_000, suffix) if suffix != ".m4a" else write_video(tmp_path / "b.mp4", seconds, 0).read_bytes()
    )
    (tmp_path / "a").write_bytes(content)
    assert len(decoded(tmp_path / "a")[1]) / 48_000 == pytest.approx(seconds, abs=0.05)
    (tmp_path / "a").write_bytes(content[: len(content) * 55 // 100])
    with pytest.raises(MediaError, match=r"truncated: it ends after \d\.\d+ of the \d\.\d+ seconds that its header promises"):
        decoded(tmp_path / "a")


def test_a_format_that_is_none_of_ours_is_named_as_such(tmp_path):
    path = tmp_path / "a.nut"
    path.write_bytes(mux(noise(1, RATE)[:, 0], RATE, "nut", "pcm_s16le"))
    with pytest.raises(MediaError, match="not a sound that can be decoded: its format is not supported"):
        decoded(path)


@pytest.mark.parametrize("in_a_shard", [False, True])
@pytest.mark.parametrize("name", ["a\udcff.mp3", "a,b;'c\\d:e[0].mp3", " ü\n.mp3"])
def test_any_name_is_decoded(tmp_path, name, in_a_shard):
    (tmp_path / "plain.mp3").write_bytes(MP3)
    path = tmp_path / name
    path.write_bytes(b"before" + MP3 + b"behind" if in_a_shard else MP3)
    media = Media(str(path), 6, len(MP3), "x.mp3") if in_a_shard else Media(str(path))
    assert np.array_equal(decode(media, 60)[1], decode(Media(str(tmp_path / "plain.mp3")), 60)[1])


def test_long_files_are_refused_before_their_end(tmp_path):
    path = write(tmp_path / "a.aiff", noise(10, 8000), 8000)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MediaError, match=r"it lasts more than max_seconds = 9\.9"):  # not: truncated
        decoded(path, 9.9)
    (tmp_path / "a.mp3").write_bytes(BAD["two rates"][0])
    with pytest.raises(MediaError, match="it lasts more than max_seconds = 2"):  # not: its rate changes, which it does further on
        decoded(tmp_path / "a.mp3", 2.0)


@pytest.mark.parametrize("rate", [11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_frequencies_that_the_new_rate_cannot_hold_are_filtered_out(rate):
    for hertz in (9500, 10_000, 12_000, 15_000, 20_000):
        if hertz < rate / 2:
            image = abs((hertz + 8000) % 16_000 - 8000)
            wave = resample(tone(hertz, 1, rate), rate, 16_000)
            assert decibels(amplitude(wave, image, 16_000) / 0.5) < -90


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_pitch_loudness_phase_and_length(rate):
    for hertz in (100, 1000, min(5000, 0.35 * rate)):
        wave = resample(tone(hertz, 1, rate), rate, 16_000)
        assert abs(len(wave) - 16_000) <= 2
        expected = tone(hertz, 1, 16_000)[: len(wave)]
        assert np.abs(wave[: len(expected)] - expected)[400:-400].max() < 0.005
        assert amplitude(wave, hertz, 16_000) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(("hertz", "most"), [(1000, -85), (3000, -85), (3500, -35)])
def test_resampling_upwards_adds_nothing(hertz, most):
    wave = resample(tone(hertz, 1, 8000), 8000, 16_000)
    assert decibels(amplitude(wave, 8000 - hertz, 16_000) / 0.5) < most


@pytest.mark.parametrize("rate", [1000, 8000, 22_050, 44_056, 768_000])
def test_a_few_samples_at_any_rate(rate):
    for count in (1, 3, 10, 60, 200, 5000):
        wave = resample(np.full(count, 0.25, np.float32), rate, 16_000)
        assert abs(len(wave) - count * 16_000 / rate) <= 2
        assert wave.max() > 0.1 * min(1, count * 16_000 / rate)
        assert abs(wave).max() < 0.35
