"""Video files of every kind that FFmpeg writes, whose frames show their numbers."""

import resource
import time
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
import pytest

from polyvit_fast.data.video.frames import read_clips
from polyvit_fast.media import Media, MediaError

WIDTH, HEIGHT = 64, 48
RATE = 25
COUNT = 300
LIMIT = 10**6

# A picture is 3 x 4 cells, black or white: three corners tell which way is up, the other nine cells are the bits of its number.
BITS = [1, 2, 4, 5, 6, 7, 9, 10, 11]
CORNERS = {0: True, 3: False, 8: False}


@lru_cache(maxsize=512)
def numbered(number, width=WIDTH, height=HEIGHT):
    """The picture of a number, made once: nobody may write to it."""
    cells = np.zeros(12, bool)
    cells[0] = True
    cells[BITS] = [number >> i & 1 for i in range(9)]
    y, x = np.mgrid[:height, :width]
    grey = np.where(cells.reshape(3, 4)[3 * y // height, 4 * x // width], 220, 30)
    picture = grey[..., None].repeat(3, -1).astype(np.uint8)
    picture.flags.writeable = False
    return picture


def number_of(picture):
    """-1 where the picture is none of ours, or lies on its side."""
    height, width = picture.shape[:2]
    cells = picture[height // 6 :: height // 3][:3, width // 8 :: width // 4][:, :4].mean(-1).ravel()
    if any((cells[i] > 125) != white for i, white in CORNERS.items()) or np.abs(cells - 125).min() < 40:
        return -1
    return sum(1 << i for i, cell in enumerate(BITS) if cells[cell] > 125)


def numbers_of(clips):
    return np.array([[number_of(picture) for picture in clip] for clip in clips])


X264 = {"g": "20", "bf": "3", "b_strategy": "0", "sc_threshold": "0", "preset": "veryfast", "crf": "20", "threads": "1"}
OPEN_GOP = X264 | {"x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0"}
X265 = "keyint=20:min-keyint=20:open-gop=1:bframes=3:b-adapt=0:scenecut=0:log-level=none:pools=none:frame-threads=1:crf=12"
VPX = {"g": "20", "deadline": "realtime", "cpu-used": "8", "b": "500k", "threads": "1"}
MPEG = {"g": "15", "b": "500k"}
MPEG_B = MPEG | {"bf": "2"}
AV1 = {"preset": "8", "g": "20", "crf": "10", "svtav1-params": "lp=1"}


@dataclass(frozen=True)
class Kind:
    """How a file is encoded. `times` are ticks of 1 / `ticks` seconds."""

    format: str
    codec: str
    options: dict
    pixels: str = "yuv420p"
    count: int = COUNT
    size: tuple[int, int] = (WIDTH, HEIGHT)
    rate: Fraction = Fraction(RATE)
    muxing: dict = field(default_factory=dict)
    degrees: int = 0
    times: tuple[int, ...] = ()
    ticks: int = 1000
    sound_seconds: float = 0.0
    noise: int = 0
    metadata: dict = field(default_factory=dict)


KINDS = {
    "h264.mp4": Kind("mp4", "libx264", X264),
    "h264-open-gop.mp4": Kind("mp4", "libx264", OPEN_GOP),
    "h264-fast-start.mp4": Kind("mp4", "libx264", X264, muxing={"movflags": "faststart"}),
    "h264-fragments.mp4": Kind("mp4", "libx264", X264, muxing={"movflags": "frag_keyframe+empty_moov"}),
    "h264-29.97.mp4": Kind("mp4", "libx264", X264, rate=Fraction(30000, 1001)),
    "h264.mov": Kind("mov", "libx264", X264),
    "h264.mkv": Kind("matroska", "libx264", X264),
    "h264-open-gop.mkv": Kind("matroska", "libx264", OPEN_GOP),
    "h264-59.94.mkv": Kind("matroska", "libx264", X264, rate=Fraction(60000, 1001)),
    "h264.ts": Kind("mpegts", "libx264", X264),
    "h264-open-gop.ts": Kind("mpegts", "libx264", OPEN_GOP),
    "h264.avi": Kind("avi", "libx264", X264),
    "h264-open-gop.avi": Kind("avi", "libx264", OPEN_GOP),
    "h264.flv": Kind("flv", "libx264", X264),
    "h264.mpg": Kind("mpeg", "libx264", X264),
    "hevc.mp4": Kind("mp4", "libx265", {"preset": "ultrafast", "x265-params": X265}),
    "hevc.mkv": Kind("matroska", "libx265", {"preset": "ultrafast", "x265-params": X265}),
    "hevc.ts": Kind("mpegts", "libx265", {"preset": "ultrafast", "x265-params": X265}),
    "av1.mp4": Kind("mp4", "libsvtav1", AV1),
    "av1.webm": Kind("webm", "libsvtav1", AV1),
    "vp8.webm": Kind("webm", "libvpx", VPX),
    "vp8.ivf": Kind("ivf", "libvpx", VPX),
    "vp9.webm": Kind("webm", "libvpx-vp9", VPX),
    "vp9.mp4": Kind("mp4", "libvpx-vp9", VPX),
    "vp9-hidden-frames.webm": Kind(
        "webm", "libvpx-vp9", {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5", "threads": "1"}
    ),
    "mjpeg.avi": Kind("avi", "mjpeg", {}, "yuvj420p"),
    "mjpeg.mov": Kind("mov", "mjpeg", {}, "yuvj420p"),
    "mpeg4.avi": Kind("avi", "mpeg4", MPEG),
    "mpeg4-b-frames.avi": Kind("avi", "mpeg4", MPEG_B),
    "mpeg4.mp4": Kind("mp4", "mpeg4", MPEG_B),
    "mpeg4.mkv": Kind("matroska", "mpeg4", MPEG_B),
    "mpeg1.mpg": Kind("mpeg", "mpeg1video", MPEG_B),
    "mpeg2.mpg": Kind("mpeg", "mpeg2video", MPEG_B),
    "mpeg2.ts": Kind("mpegts", "mpeg2video", MPEG_B),
    "wmv.asf": Kind("asf", "wmv2", MPEG),
    "ffv1.mkv": Kind("matroska", "ffv1", {}),
    "animated.gif": Kind("gif", "gif", {}, "rgb8"),
    "vp8.ogv": Kind("ogg", "libvpx", VPX),
    "h264-negative-offsets.mp4": Kind("mp4", "libx264", X264, muxing={"movflags": "negative_cts_offsets"}),
    "h264-no-edit-list.mp4": Kind("mp4", "libx264", X264, muxing={"use_editlist": "0"}),
    "h264-dash.mp4": Kind("mp4", "libx264", X264, muxing={"movflags": "dash+frag_keyframe+empty_moov+global_sidx"}),
    "h264.m2ts": Kind("mpegts", "libx264", X264, muxing={"mpegts_m2ts_mode": "1"}),
    "mpeg2.vob": Kind("vob", "mpeg2video", MPEG_B),
    "av1.avif": Kind("avif", "libsvtav1", AV1),
    "mpeg2.mxf": Kind("mxf", "mpeg2video", MPEG_B),
    "h264.mxf": Kind("mxf", "libx264", X264),
    "film.dv": Kind("dv", "dvvideo", {}, size=(720, 576), count=60),
    "animated.png": Kind("apng", "apng", {}, "rgb24"),
    "raw.h264": Kind("h264", "libx264", X264),
    "raw-open-gop.h264": Kind("h264", "libx264", OPEN_GOP),
    "hevc-without-b.mp4": Kind("mp4", "libx265", {"preset": "ultrafast", "x265-params": X265.replace("bframes=3", "bframes=0")}),
    "raw.hevc": Kind("hevc", "libx265", {"preset": "ultrafast", "x265-params": X265}),
    "raw.m1v": Kind("mpeg1video", "mpeg1video", MPEG_B),
    "raw.m2v": Kind("mpeg2video", "mpeg2video", MPEG_B),
    "raw.m4v": Kind("m4v", "mpeg4", MPEG_B),
    "raw.mjpeg": Kind("mjpeg", "mjpeg", {}, "yuvj420p"),
    "raw.obu": Kind("obu", "libsvtav1", AV1),
}


SHORT_KINDS = (
    *("h264.mp4", "h264-open-gop.mkv", "h264-open-gop.ts", "h264-open-gop.avi", "h264.flv", "h264-fragments.mp4", "vp9-hidden-frames.webm"),
    *("vp8.ivf", "vp8.ogv", "mpeg4-b-frames.avi", "mpeg2.mpg", "wmv.asf", "animated.gif", "animated.png", "mpeg2.mxf", "raw.h264"),
)
"""One or more kinds for each way of reading; the others are long forms of tests."""


def encode(path, kind):
    if kind.codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {kind.codec}")
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=kind.format, options=kind.muxing) as container:
        container.metadata.update(kind.metadata)
        stream = container.add_stream(kind.codec, rate=kind.rate, options=dict(kind.options))
        stream.width, stream.height, stream.pix_fmt = *kind.size, kind.pixels
        if kind.times:
            stream.codec_context.time_base = Fraction(1, kind.ticks)
        if kind.degrees:
            stream.set_display_rotation(kind.degrees)
        if kind.sound_seconds:
            add_sound(container, kind.sound_seconds)
        for number in range(kind.count):
            picture = draw_picture(number, kind, rng)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if kind.times:
                frame.pts, frame.time_base = kind.times[number], Fraction(1, kind.ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw_picture(number, kind, rng):
    """The picture as it is stored: a player turns it by `degrees`, and then it is upright."""
    quarter_turns = kind.degrees // 90
    size = kind.size[::-1] if quarter_turns % 2 else kind.size
    picture = np.rot90(numbered(number, *size), -quarter_turns)
    if kind.noise:
        picture = (picture + rng.integers(-kind.noise, kind.noise + 1, picture.shape)).clip(0, 255).astype(np.uint8)
    return picture


def add_sound(container, seconds):
    codec = {"webm": "libopus", "avi": "libmp3lame", "flv": "libmp3lame"}.get(container.format.name, "aac")
    stream = container.add_stream(codec, rate=48000 if codec == "libopus" else 44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, round(seconds * stream.rate)), np.float32), format="flt", layout="mono")
    frame.sample_rate, frame.pts = stream.rate, 0
    resampler = av.AudioResampler(format=stream.format, layout=stream.layout, rate=stream.rate, frame_size=stream.frame_size or 1024)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(part))
    container.mux(stream.encode())


def read(media, numbers, *, size=None, max_pixels=LIMIT):
    """The clips, and how many frames there were to choose from. `numbers` may be a function of that."""
    counts = []

    def choose(count):
        counts.append(count)
        return numbers(count) if callable(numbers) else np.asarray(numbers)

    media = media if isinstance(media, Media) else Media(str(media))
    clips = read_clips(media, choose, resize=lambda *own: size or own, max_pixels=max_pixels)
    [count] = counts
    return clips, count


def check_numbers(path, numbers, count=COUNT, **options):
    clips, found = read(path, numbers, **options)
    assert found == count
    assert np.array_equal(numbers_of(clips), numbers)


def assert_refused(path, reason, numbers=lambda count: np.array([[0, count - 1]]), **options):
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match=reason):
        read(path, numbers, **options)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024  # kB; one frame of 20000 x 20000 would be 600 MB
