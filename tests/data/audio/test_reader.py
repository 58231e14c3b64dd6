import resource
import struct
import time

import numpy as np
import pytest
import soundfile
from sound_files import (
    FLAC,
    PLAIN,
    RATE,
    SAMPLES,
    WAVE,
    amplitude,
    chunk,
    encode,
    noise,
    read_waves,
    silent_video,
    tone,
    wav,
    wav_format,
    waves_of,
    with_dali,
    write,
)

from polyvit_fast.data import dali
from polyvit_fast.data.audio import reader as module
from polyvit_fast.data.audio.reader import SoundReader, read_header
from polyvit_fast.media import Media, MediaError

KINDS = [("wav", kind) for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")]
KINDS += [("wavex", kind) for kind in ("PCM_16", "PCM_24", "FLOAT")] + [("flac", kind) for kind in ("PCM_S8", "PCM_16", "PCM_24")]


@pytest.mark.parametrize(("container", "subtype"), KINDS)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_dali_decodes_equals_libsndfile(tmp_path, container, subtype, channels):
    path = tmp_path / f"a.{container}"
    soundfile.write(path, noise(0.3, RATE, channels), RATE, format=container.upper(), subtype=subtype)
    theirs, _ = soundfile.read(path, always_2d=True)
    [wave] = read_waves(path)
    assert with_dali(path)
    assert read_header(Media(str(path))).samples == len(theirs)
    assert wave.shape == (len(theirs),)
    assert np.abs(wave - theirs.mean(1)).max() < 1e-6


@pytest.mark.parametrize(("suffix", "subtype"), [(".ogg", "VORBIS"), (".mp3", None)])
def test_what_ffmpeg_decodes_equals_libsndfile(tmp_path, suffix, subtype):
    path = write(tmp_path / f"a{suffix}", noise(3, RATE, 2), RATE, subtype)
    [wave] = read_waves(path)
    theirs = soundfile.read(path)[0].mean(1)
    assert not with_dali(path)
    assert len(wave) == len(theirs)
    assert np.abs(wave - theirs).max() < 1e-4


@pytest.mark.parametrize("seconds", [0.02, 0.3, 1])
def test_a_short_vorbis_file_ends_where_it_should(tmp_path, seconds):
    """FFmpeg finds the end of one with a single page of sound at another sample, up to 256 before or after it."""
    path = write(tmp_path / "a.ogg", tone(440, seconds, RATE), RATE, "VORBIS")
    [wave] = read_waves(path)
    theirs = soundfile.read(path)[0]
    assert with_dali(path)
    assert len(wave) == len(theirs) == round(seconds * RATE)
    assert np.abs(wave - theirs).max() < 1e-6


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3", ".m4a", ".ogg"])
def test_every_way_of_decoding_leads_to_resampling_without_aliases(tmp_path, suffix):
    high = write(tmp_path / f"high{suffix}", tone(10_000, 2, 44_100), 44_100)
    low = write(tmp_path / f"low{suffix}", tone(1000, 2, 44_100), 44_100)
    wave_of_high, wave_of_low = read_waves(high, low)
    assert amplitude(wave_of_high, 6000, RATE) < 0.5 * 10 ** (-75 / 20)  # what codecs add included
    assert amplitude(wave_of_low, 1000, RATE) == pytest.approx(0.5, rel=0.01)
    assert -50 < len(wave_of_low) - 2 * RATE < 1000  # AAC fills its last packet


def test_content_decides_and_not_the_name(tmp_path):
    for suffix in (".wav", ".flac", ".mp3", ".ogg"):
        right = write(tmp_path / f"a{suffix}", noise(0.3, RATE), RATE)
        for wrong in (".mp3", ".wav", ".flac", ""):
            named = tmp_path / f"wrong{wrong}"
            named.write_bytes(right.read_bytes())
            assert np.array_equal(*read_waves(right, named))


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        wav(chunk(b"LIST", b"odd"), wav_format(), chunk(b"fact", bytes(4)), chunk(b"data", SAMPLES), chunk(b"LIST", b"after")),
        PLAIN.replace(struct.pack("<4sI", b"data", len(SAMPLES)), b"data\xff\xff\xff\xff"),
        PLAIN.replace(struct.pack("<4sI", b"data", len(SAMPLES)), b"data\0\0\xff\x7f"),
        PLAIN.replace(struct.pack("<4sI", b"data", len(SAMPLES)), b"data\0\0\0\0"),
    ],
    ids=["plain", "further chunks", "piped by FFmpeg", "piped by SoX", "never finished"],
)
def test_headers_of_wav_files_in_the_wild(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    [wave] = read_waves(tmp_path / "a.wav")
    assert np.array_equal(wave, WAVE.astype(np.float32) / 32768)


def test_a_piped_flac_and_one_with_other_tags(tmp_path):
    whole = write(tmp_path / "a.flac", noise(1, RATE), RATE)
    (tmp_path / "piped.flac").write_bytes(FLAC[:21] + bytes([FLAC[21] & 0xF0]) + bytes(4) + FLAC[26:])
    (tmp_path / "tagged.flac").write_bytes(b"ID3\x04" + bytes(6) + FLAC)
    (tmp_path / "appended.flac").write_bytes(FLAC + b"TAG" + bytes(125))
    expected, *others = read_waves(whole, *(tmp_path / f"{kind}.flac" for kind in ("piped", "tagged", "appended")))
    for other in others:
        assert np.array_equal(other, expected)


def flac_that_claims(samples, rate, channels):
    packed = rate << 44 | (channels - 1) << 41 | 15 << 36 | samples
    return FLAC[:18] + packed.to_bytes(8, "big") + FLAC[26:]


def floats(*values):
    return encode(np.array([0.1, *values, 0.1] * 100, np.float64), RATE, ".wav", "DOUBLE")


UNREADABLE = "not a sound that can be decoded: Invalid data"
DAMAGED = "truncated or damaged: its header is good, its samples cannot be decoded"
INFINITE = r"some of its samples are infinite, not a number or beyond 1e\+12"
BAD = {
    "missing": (None, "the file is missing"),
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 not found</html>" * 9, "not a sound that can be decoded: it is an HTML page, perhaps from a download that failed"),
    "random bytes": (np.random.default_rng(0).bytes(5000), UNREADABLE),
    "video without sound": (silent_video(), "there is no sound in it"),
    "wav without data": (wav(wav_format()), UNREADABLE),
    "wav without format": (wav(chunk(b"data", SAMPLES)), UNREADABLE),
    "wav of 0 samples": (wav(wav_format(), chunk(b"data", b"")), "there are no samples in it"),
    "wav of 0 channels": (wav(wav_format(channels=0), chunk(b"data", SAMPLES)), "not a sound that can be decoded: Invalid"),
    "wav of 0 Hz": (wav(wav_format(rate=0), chunk(b"data", SAMPLES)), "its sample rate is 0 Hz; 1000 to 768000 are supported|not a sound"),
    "wav of 4 GHz": (wav(wav_format(rate=1 << 31), chunk(b"data", SAMPLES)), "its sample rate is 2147483648 Hz; 1000 to 768000"),
    "cut wav": (PLAIN[: len(PLAIN) // 4], r"truncated: it ends after 0\.2 of the 1\.0 seconds that its header promises"),
    "cut flac": (FLAC[: len(FLAC) // 2], DAMAGED + r" \(.*Requested 16000 samples but got \d+ samples\)$"),
    "flac without its last bytes": (FLAC[:-20], DAMAGED),
    "flac with a hole": (FLAC[:9000] + bytes(3000) + FLAC[12_000:], DAMAGED),
    "flac header": (FLAC[:60], DAMAGED),
    "flac's first bytes": (FLAC[:9], UNREADABLE),
    "aiff of 0 samples": (encode(noise(0, RATE), RATE, ".aiff"), "there are no samples in it"),
    "nan": (floats(np.nan), INFINITE),
    "infinity": (floats(-np.inf), INFINITE),
    "beyond float32": (floats(1e300), INFINITE),
    "energy beyond float32": (floats(1e25), INFINITE),
    "too long": (encode(noise(101, 1000), 1000, ".wav"), "it lasts more than max_seconds = 100"),
    "too long, not wav": (encode(noise(101, 8000, amplitude=0), 8000, ".mp3"), "it lasts more than max_seconds = 100"),
    "flac that claims a month": (flac_that_claims(2**36 - 1, RATE, 1), "it lasts more than max_seconds = 100"),
    "flac that claims gigabytes": (
        flac_that_claims(99 * 655_350, 655_350, 8),
        "64879650 samples of 8 channels, more than 268435456 numbers",
    ),
}


@pytest.fixture(scope="module")
def reader():
    return SoundReader(batch=3, num_threads=2, sample_rate_hz=RATE, max_seconds=100.0)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_say_why_and_the_next_call_works(tmp_path, reader, kind):
    content, reason = BAD[kind]
    bad, good = tmp_path / "bad.wav", write(tmp_path / "good.flac", noise(0.2, RATE), RATE)
    if content is not None:
        bad.write_bytes(content)
    [before] = waves_of(reader, good)
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match=reason) as caught:
        waves_of(reader, bad)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(MediaError):
        waves_of(reader, good, bad, good)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # kB
    [after] = waves_of(reader, good)
    assert np.array_equal(after, before)


def test_a_defect_of_ours_is_no_broken_file(tmp_path, reader):
    for suffix in (".wav", ".mp3"):
        path = write(tmp_path / f"a{suffix}", noise(0.2, RATE), RATE)
        with pytest.raises(AttributeError):
            reader.read([Media(str(path))], lambda i, wave: wave.no_such_thing)


def test_a_folder_is_no_file(tmp_path, reader):
    with pytest.raises(MediaError, match="not a regular file"):
        waves_of(reader, tmp_path)


def test_a_member_of_a_tar_is_read_at_its_offset(tmp_path, reader):
    for suffix in (".wav", ".flac", ".mp3"):
        content = encode(noise(0.3, RATE), RATE, suffix)
        (tmp_path / "alone").write_bytes(content)
        (tmp_path / "a.tar").write_bytes(b"x" * 512 + content + content[:999])
        found = {}
        reader.read([Media(str(tmp_path / "a.tar"), 512, len(content), "a")], lambda i, wave, found=found: found.update({i: wave.copy()}))
        assert np.array_equal(found[0], waves_of(reader, tmp_path / "alone")[0])


@pytest.mark.parametrize(("limit", "calls"), [(1, 5), (150_000, 3), (10**9, 1)])
def test_long_files_are_decoded_in_chunks(tmp_path, monkeypatch, limit, calls):
    paths = [write(tmp_path / f"{i}.wav", noise(0.5 + 0.1 * i, RATE, seed=i), RATE) for i in range(5)]
    whole = read_waves(*paths)
    monkeypatch.setattr(module, "CHUNK_BYTES", limit)
    sizes = []
    monkeypatch.setattr(dali, "run", lambda *args, run=dali.run, **kw: (sizes.append(len(kw["content"])), run(*args, **kw))[1])
    for wave, expected in zip(read_waves(*paths), whole, strict=True):
        assert np.array_equal(wave, expected)
    assert len(sizes) == calls
    assert sum(sizes) == 5


def test_a_file_of_empty_chunks_is_not_searched_to_its_end(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(bytes(50_000_000)))
    started = time.monotonic()
    assert not with_dali(tmp_path / "a.wav")
    assert time.monotonic() - started < 1
