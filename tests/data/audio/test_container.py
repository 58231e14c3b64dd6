import io
import struct

import numpy as np
import pytest
from long_forms import mark_long
from sound_files import encode, mux, noise, write_video

from polyvit_fast.data.audio.container import FileTail, check_container, format_cut, states_duration
from polyvit_fast.data.audio.reader import SoundReader
from polyvit_fast.media import Media, MediaError

RATE = 48_000


def check(content):
    check_container(FileTail(io.BufferedReader(io.BytesIO(content))))


def samples(path):
    found = {}
    reader = SoundReader(batch=1, num_threads=1, sample_rate_hz=RATE, max_seconds=60)
    reader.read([Media(str(path))], lambda i, wave: found.update({i: len(wave)}))
    return found[0]


EXACT = [("mp4", "aac"), ("ipod", "alac"), ("mov", "pcm_s16le"), ("mp4", "libopus"), ("3gp", "aac"), ("webm", "libopus")]
EXACT += [("matroska", codec) for codec in ("aac", "flac", "pcm_s16le", "libmp3lame", "ac3")]
EXACT += [("asf", "wmav2"), ("asf", "wmav1"), ("avi", "pcm_s16le"), ("avi", "libmp3lame"), ("flv", "aac"), ("mp3", "libmp3lame")]
EXACT += [("ogg", "libopus"), ("ogg", "flac")]


@pytest.mark.parametrize("seconds", mark_long([0.1, 0.4, 3], [0.4]))
@pytest.mark.parametrize(("container", "codec"), EXACT)
def test_a_part_of_a_file_is_truncated_however_short_it_is(tmp_path, container, codec, seconds):
    content = mux(noise(seconds, RATE)[:, 0], RATE, container, codec)
    (tmp_path / "a").write_bytes(content)
    more = samples(tmp_path / "a") - seconds * RATE  # packets are filled up, and some tell nothing of the encoder's delay
    assert -2048 * (container == "asf") <= more < 5000  # FFmpeg's encoder of WMA drops the last packet
    for fraction in (0.3, 0.5, 0.75, 0.9, 0.97):
        (tmp_path / "a").write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(MediaError, match=r"^truncated: "):
            samples(tmp_path / "a")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("seconds", [0.1, 3])
def test_ogg_ends_with_the_page_that_says_so(subtype, seconds):
    content = encode(noise(seconds, RATE), RATE, ".ogg", subtype)
    check(content)
    check(content + bytes(1000))
    check(content + content)  # one stream after the other
    for fraction in (0.5, 0.9, 0.99):
        with pytest.raises(MediaError, match="truncated: it ends in the middle of an Ogg page"):
            check(content[: int(fraction * len(content))])
    with pytest.raises(MediaError, match="truncated: the page that ends an Ogg stream is missing"):
        check(content[: content.rindex(b"OggS")])


PIPED = [("webm", "libopus"), ("matroska", "pcm_s16le"), ("matroska", "libmp3lame"), ("matroska", "ac3"), ("avi", "pcm_s16le")]
PIPED += [
    ("avi", "libmp3lame"),
    ("flv", "aac"),
    ("mp3", "libmp3lame"),
    ("ogg", "flac"),
    ("asf", "wmav2"),
    ("mpegts", "aac"),
    ("adts", "aac"),
]


@pytest.mark.parametrize("seconds", mark_long([0.1, 3], [0.1]))
@pytest.mark.parametrize(("container", "codec"), PIPED)
def test_a_file_that_was_written_to_a_pipe_is_whole(tmp_path, container, codec, seconds):
    (tmp_path / "a").write_bytes(mux(noise(seconds, RATE)[:, 0], RATE, container, codec, piped=True))
    assert -2048 * (container == "asf") <= samples(tmp_path / "a") - seconds * RATE < 6000


def test_a_length_that_ffmpeg_guesses_is_no_promise(tmp_path):
    """By the bit rate of its first frames, the silence, this file would be much longer."""
    wave = np.concatenate([np.zeros(RATE, np.float32), noise(3, RATE)[:, 0]])
    for container, stated in (("matroska", False), ("avi", None)):
        content = mux(wave, RATE, container, "libmp3lame", piped=True)
        (tmp_path / "a").write_bytes(content)
        assert abs(samples(tmp_path / "a") - 4 * RATE) < 6000
        assert stated is None or states_duration(Media(str(tmp_path / "a"))) == stated
    (tmp_path / "a").write_bytes(mux(wave, RATE, "matroska", "libmp3lame"))
    assert states_duration(Media(str(tmp_path / "a")))


def test_one_transport_stream_after_the_other_is_the_sum(tmp_path):
    """Their time stamps begin anew."""
    content = mux(noise(1, RATE)[:, 0], RATE, "mpegts", "aac")
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content * 3)
    assert samples(tmp_path / "b") == pytest.approx(3 * samples(tmp_path / "a"), abs=2048)


APPENDED = "^another recording begins at byte {}, where a second file was appended: split it there$"
UNREAD = [("mp4", "aac"), ("ipod", "alac"), ("mov", "pcm_s16le"), ("3gp", "aac"), ("flv", "aac"), ("asf", "wmav2")]
READ = [
    ("asf", "wmav2", True),
    ("matroska", "aac", False),
    ("avi", "pcm_s16le", False),
    ("mp3", "libmp3lame", False),
    ("ogg", "flac", False),
]


@pytest.mark.parametrize(("container", "codec"), UNREAD)
def test_a_second_file_that_ffmpeg_does_not_read_is_named(tmp_path, container, codec):
    content = mux(noise(1, RATE)[:, 0], RATE, container, codec)
    path = tmp_path / "a"
    path.write_bytes(content + bytes(128))
    assert abs(samples(path) - RATE) < 6000
    path.write_bytes(content + content)
    with pytest.raises(MediaError, match=APPENDED.format(len(content))):
        samples(path)


@pytest.mark.parametrize(("container", "codec", "piped"), READ)
def test_a_second_file_that_ffmpeg_reads_is_heard(tmp_path, container, codec, piped):
    content = mux(noise(1, RATE)[:, 0], RATE, container, codec, piped)
    (tmp_path / "a").write_bytes(content + content)
    assert abs(samples(tmp_path / "a") - 2 * RATE) < 6000


def test_the_sound_of_a_second_video_is_not_lost_silently(tmp_path):
    path = write_video(tmp_path / "a.mp4", sound_seconds=1, video_seconds=1)
    content = path.read_bytes()
    path.write_bytes(content + content)
    with pytest.raises(MediaError, match=APPENDED.format(len(content))):
        samples(path)
    (tmp_path / "a.tar").write_bytes(bytes(512) + content + content)
    with (
        Media(str(tmp_path / "a.tar"), 512, 2 * len(content), "a").open() as file,
        pytest.raises(MediaError, match=APPENDED.format(len(content))),
    ):
        check_container(FileTail(file))


def test_a_second_amr_file_is_no_change_of_rate(tmp_path):
    content = b"#!AMR\n" + (b"\x3c" + bytes(31)) * 50
    (tmp_path / "a").write_bytes(content + content)
    with pytest.raises(MediaError, match=APPENDED.format(len(content))):
        samples(tmp_path / "a")


def box(name, content, size=None):
    return struct.pack(">I4s", 8 + len(content) if size is None else size, name) + content


MP4 = mux(noise(1, RATE)[:, 0], RATE, "mp4", "aac")


def test_boxes_of_mp4(tmp_path):
    for more in (b"", np.random.default_rng(0).bytes(5000), box(b"free", bytes(99)), bytes(77)):
        check(MP4 + more)
    large = struct.pack(">I4sQ", 1, b"mdat", 16 + 100) + bytes(100)
    check(box(b"moov", b"") + large)
    with pytest.raises(MediaError, match=r"truncated: it has 94 of the 124 bytes that its header promises"):
        check((box(b"moov", b"") + large)[:-30])
    check(box(b"ftyp", bytes(8)) + box(b"moov", bytes(90)) + box(b"mdat", bytes(100), size=0))  # up to the end
    with pytest.raises(MediaError, match=r"truncated: its table of contents \(moov\) is missing"):
        check(box(b"ftyp", bytes(8)) + box(b"mdat", bytes(100)))
    path = write_video(tmp_path / "a.mp4", sound_seconds=4, video_seconds=8)
    check(path.read_bytes())
    with pytest.raises(MediaError, match="truncated: "):
        check(path.read_bytes()[:-1000])


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_sizes_of_avi_that_a_program_could_not_know(size):
    content = bytearray(mux(noise(1, RATE)[:, 0], RATE, "avi", "pcm_s16le"))
    struct.pack_into("<I", content, 4, size)
    check(bytes(content))


def test_other_files_are_not_judged():
    for content in (b"<html>404</html>", bytes(5000), np.random.default_rng(0).bytes(5000), b"\x1aE\xdf\xa3", b"OggS", b"FLV\1", b"ID3"):
        check(content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((250, 1000, 1000), "it ends after 0.2 of the 1.0 seconds"),
        ((20, 50, 1000), "it ends after 0.020 of the 0.050 seconds"),
        ((980, 1000, 1000), "it ends after 0.980 of the 1.000 seconds"),
        ((250, 1000, 0), "it has 250 of the 1000 bytes"),
    ],
)
def test_the_message_tells_the_two_numbers_apart(arguments, message):
    assert format_cut(*arguments) == f"truncated: {message} that its header promises"
