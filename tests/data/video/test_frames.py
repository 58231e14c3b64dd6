import io
import struct
import tarfile
import time
import wave
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long_forms import every, mark_long
from PIL import Image as Pillow
from video_kinds import (
    COUNT,
    HEIGHT,
    KINDS,
    LIMIT,
    MPEG,
    MPEG_B,
    OPEN_GOP,
    RATE,
    SHORT_KINDS,
    VPX,
    WIDTH,
    X264,
    X265,
    Kind,
    assert_refused,
    check_numbers,
    encode,
    number_of,
    numbered,
    numbers_of,
    read,
)

from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.data.video.frames import read_clips, read_header
from polyvit_fast.media import Media, MediaError, MemoryMedia


def test_the_number_in_a_picture_can_be_read():
    assert [number_of(numbered(i)) for i in range(512)] == list(range(512))
    assert {number_of(np.rot90(numbered(7), turns)) for turns in (1, 2, 3)} == {-1}
    assert number_of(numbered(7)[:, ::-1]) == -1
    assert number_of(numbered(7, 341, 257)) == 7


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "vp9.webm", "h264-open-gop.mkv"])
def test_bytes_in_memory_are_read_like_their_file(video, name):
    content = Path(video(name)).read_bytes()
    numbers = np.array([[0, 150, 299]])
    expected, count = read(Media(str(video(name))), numbers)
    for media in (MemoryMedia("mine", content=content), MemoryMedia("mine", 7, len(content), content=b"x" * 7 + content + b"y" * 9)):
        clips, again = read(media, numbers)
        assert again == count
        assert np.array_equal(clips, expected)


CHOICES = {
    "one clip": np.arange(32)[None] * 2,
    "a clip at the end, the last frame repeated": np.minimum(np.arange(32) * 2 + 260, COUNT - 1)[None],
    "several overlapping clips, the latest first": np.array([210, 205, 0])[:, None] + np.arange(16) * 4,
    "far apart": np.array([[3, 299, 7], [150, 4, 299]]),
    "backwards": np.arange(COUNT)[None, ::-7],
    "all": np.arange(COUNT)[None],
}


@pytest.mark.parametrize("name", mark_long(KINDS, SHORT_KINDS))
def test_exactly_the_wanted_frames(video, name):
    count = KINDS[name].count
    for numbers in CHOICES.values():
        check_numbers(video(name), np.minimum(numbers, count - 1), count)
    for number in [*range(0, count, 29), *range(98, 102)]:  # 100 is a keyframe of most
        check_numbers(video(name), [[min(number, count - 1)]], count)


@pytest.mark.parametrize(
    ("name", "options"),
    every(2, [("mpeg2.ts", MPEG_B | {"b": "8M"}), ("h264.mpg", X264), ("mpeg2.mpg", MPEG_B | {"b": "8M"}), ("h264.ts", X264)]),
)
def test_frames_larger_than_a_packet_of_the_container(video, name, options):
    path = video(name, noise=25, size=(320, 240), count=100, options=options)
    for number in (0, 28, 35, 50, 77, 99):
        check_numbers(path, [[number]], count=100)


@dataclass(frozen=True)
class CountedMedia(Media):
    """Counts the bytes that are read."""

    streams: list = field(default_factory=list)

    def open(self):
        self.streams.append(CountedFile(self.path))
        return io.BufferedReader(self.streams[-1])


class CountedFile(io.FileIO):
    num_bytes = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.num_bytes += count
        return count


LARGE = {"noise": 25, "size": (128, 96)}


def fraction_read(path, numbers, count=COUNT):
    media = CountedMedia(str(path))
    check_numbers(media, numbers, count)
    [file] = media.streams
    return file.num_bytes / path.stat().st_size


@pytest.mark.parametrize(
    "name", mark_long(["h264.mp4", "h264-open-gop.mp4", "h264.mov", "hevc.mp4", "mpeg4.avi"], ["h264.mp4", "mpeg4.avi"])
)
@pytest.mark.parametrize("start", [0, 140, 284])
def test_little_more_than_the_wanted_frames_is_read(video, name, start):
    assert fraction_read(video(name, **LARGE), start + np.arange(16)[None]) < 0.25


def test_a_long_gap_is_jumped_over(video):
    assert fraction_read(video("h264.mp4", **LARGE), [[2, 290]]) < 0.3
    assert fraction_read(video("h264.mp4", **LARGE), [[2, 240]]) > 0.7


@pytest.mark.parametrize("name", mark_long(["h264.mkv", "vp9.webm", "h264.ts"], ["h264.ts"]))
def test_files_without_an_index_are_read_once_more_from_the_wanted_frames_on_only(video, name):
    path = video(name, **LARGE)
    whole = fraction_read(path, [[1, COUNT - 1], [150, 151]])
    assert whole > 1.8
    assert whole - fraction_read(path, [[284, 299]]) > 0.6


SPEEDS = np.cumsum([0, *[20] * 60, *[100] * 60, *[50] * 59])
HOLE = np.append(np.arange(90), np.arange(150, 240))


@pytest.mark.parametrize(
    ("name", "times", "ticks"),
    [(name, SPEEDS, 1000) for name in ("h264.mp4", "h264.mkv", "vp9.webm", "h264.ts")] + [("mpeg4.avi", HOLE, RATE)],
)
def test_numbers_follow_time_where_the_rate_varies(video, name, times, ticks):
    path = video(name, count=180, times=tuple(times.tolist()), ticks=ticks)
    clips, count = read(path, lambda count: np.arange(count)[None])
    assert abs(count - 180) <= 2
    frame_time = times[-1] / 179
    shown = numbers_of(clips)[0, :178]
    wanted = np.arange(178) * frame_time
    slack = 0.01 * wanted  # an MP4 counts the last frame's time too
    assert (times[shown] <= wanted + frame_time / 2 + slack).all()
    assert (times[shown + 1] >= wanted + frame_time / 2 - slack).all()


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mov", "h264.mkv", "vp9.webm", "h264.ts", "h264.flv", "h264.avi"])
def test_a_start_later_than_zero(video, name):
    path = video(name, count=100, times=tuple(range(77, 177)), ticks=RATE)
    check_numbers(path, [[99, 0, 50, 50, 1]], count=100)


@pytest.mark.parametrize("options", [X264, OPEN_GOP, X264 | {"bf": "0"}], ids=["closed", "open", "no B-frames"])
@pytest.mark.parametrize(("start", "end"), mark_long([(30, 100), (25, 70), (0, 70), (40, 100)], [(25, 70)]))
def test_what_an_edit_list_cuts_off_is_not_seen(video, tmp_path, options, start, end):
    content = bytearray(video("h264.mp4", count=100, options=options).read_bytes())
    at = content.index(b"elst") + 8
    count, milliseconds, media_time = struct.unpack(">IIi", content[at : at + 12])
    assert (count, milliseconds) == (1, 4000)
    content[at : at + 12] = struct.pack(">IIi", 1, (end - start) * 40, media_time + start * 512)
    (tmp_path / "cut.mp4").write_bytes(content)
    numbers = np.arange(end - start)
    clips, found = read(tmp_path / "cut.mp4", [numbers, numbers[::-1]])
    assert found == end - start
    assert np.array_equal(numbers_of(clips), [numbers + start, numbers[::-1] + start])


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "h264.ts", "mpeg4.avi", "h264.avi", "h264.flv"])
def test_sound_that_lasts_longer_does_not_count(video, name):
    check_numbers(video(name, count=60, sound_seconds=6.0), [[59, 30, 0]], count=60)


# x265 now and then gives a clip that is shorter than the delay of its B-frames time stamps that no muxer takes.
SHORT = ["h264.mp4", "h264.mkv", "h264.avi", "hevc-without-b.mp4", "vp8.webm", "vp9.webm", "mjpeg.avi", "animated.gif"]


@pytest.mark.parametrize("count", mark_long([1, 2, 3], [1, 3]))
@pytest.mark.parametrize("name", SHORT)
def test_very_short_files(video, name, count):
    numbers = np.arange(count)
    check_numbers(video(name, count=count), [numbers, numbers[::-1]], count=count)


@pytest.mark.parametrize("name", ["ffv1.mkv", "vp9.webm", "mjpeg.avi", "mpeg4.avi"])
def test_odd_sizes(video, name):
    path = video(name, count=20, size=(341, 257))
    check_numbers(path, [[3, 19]], count=20)
    assert read(path, [[0]])[0].shape == (1, 1, 257, 341, 3)


@pytest.mark.parametrize(
    ("name", "pixels", "options"),
    [
        ("h264.mp4", "yuv420p10le", X264),
        ("h264.mp4", "yuv444p", X264),
        ("ffv1.mkv", "gray", {}),
        ("hevc.mp4", "yuv420p10le", {"preset": "ultrafast", "x265-params": X265}),
        ("vp9.webm", "yuv444p", VPX),
        ("ffv1.mkv", "yuv422p10le", {}),
        ("ffv1.mkv", "bgr0", {}),
        ("ffv1.mkv", "rgb48le", {}),
        ("ffv1.mkv", "gray16le", {}),
    ],
)
def test_pixel_formats(video, name, pixels, options):
    path = video(name, pixels=pixels, options=options, count=60)
    check_numbers(path, [[59, 31, 0]], count=60)
    [[picture]] = read(path, [[40]])[0]
    assert np.abs(picture.astype(int) - numbered(40)).mean() < 4


COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [230, 230, 230], [20, 20, 20], [200, 200, 40], [40, 200, 200]])


MATRICES = [("unspecified", 0.299, 0.114), ("BT.601", 0.299, 0.114), ("BT.709", 0.2126, 0.0722), ("2020", 0.2627, 0.0593)]


@pytest.mark.parametrize(("matrix", "red", "blue"), MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_colours(tmp_path, matrix, red, blue, full_range):
    rgb = COLOURS.repeat(16, 0)[None].repeat(32, 0) / 255
    y = rgb @ [red, 1 - red - blue, blue]
    chroma = [(rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)]
    scale, lowest, chroma_scale = (255, 0, 255) if full_range else (219, 16, 224)
    planes = np.stack([lowest + scale * y, *(128 + chroma_scale * plane for plane in chroma)]).round().clip(0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
    frame.colorspace = {"unspecified": 2, "BT.601": 6, "BT.709": 1, "2020": 9}[matrix]
    frame.color_range = 2 if full_range else 1
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"qp": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *planes.shape[1:], "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = frame.colorspace, frame.color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    [[picture]] = read(tmp_path / "a.mp4", [[0]])[0]
    assert np.abs(picture[16, 8::16].astype(int) - COLOURS).max() <= 3


@pytest.mark.parametrize("name", mark_long(["h264.mp4", "h264.mov", "h264.mkv"], ["h264.mp4", "h264.mkv"]))
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_files_come_out_upright(video, name, degrees):
    path = video(name, count=10, degrees=degrees)
    own = (WIDTH, HEIGHT) if degrees % 180 else (HEIGHT, WIDTH)
    seen = []

    def resize(height, width):
        seen.append((height, width))
        return 96, 80

    clips = read_clips(Media(str(path)), lambda count: np.array([[0, 9], [5, 6]]), resize=resize, max_pixels=LIMIT)
    assert set(seen) == {own}
    assert clips.shape == (2, 2, 96, 80, 3)
    assert numbers_of(clips).tolist() == [[0, 9], [5, 6]]
    assert read(path, [[0]])[0].shape[2:4] == own


def test_a_rotation_matrix_of_zeros_turns_nothing(video, tmp_path):
    content = video("h264.mp4", count=10).read_bytes()
    at = content.index(b"tkhd") + 44
    assert struct.unpack(">9I", content[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content[:at] + bytes(36) + content[at + 36 :])
    check_numbers(tmp_path / "a.mp4", [[3]], count=10)


@pytest.mark.parametrize("size", [(72, 96), (48, 200), (300, 400)])
def test_resizing_is_that_of_pillow(video, size):
    path = video("ffv1.mkv", pixels="bgr0", count=3, size=(192, 144))
    with av.open(str(path)) as container:
        whole = next(container.decode(video=0)).to_ndarray(format="rgb24")
    expected = Pillow.fromarray(whole).resize(size[::-1], Pillow.Resampling.BILINEAR)
    [[picture]] = read(path, [[0]], size=size)[0]
    assert picture.shape == (*size, 3)
    assert np.abs(picture.astype(int) - np.asarray(expected)).mean() < 1.5


@pytest.mark.parametrize(("codec", "name"), [("libvpx", "vp8.webm"), ("libvpx-vp9", "vp9.webm"), ("mjpeg", "mjpeg.mov")])
def test_frames_that_change_their_size_get_that_of_the_first(tmp_path, codec, name):
    path = grown(tmp_path / name, KINDS[name], (96, 120))
    clips, count = read(path, [[0, 19, 20, 39]])
    assert (clips.shape, count) == ((1, 4, HEIGHT, WIDTH, 3), 40)
    assert numbers_of(clips).tolist() == [[0, 19, 20, 39]]
    clips = read(path, [[25, 39]])[0]
    assert clips.shape == (1, 2, 120, 96, 3)
    assert numbers_of(clips).tolist() == [[25, 39]]


def grown(path, kind, size):
    """40 frames, the second half of which have another size than the header says."""
    with av.open(str(path), "w", format=kind.format) as container:
        first = container.add_stream(kind.codec, rate=RATE, options=dict(kind.options))
        first.width, first.height, first.pix_fmt = WIDTH, HEIGHT, kind.pixels
        second = av.CodecContext.create(kind.codec, "w")
        second.width, second.height, second.pix_fmt, second.options = *size, kind.pixels, dict(kind.options)
        second.time_base, second.framerate = Fraction(1, RATE), RATE
        for encoder, numbers, own in ((first, range(20), (WIDTH, HEIGHT)), (second, range(20, 40), size)):
            packets = []
            for number in numbers:
                frame = av.VideoFrame.from_ndarray(numbered(number, *own), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode()]:
                packet.stream, packet.time_base = first, Fraction(1, RATE)
                container.mux(packet)
    return path


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_frames_that_grow_beyond_the_limit_are_refused(tmp_path, codec):
    path = grown(tmp_path / "a.webm", Kind("webm", codec, VPX), (400, 300))
    assert read(path, [[0, 10]], max_pixels=119_999)[1] == 40
    with pytest.raises(MediaError, match="its frames have 400 x 300 pixels, more than max_pixels = 119999"):
        read(path, [[0, 39]], max_pixels=119_999)
    with pytest.raises(MediaError, match="damaged: Invalid argument"):  # the decoder's word
        read(path, [[0, 39]], max_pixels=5000)
    thin = grown(tmp_path / "b.webm", Kind("webm", codec, VPX), (64, 1200))
    with pytest.raises(MediaError, match="its frames have 64 x 1200 pixels; more than 16 to 1 is refused"):
        read(thin, [[39]])


def test_a_member_of_a_tar_shard_equals_its_file(video, tmp_path):
    names = ["h264.mp4", "h264.mkv", "h264.ts", "mpeg4.avi", "vp8.ivf"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in names:
            tar.add(video(name), name)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        members = [tar.getmember(name) for name in names]
    for member in members:
        media = Media(str(tmp_path / "shard.tar"), member.offset_data, member.size, member.name)
        clips, count = read(media, [[299, 20], [150, 151]])
        assert count == COUNT
        assert np.array_equal(clips, read(video(member.name), [[299, 20], [150, 151]])[0])
        check_numbers(media, [[299, 20], [150, 151]])


def test_one_and_two_threads_decode_the_same(video):
    media = [Media(str(video(name))) for name in ("h264.mp4", "vp9.webm", "hevc.mkv", "mpeg4.avi", "h264.ts")] * 2
    one, two = (map_in_threads(lambda m: read(m, [[299, 5, 100]], size=(40, 56))[0], media, n) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.array_equal(numbers_of(np.concatenate(two)), [[299, 5, 100]] * 10)


def test_text_in_another_encoding_does_not_matter(video, tmp_path):
    path = video("h264.mkv", count=10, metadata={"title": "a title, a title"})
    (tmp_path / "a.mkv").write_bytes(path.read_bytes().replace(b"a title", b"\xe9\xff\xfe\xc0abc"))
    check_numbers(tmp_path / "a.mkv", [[3]], count=10)


def test_a_stream_that_begins_late(tmp_path):
    """FLV's header says which streams follow. PyAV fails at the end of a file with another one."""
    with av.open(str(tmp_path / "a.flv"), "w") as container:
        pictures = container.add_stream("flv", rate=RATE, options=dict(MPEG))
        pictures.width, pictures.height, pictures.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("libmp3lame", rate=44100)
        for number in range(200):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(pictures.encode(frame))
            if number >= 150:
                silence = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp", layout="stereo")
                silence.sample_rate, silence.pts, silence.time_base = 44100, number * 44100 // RATE, Fraction(1, 44100)
                container.mux(sound.encode(silence))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    content = bytearray((tmp_path / "a.flv").read_bytes())
    content[4] = 1  # pictures only
    (tmp_path / "a.flv").write_bytes(content)
    check_numbers(tmp_path / "a.flv", [[0, 120, 199]], count=200)


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\n{path}\n#EXT-X-ENDLIST\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile '{path}'\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_stay_shut(video, tmp_path, name):
    (tmp_path / name).write_text(PLAYLISTS[name].format(path=video("h264.ts")))
    assert_refused(tmp_path / name, "its format is none of mov,matroska,")


PICTURE = io.BytesIO()
Pillow.fromarray(numbered(3)).save(PICTURE, "JPEG")
BAD = {
    "missing": (None, "the file is missing"),
    "empty": (b"", "the file is empty"),
    "text.mp4": (
        b"<html>404 not found</html>" * 9,
        "not a video that can be opened: it is an HTML page, perhaps from a download that failed",
    ),
    "text.txt": (b"some words\n" * 100, "its format is none of mov,matroska,"),
    "zeros.mp4": (
        bytes(10000),
        "not a video that can be opened: it is nothing but zeros|its format is none of .*: it is nothing but zeros",
    ),
    "random.avi": (np.random.default_rng(0).bytes(10000), "not a video that can be opened|its format is none of"),
    "picture.jpg": (PICTURE.getvalue(), "its format is none of mov,matroska,"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_says_so(tmp_path, name):
    content, reason = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, reason)


@pytest.mark.parametrize(
    ("name", "cover", "reason"),
    [
        ("a.m4a", False, "there is no video stream in it"),
        ("a.m4a", True, "there is no video stream in it"),
        ("a.mka", False, "there is no video stream in it"),
        ("a.mp3", False, "its format is none of"),
        ("a.mp3", True, "its format is none of"),
        ("a.flac", False, "its format is none of"),
        ("a.wav", False, "its format is none of"),
    ],
)
def test_sound_is_no_video(tmp_path, name, cover, reason):
    path = tmp_path / name
    if name == "a.wav":
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes(20000))
    else:
        save_sound(path, cover)
    assert_refused(path, reason)


def save_sound(path, cover):
    with av.open(str(path), "w", format={".m4a": "mp4", ".mka": "matroska"}.get(path.suffix)) as container:
        codec = {".mp3": "libmp3lame", ".flac": "flac"}.get(path.suffix, "aac")
        sound = container.add_stream(codec, rate=44100, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt, picture.disposition = WIDTH, HEIGHT, "yuvj420p", 0x400
            packet = av.Packet(PICTURE.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
            container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 44100
        for _ in range(20):
            container.mux(sound.encode(av.AudioResampler(format=sound.format, layout="mono").resample(frame)[0]))
        container.mux(sound.encode())


def test_the_picture_of_a_film_is_not_its_cover(video, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container, av.open(str(video("h264.mp4", count=20))) as source:
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt, cover.disposition = WIDTH, HEIGHT, "yuvj420p", 0x400
        copy = container.add_stream_from_template(source.streams.video[0])
        packet = av.Packet(PICTURE.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = cover, 0, 0, True
        container.mux(packet)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    check_numbers(path, [[0, 19]], count=20)


OF_BYTES = r"truncated: it ends after \d+ of at least \d+ bytes"
OF_FRAMES = r"truncated: it ends after \d+ of the \d+ frames that its header promises|truncated: its last frame is incomplete"
CUT = {
    "h264-fast-start.mp4": OF_BYTES,
    "h264.mp4": "truncated: |not a video that can be opened: ",  # its index stands at the end
    "h264.mov": "truncated: |not a video that can be opened: ",
    "h264-fragments.mp4": OF_BYTES,
    "h264.mkv": OF_BYTES,
    "vp9.webm": OF_BYTES,
    "h264.flv": OF_BYTES,
    "vp8.ivf": OF_BYTES,
    "vp8.ogv": OF_BYTES,
    "wmv.asf": OF_BYTES,
    "animated.gif": OF_BYTES,
    "mpeg2.mxf": OF_BYTES,
    "animated.png": OF_BYTES,
    "mpeg4.avi": OF_FRAMES,
    "h264.avi": OF_FRAMES,
    "mjpeg.avi": OF_FRAMES,
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("fraction", mark_long([0.4, 0.75, 0.93], [0.93]))
def test_a_cut_file_is_refused_whatever_frames_are_wanted(video, tmp_path, name, fraction):
    content = video(name, **LARGE, count=100).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(fraction * len(content))])
    for number in (0, 30, -1):
        assert_refused(path, CUT[name], lambda count, number=number: np.array([[number % count]]))


@pytest.mark.parametrize("name", [name for name in CUT if name != "h264-fragments.mp4"])
@pytest.mark.parametrize("fraction", mark_long([0.9, 0.94], [0.94]))
def test_a_short_file_is_tolerated_no_more(video, tmp_path, name, fraction):
    """Of 20 frames, 0.8 seconds; an index at the end is left out of account."""
    path = video(name, **LARGE, count=20)
    content, index = path.read_bytes(), {"mp4": b"moov", "mov": b"moov", "avi": b"idx1"}.get(KINDS[name].format, b"")
    end = content.rindex(index) if index and "fast" not in name else len(content)
    (tmp_path / name).write_bytes(content[: int(fraction * end)])
    assert_refused(tmp_path / name, CUT[name], [[0]])


@pytest.mark.parametrize(
    ("name", "length"), [("h264.mkv", 1), ("vp9.webm", 40), ("h264-fragments.mp4", 3), ("animated.gif", 1), ("vp8.ogv", 1)]
)
def test_the_last_bytes_belong_to_a_file(video, tmp_path, name, length):
    content = video(name).read_bytes()
    (tmp_path / name).write_bytes(content[:-length])
    assert_refused(tmp_path / name, OF_BYTES)
    (tmp_path / name).write_bytes(content + bytes(100))
    check_numbers(tmp_path / name, [[299, 0]])


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "h264.flv", "mpeg4.avi", "wmv.asf", "h264-fragments.mp4"])
@pytest.mark.parametrize("seconds", mark_long([0.3, 1.1, 6.0], [6.0]))
def test_a_short_file_with_sound_is_whole(video, name, seconds):
    if name != "wmv.asf":
        check_numbers(video(name, count=20, sound_seconds=seconds), [[19, 0]], count=20)
    check_numbers(video(name, count=20, rate=Fraction(2)), [[19, 0]], count=20)


def test_a_cut_at_the_end_of_the_last_frame_is_refused(video, tmp_path):
    content = video("h264-fast-start.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[:-1])
    assert_refused(tmp_path / "a.mp4", OF_BYTES)
    at = content.index(b"mdat") - 4  # a box up to the end of the file promises no bytes, the index does
    (tmp_path / "a.mp4").write_bytes(content[:at] + bytes(4) + content[at + 4 : -1])
    assert_refused(tmp_path / "a.mp4", r"truncated: its index has a frame at byte \d+, the file has \d+")
    (tmp_path / "a.mp4").write_bytes(content + b"appended")
    check_numbers(tmp_path / "a.mp4", [[299]])


def test_files_without_their_index(video, tmp_path):
    """MP4 cannot be read without, AVI can."""
    content = video("h264.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.rindex(b"moov") - 4])
    assert_refused(tmp_path / "a.mp4", "truncated: its table of contents")
    content = video("mpeg4.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content[: content.rindex(b"idx1")])
    check_numbers(tmp_path / "a.avi", [[299, 5, 150]])


@pytest.mark.parametrize(
    "name", mark_long(["h264-fast-start.mp4", "hevc.mp4", "mpeg4.avi", "mjpeg.mov", "vp9.mp4"], ["h264-fast-start.mp4", "mjpeg.mov"])
)
def test_damage_counts_where_it_is_met(video, tmp_path, name):
    content = bytearray(video(name, **LARGE).read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 10] = bytes(len(content) // 10)
    (tmp_path / name).write_bytes(content)
    check_numbers(tmp_path / name, [[0, 20, 40]])
    assert_refused(tmp_path / name, "damaged: ", [np.arange(0, COUNT, 3)])


def test_frames_of_a_cut_transport_stream_are_whole_or_refused(video, tmp_path):
    """It promises no length, so that the cut shows in its last frame only."""
    path = video("h264.ts", **LARGE, options=X264 | {"bf": "0"})
    content, whole = path.read_bytes(), read(path, [np.arange(COUNT)])[0][0].astype(int)
    reasons = []
    for length in range(len(content) // 2, len(content) // 2 + 40 * 188 * 5, 188 * 5):
        (tmp_path / "a.ts").write_bytes(content[:length])
        try:
            clips, count = read(tmp_path / "a.ts", lambda count: np.array([[count - 1]]))
        except MediaError as error:
            reasons.append(str(error))
        else:
            assert np.abs(clips[0, 0] - whole[count - 1]).max() <= 1
    assert 0 < len(reasons) < 40
    assert all("cannot be decoded completely" in reason for reason in reasons)


def test_zeros_instead_of_the_last_frames(video, tmp_path):
    for name in ("mjpeg.mov", "h264-fast-start.mp4", "mpeg4.mp4"):
        content = bytearray(video(name, **LARGE).read_bytes())
        start = content.index(b"mdat")
        tail = start + (len(content) - start) // 2
        content[tail:] = bytes(len(content) - tail)
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, "damaged: |truncated: its table of contents", [[290]])


@pytest.mark.parametrize(
    "name",
    mark_long(
        ["h264.mp4", "h264.mkv", "hevc.mp4", "vp9.webm", "h264.ts", "mjpeg.avi", "animated.gif"], ["h264.mp4", "h264.ts", "animated.gif"]
    ),
)
def test_the_pixel_limit(video, name):
    path = video(name, count=30, size=(160, 120))
    assert read(path, [[0]], max_pixels=160 * 120)[0].shape == (1, 1, 120, 160, 3)
    with pytest.raises(MediaError, match="its frames have 160 x 120 pixels, more than max_pixels = 19199"):
        read(path, [[0]], max_pixels=160 * 120 - 1)


@pytest.mark.parametrize("size", [(1024, 48), (32, 576)])
def test_thin_pictures(video, size):
    check_numbers(video("ffv1.mkv", count=3, size=(768, 48)), [[2]], count=3)
    with pytest.raises(MediaError, match=f"its frames have {size[0]} x {size[1]} pixels; more than 16 to 1 is refused"):
        read(video("ffv1.mkv", count=3, size=size), [[0]])


def lie_in_avi(content):
    """The header."""
    at = content.index(b"strf") + 12
    content[at : at + 8] = struct.pack("<ii", 20000, 20000)


def lie_in_jpegs(content):
    """Every frame, not the container's header."""
    at = content.find(b"\xff\xc0\x00\x11\x08")
    while at >= 0:
        content[at + 5 : at + 9] = struct.pack(">HH", 20000, 20000)
        at = content.find(b"\xff\xc0\x00\x11\x08", at + 1)


def lie_in_vp8(content):
    at = content.find(b"\x9d\x01\x2a")
    while at >= 0:
        content[at + 3 : at + 7] = struct.pack("<HH", 16383, 16383)
        at = content.find(b"\x9d\x01\x2a", at + 1)


def lie_in_gif(content):
    content[6:10] = struct.pack("<HH", 60000, 40000)


@pytest.mark.parametrize(
    ("kind", "lie", "reason"),
    [
        (Kind("avi", "ffv1", {}, count=3), lie_in_avi, "cannot be decoded or have far more than max_pixels = 1000000"),
        (Kind("avi", "mjpeg", {}, "yuvj420p", count=3), lie_in_jpegs, "damaged: Invalid"),
        (Kind("mov", "mjpeg", {}, "yuvj420p", count=3), lie_in_jpegs, "damaged: Invalid"),
        (Kind("webm", "libvpx", VPX, count=3), lie_in_vp8, "damaged: Invalid"),
        (Kind("ivf", "libvpx", VPX, count=3), lie_in_vp8, "damaged: Invalid"),
        (Kind("gif", "gif", {}, "rgb8", count=3), lie_in_gif, "cannot be decoded or have far more than max_pixels = 1000000"),
    ],
)
def test_huge_frames_are_not_decoded(tmp_path, kind, lie, reason):
    path = encode(tmp_path / "a", kind)
    content = bytearray(path.read_bytes())
    lie(content)
    path.write_bytes(content)
    assert_refused(path, reason)


def test_opening_a_file_decodes_no_huge_frame(tmp_path):
    side = 16000
    packed = zlib.compressobj(1)
    row = bytes(side + 1)
    pixels = b"".join([*(packed.compress(row) for _ in range(side)), packed.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    parts = [struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks]
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("png", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "gray"
        packet = av.Packet(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = stream, 0, 0, Fraction(1, RATE), True
        container.mux(packet)
    assert_refused(tmp_path / "a.avi", "damaged: |cannot be decoded or have far more than max_pixels")


def test_an_unknown_codec(video, tmp_path):
    content = video("mpeg4.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content.replace(b"FMP4", b"QQQQ"))
    assert_refused(tmp_path / "a.avi", "its video codec is not supported")


@pytest.mark.parametrize(
    ("name", "mark", "reason"),
    [
        ("h264.mkv", b"\x1f\x43\xb6\x75", OF_BYTES),
        ("h264-fragments.mp4", b"moof", "there are no frames with time stamps in it"),
        ("animated.gif", b"!\xf9\x04", "truncated: it ends after 800 of at least 801 bytes"),
        ("vp8.ivf", b"\0\0\0\0\0\0\0\0\0\0", "there are no frames with time stamps in it"),
    ],
)
def test_a_header_without_frames(video, tmp_path, name, mark, reason):
    content = video(name).read_bytes()
    (tmp_path / name).write_bytes(content[: content.index(mark)])
    assert_refused(tmp_path / name, reason)


@pytest.mark.parametrize("count", [0, 2**32 - 1])
def test_an_ivf_without_or_with_a_wrong_number_of_frames_does_not_hang(video, tmp_path, count):
    content = bytearray(video("vp8.ivf").read_bytes())
    assert struct.unpack("<I", content[24:28]) == (COUNT,)
    content[24:28] = struct.pack("<I", count)
    (tmp_path / "a.ivf").write_bytes(content)
    started = time.monotonic()
    if count:
        assert_refused(tmp_path / "a.ivf", "truncated: it ends after")
    else:
        check_numbers(tmp_path / "a.ivf", [[299, 0]])
    assert time.monotonic() - started < 5


def test_a_broken_disk_is_a_reason(video):
    class BrokenFile(io.FileIO):
        def readinto(self, buffer):
            if self.tell() > 20000:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    class BrokenMedia(Media):
        def open(self):
            return io.BufferedReader(BrokenFile(self.path), 4096)

    with pytest.raises(MediaError, match="Input/output error"):
        read(BrokenMedia(str(video("h264.mkv", **LARGE))), [[0]])


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts"])
@pytest.mark.parametrize("defect", [AttributeError, NameError, TypeError])
def test_a_defect_is_no_broken_file(video, name, defect):
    class Defective(io.FileIO):
        def readinto(self, buffer):
            if self.tell() > 20000:
                raise defect("a defect")
            return super().readinto(buffer)

    class DefectiveMedia(Media):
        def open(self):
            return io.BufferedReader(Defective(self.path), 4096)

    with pytest.raises(defect, match="a defect"):
        read(DefectiveMedia(str(video(name, **LARGE))), [[299]])

    def resize(height, width):
        raise defect("another defect")

    with pytest.raises(defect, match="another defect"):
        read_clips(Media(str(video(name))), lambda count: np.array([[0]]), resize=resize, max_pixels=LIMIT)


FUZZED = ["h264.mp4", "h264.mkv", "h264.ts", "h264.avi", "h264.flv", "hevc.mp4", "vp8.ivf", "mpeg2.mpg", "wmv.asf", "animated.gif"]


@settings(max_examples=60)
@given(
    st.sampled_from(FUZZED),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_damaged_bytes_give_frames_or_a_reason(video, tmp_path_factory, name, changes, in_header, cut):
    content = bytearray(video(name, count=30).read_bytes())
    for at, replacement in changes:
        at %= 600 if in_header else len(content)
        content[at : at + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: cut and cut % len(content)])
    with suppress(MediaError):
        clips, _ = read(path, lambda count: np.array([[0, count // 2], [count - 1, 3]]), size=(24, 32))
        assert clips.shape == (2, 2, 24, 32, 3)


@pytest.mark.parametrize(
    ("name", "codec", "plain"),
    [
        ("h264.mp4", "h264", True),
        ("h264-29.97.mp4", "h264", True),
        ("h264-fragments.mp4", "h264", True),
        ("h264.mkv", "h264", True),
        ("hevc.mp4", "hevc", True),
        ("vp9.webm", "vp9", True),
        ("vp8.webm", "vp8", True),
        ("mpeg4.mp4", "mpeg4", True),
    ],
)
def test_headers_of_usual_files(tmp_path, name, codec, plain):
    path = encode(tmp_path / name, KINDS[name])
    header = read_header(Media(str(path)), LIMIT)
    assert (header.codec, header.num_frames, header.height, header.width) == (codec, COUNT, HEIGHT, WIDTH)
    assert (header.pixels, header.plain) == ("yuv420p", plain)
    assert header.container.startswith(("mov,", "matroska,"))


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize("oddity", ["turned", "rate"])
def test_headers_of_files_whose_frames_are_not_simply_the_kth(tmp_path, format, oddity):
    times = tuple(np.cumsum(np.where(np.arange(60) < 30, 20, 60)).tolist()) if oddity == "rate" else ()
    kind = Kind(format, "libx264", X264, count=60, degrees=90 if oddity == "turned" else 0, times=times)
    header = read_header(Media(str(encode(tmp_path / "a.video", kind))), LIMIT)
    assert not header.plain
    assert header.num_frames == 60


def test_headers_of_broken_files_say_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(MediaError, match="not a video"):
        read_header(Media(str(tmp_path / "a.mp4")), LIMIT)
    with pytest.raises(MediaError, match="more than max_pixels = 100"):
        read_header(Media(str(encode(tmp_path / "b.mp4", KINDS["h264.mp4"]))), 100)
