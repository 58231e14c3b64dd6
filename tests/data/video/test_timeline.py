import re
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import video_kinds
from long_forms import mark_long
from video_kinds import KINDS, LIMIT, MPEG_B, RATE, VPX, X264, assert_refused, check_numbers, encode, numbers_of, read

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.video.frames import read_header
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media
from polyvit_fast.randomness import generator

RESTART = "its time stamps restart at frame"
SECOND_FILE = r"its time stamps restart at byte \d+, where another file was appended: split it there"
SECOND_STREAM = "its video goes on in a second stream, with time stamps of its own"
CLIPS = {
    "in the first": np.array([np.arange(12), 3 + np.arange(12) * 2]),
    "across the joint": np.array([30 + np.arange(16), 8 + np.arange(16) * 4]),
    "in the second": np.array([45 + np.arange(12), 50 + np.arange(12) * 2]),
    "all, backwards": np.arange(80)[None, ::-1],
    "the last": np.array([[79]]),
}


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """The bytes of frames `first` to `first + count` of a kind, with changes."""

    def record(name, first, count=40, **changes):
        drawn = video_kinds.draw_picture
        with monkeypatch.context() as patch:
            patch.setattr(video_kinds, "draw_picture", lambda number, kind, rng: drawn(number + first, kind, rng))
            return encode(tmp_path / "recording", replace(KINDS[name], count=count, **changes)).read_bytes()

    return record


def offset(seconds):
    return {"muxing": {"output_ts_offset": str(seconds)}}


def check_all(path, count=80):
    for numbers in CLIPS.values():
        check_numbers(path, numbers, count=count)


@pytest.mark.parametrize(
    "name",
    mark_long(
        ["h264.ts", "h264-open-gop.ts", "hevc.ts", "mpeg2.ts", "h264.m2ts", "h264.mpg", "mpeg1.mpg", "mpeg2.mpg", "mpeg2.vob"]
        + [
            "h264.mkv",
            "h264-open-gop.mkv",
            "hevc.mkv",
            "mpeg4.mkv",
            "ffv1.mkv",
            "vp8.webm",
            "vp9.webm",
            "vp9-hidden-frames.webm",
            "av1.webm",
        ]
        + ["film.dv", "mpeg2.mxf", "h264.mxf", "raw.h264", "raw.hevc", "raw.m2v", "raw.m4v", "raw.mjpeg", "raw.obu"],
        ["h264-open-gop.ts", "mpeg2.mpg", "h264-open-gop.mkv", "vp9-hidden-frames.webm", "mpeg2.mxf", "raw.h264"],
    ),
)
def test_concatenated_recordings_are_read_in_the_order_of_the_file(recording, tmp_path, name):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0) + recording(name, 40))
    check_all(path)


@pytest.mark.parametrize(("name", "count"), [("h264.ts", 20), ("mpeg2.mpg", 20), ("h264.ts", 1), ("mpeg2.ts", 1)])
def test_many_concatenated_recordings(recording, tmp_path, name, count):
    path = tmp_path / "concatenated"
    path.write_bytes(b"".join(recording(name, number, count) for number in range(0, 4 * count, count)))
    check_numbers(path, np.arange(4 * count)[None, ::-1], count=4 * count)


@pytest.mark.parametrize("name", mark_long(["h264.ts", "mpeg2.ts", "mpeg2.mpg", "h264.mkv"], ["h264.ts", "mpeg2.mpg"]))
@pytest.mark.parametrize("seconds", mark_long([0.8, 2.0, 7.0, 3600, 95440], [95440]))
@pytest.mark.parametrize("later", ["first", "second"])
def test_clocks_of_concatenated_recordings_that_are_far_apart(recording, tmp_path, name, seconds, later):
    path = tmp_path / "concatenated"
    path.write_bytes(
        recording(name, 0, **(offset(seconds) if later == "first" else {}))
        + recording(name, 40, **(offset(seconds) if later == "second" else {}))
    )
    check_all(path)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("h264.ts", {}, {"size": (128, 96)}),
        ("mpeg2.mpg", {"size": (128, 96)}, {}),
        ("vp9.webm", {}, {"size": (128, 96)}),
        ("h264.ts", {"options": X264 | {"bf": "0"}}, {}),
        ("h264.ts", {}, {"options": X264 | {"bf": "0"}}),
        ("h264.ts", {"sound_seconds": 2.5}, {"sound_seconds": 0.7}),
        ("h264.ts", {}, {"sound_seconds": 2.0}),
        ("h264.mkv", {"sound_seconds": 2.5}, {"sound_seconds": 0.7}),
        ("h264.ts", {}, {"rate": Fraction(50)}),
        ("vp9.webm", {"rate": Fraction(10)}, {"rate": Fraction(60)}),
    ],
    ids=str,
)
def test_concatenated_recordings_that_differ(recording, tmp_path, name, first, second):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0, **first) + recording(name, 40, **second))
    check_all(path)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("h264.ts", "mpeg2.ts", RESTART),
        ("mpeg2.ts", "h264.ts", RESTART),
        ("h264.ts", "hevc.ts", RESTART),
        ("hevc.ts", "h264.ts", RESTART),
        ("h264.mkv", "hevc.mkv", RESTART),
        ("vp8.webm", "vp9.webm", RESTART),
        ("vp9.webm", "av1.webm", RESTART),
        ("mpeg1.mpg", "h264.mpg", SECOND_STREAM),
    ],
)
def test_what_one_decoder_cannot_read_on_names_the_joint(recording, tmp_path, first, second, reason):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(first, 0) + recording(second, 40))
    assert_refused(path, reason, [[20, 60]])


@pytest.mark.parametrize("name", ["h264.mp4", "h264-fast-start.mp4", "h264-fragments.mp4", "h264.mov", "mpeg4.avi", "h264.avi", "h264.flv"])
def test_a_second_file_that_ffmpeg_would_not_show_is_reported(recording, tmp_path, name):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0) + recording(name, 40))
    assert_refused(path, SECOND_FILE, [[0]])


@pytest.mark.parametrize("name", ["wmv.asf", "vp8.ivf", "vp8.ogv", "animated.gif", "animated.png"])
def test_a_second_file_of_other_containers_is_reported_too(recording, tmp_path, name):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0) + recording(name, 40))
    assert_refused(path, SECOND_FILE, [[0]])


def test_ffmpeg_reads_two_matroskas_but_not_three(recording, tmp_path):
    path = tmp_path / "concatenated"
    path.write_bytes(b"".join(recording("h264.mkv", number) for number in (0, 40, 80)))
    assert_refused(path, SECOND_FILE, [[0]])


def test_fragments_that_start_again_are_reported(recording, tmp_path):
    first, second = recording("h264-fragments.mp4", 0), recording("h264-fragments.mp4", 40)
    path = tmp_path / "concatenated.mp4"
    path.write_bytes(first[: first.index(b"mfra") - 4] + second[second.index(b"moof") - 4 :])
    assert_refused(path, SECOND_FILE, [[0]])


@pytest.mark.parametrize("pids", [{"mpegts_start_pid": "0x200"}, {"mpegts_start_pid": "0x200", "mpegts_pmt_start_pid": "0x1100"}])
def test_a_recording_that_goes_on_in_another_stream_is_reported(recording, tmp_path, pids):
    path = tmp_path / "concatenated.ts"
    path.write_bytes(recording("h264.ts", 0) + recording("h264.ts", 40, muxing=pids))
    assert_refused(path, SECOND_STREAM, [[0]])


@pytest.mark.parametrize("name", ["h264.ts", "h264-open-gop.ts", "hevc.ts", "mpeg2.ts"])
def test_of_a_recording_that_begins_within_a_group_of_pictures_only_whole_frames_are_shown(recording, tmp_path, name):
    first, second = recording(name, 0), recording(name, 40, 100)
    cut = len(second) * 3 // 10 // 188 * 188
    path = tmp_path / "concatenated.ts"
    path.write_bytes(first + second[: 3 * 188] + second[cut:])
    clips, count = read(path, lambda count: np.arange(count)[None])
    shown = numbers_of(clips)[0].tolist()
    assert shown[:40] == list(range(40))
    assert shown[40:] == list(range(140 - count + 40, 140))
    assert 90 < count < 120


@pytest.mark.parametrize("name", mark_long(["h264.ts", "mpeg2.ts", "h264.mpg", "mpeg2.mpg", "hevc.ts"], ["h264.ts", "mpeg2.mpg"]))
@pytest.mark.parametrize("seconds", mark_long([95441.0, 95442.2, 95443.0], [95442.2]))
def test_time_stamps_that_wrap(recording, tmp_path, name, seconds):
    """They have 33 bits: 26.5 hours."""
    assert seconds < 2**33 / 90000 < seconds + 3.2
    path = tmp_path / "wrapped"
    path.write_bytes(recording(name, 0, 80, **offset(seconds)))
    check_all(path)


def test_time_stamps_that_wrap_late(recording, tmp_path):
    path = tmp_path / "wrapped.ts"
    path.write_bytes(recording("h264.ts", 0, 200, rate=Fraction(1), **offset(95343)))
    check_numbers(path, [[0, 99, 100, 101, 150, 199]], count=200)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mkv", X264),
        ("h264.mkv", X264 | {"g": "200"}),
        ("vp9.webm", VPX | {"g": "200"}),
        ("mpeg4.mkv", MPEG_B),
        ("h264.mkv", X264 | {"bf": "0"}),
    ],
)
@pytest.mark.parametrize("milliseconds", mark_long([800, 1600], [800]))
def test_a_matroska_whose_time_stamps_jump_back(recording, tmp_path, name, options, milliseconds):
    content = bytearray(recording(name, 0, 80, options=options, muxing={"cluster_time_limit": "800"}))
    clusters = [match.start() for match in re.finditer(b"\x1f\x43\xb6\x75", content)]
    assert len(clusters) >= 3
    for cluster in clusters[2:]:
        at = content.index(b"\xe7", cluster, cluster + 20)
        width = content[at + 1] & 0x7F
        start = int.from_bytes(content[at + 2 : at + 2 + width], "big")
        content[at + 2 : at + 2 + width] = max(0, start - milliseconds).to_bytes(width, "big")
    path = tmp_path / "back.mkv"
    path.write_bytes(content)
    check_all(path)


@pytest.mark.parametrize("name", mark_long(["h264.ts", "h264.mkv", "h264.mp4", "vp9.webm"], ["h264.ts", "h264.mp4"]))
def test_pictures_that_begin_after_the_sound(recording, tmp_path, name):
    path = tmp_path / "late"
    path.write_bytes(recording(name, 0, 80, times=tuple(range(50, 130)), ticks=RATE, sound_seconds=6.0))
    check_all(path)


EDITS = {
    "an empty edit first": ([(1000, None), (3200, 0)], list(range(80))),
    "a part left out": ([(800, 0), (800, 40)], [*range(20), *range(40, 60)]),
    "parts exchanged": ([(800, 40), (800, 0)], [*range(40, 60), *range(20)]),
    "a part twice": ([(800, 0), (800, 0)], [*range(20), *range(20)]),
    "parts from between keyframes": ([(400, 5), (800, 25), (400, 60)], [*range(5, 15), *range(25, 45), *range(60, 70)]),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_lists(recording, tmp_path, name):
    entries, shown = EDITS[name]
    content = bytearray(recording("h264.mp4", 0, 80))
    at = content.index(b"elst") - 4
    length, start = struct.unpack(">I", content[at : at + 4])[0], struct.unpack(">i", content[at + 20 : at + 24])[0]
    assert length == 28
    edits = [struct.pack(">IiI", duration, -1 if first is None else start + first * 512, 1 << 16) for duration, first in entries]
    content[at : at + 28] = struct.pack(">I4sII", 16 + 12 * len(entries), b"elst", 0, len(entries)) + b"".join(edits)
    for box in (b"edts", b"trak", b"moov"):
        size = content.rindex(box, 0, at) - 4
        content[size : size + 4] = struct.pack(">I", struct.unpack(">I", content[size : size + 4])[0] + 12 * (len(entries) - 1))
    path = tmp_path / "edited.mp4"
    path.write_bytes(content)
    clips, count = read(path, lambda count: np.arange(count)[None, ::-1])
    assert numbers_of(clips)[0].tolist() == shown[::-1]
    assert count == len(shown)


@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.mpg", "vp9.webm"])
@pytest.mark.parametrize("stride", mark_long([1, 3], [3]))
def test_clips_of_training_and_evaluation_go_across_joints(recording, tmp_path, name, stride):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0, size=(96, 96)) + recording(name, 40, size=(96, 96)))
    own = Video(size=96, short_side=96, frames=16, stride=stride, eval_clips=4, flip=False)
    clips = [*build_decoder(own, batch=1, train=False, num_threads=1)([Media(str(path))], [generator(0, "test")])[0]]
    train = build_decoder(own, batch=1, train=True, num_threads=1)
    clips += [train([Media(str(path))], [generator(seed, "test")])[0, 0] for seed in range(6)]
    shown = numbers_of(np.stack([clip.numpy() for clip in clips]))
    assert (np.diff(shown) == stride).all()
    assert shown[:4, 0].tolist() == np.rint(np.linspace(0, 1, 4) * (80 - 15 * stride - 1)).tolist()


def test_a_far_clip_of_a_concatenated_file_is_not_decoded_from_the_start(recording, tmp_path, monkeypatch):
    """Packets up to its keyframe are passed over: what comes before may even be damaged."""
    first, second = bytearray(recording("mpeg2.ts", 0, noise=25, size=(128, 96))), recording("mpeg2.ts", 40, noise=25, size=(128, 96))
    for packet in range(40 * 188, len(first) // 2, 188):
        if not first[packet + 1] & 0x40 and first[packet + 2] == 0:  # in the middle of a frame of the video's stream
            first[packet + 100 : packet + 188] = b"\x55" * 88
    path = tmp_path / "concatenated.ts"
    path.write_bytes(first + second)
    check_numbers(path, [[60, 79]], count=80)
    assert_refused(path, "its time stamps restart at frame 40, as in concatenated files, and it cannot be read on", [np.arange(80)])


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm"])
def test_concatenated_files_are_not_plain(recording, tmp_path, name):
    path = tmp_path / "concatenated"
    path.write_bytes(recording(name, 0) + recording(name, 40))
    header = read_header(Media(str(path)), LIMIT)
    assert (header.num_frames, header.plain) == (80, False)
