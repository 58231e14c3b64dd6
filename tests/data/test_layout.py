import struct

import pytest
from long_forms import mark_long
from video_kinds import KINDS, SHORT_KINDS

from polyvit_fast.data.layout import Layout, read_layout
from polyvit_fast.media import MediaError

APPENDED = ["h264.mp4", "h264-fast-start.mp4", "h264-fragments.mp4", "mjpeg.mov", "mpeg4.avi", "h264.flv", "vp8.ivf", "vp8.ogv", "wmv.asf"]
APPENDED += ["animated.gif", "animated.png"]


def layout(path, content):
    path.write_bytes(content)
    with path.open("rb") as file:
        found = read_layout(file)
        assert file.tell() == 0
    assert found.size == len(content)
    return found


@pytest.mark.parametrize("name", mark_long(KINDS, SHORT_KINDS))
def test_whole_files_lack_nothing_and_hold_one_recording(video, tmp_path, name):
    content = video(name).read_bytes()
    found = layout(tmp_path / "a", content)
    assert found.end <= len(content)
    assert found.joints == ()
    for appended in (b"appended, but no part of it", bytes(99), b"hi\t" * 99):
        found = layout(tmp_path / "a", content + appended)
        assert (found.end <= len(content), found.joints) == (True, ())


@pytest.mark.parametrize("name", APPENDED)
def test_a_second_recording_is_found(video, tmp_path, name):
    first, second = (video(name, count=count).read_bytes() for count in (20, 30))
    found = layout(tmp_path / "a", first + second)
    assert (found.joints, found.read_on) == ((len(first),), False)


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm"])
def test_matroskas_may_follow_each_other(video, tmp_path, name):
    parts = [video(name, count=count).read_bytes() for count in (20, 30, 10)]
    found = layout(tmp_path / "a", b"".join(parts))
    assert (found.joints, found.read_on) == ((len(parts[0]), len(parts[0]) + len(parts[1])), True)
    assert layout(tmp_path / "a", b"".join(parts)[:-1]).end == found.size


def test_fragments_that_start_again(video, tmp_path):
    content = video("h264-fragments.mp4", count=60).read_bytes()
    start, end = content.index(b"moof") - 4, content.index(b"mfra") - 4
    assert layout(tmp_path / "a", content[:end] + content[start:]).joints == (end,)


def test_matroska_and_asf_of_unknown_length_and_boxes_up_to_the_end_promise_nothing(video, tmp_path):
    content = bytearray(video("h264.mkv").read_bytes())
    at = content.index(b"\x18\x53\x80\x67") + 4
    content[at : at + 8] = b"\x01" + b"\xff" * 7
    assert layout(tmp_path / "a", content[:2000]).end <= at
    content = bytearray(video("wmv.asf").read_bytes())
    at = struct.unpack("<Q", content[16:24])[0] + 16
    content[at : at + 8] = bytes(8)
    assert layout(tmp_path / "a", content[:3000]).end == 0
    content = bytearray(video("h264-fast-start.mp4").read_bytes())
    at = content.index(b"mdat") - 4
    content[at : at + 4] = bytes(4)
    assert layout(tmp_path / "a", content[: at + 2000]).end == at


def test_a_recording_that_was_broken_off_has_no_table_of_contents(video, tmp_path):
    content = bytearray(video("h264.mp4").read_bytes())  # the table stands at its end
    at = content.index(b"mdat") - 4
    for length in (0, 2000 - at):  # up to the end of the file, and stated
        content[at : at + 4] = length.to_bytes(4, "big")
        with pytest.raises(MediaError, match="truncated: its table of contents"):
            layout(tmp_path / "a", content[:2000])


def test_chunks_of_a_large_avi_are_one_recording(tmp_path):
    chunks = b"".join(
        b"RIFF" + struct.pack("<I", 4 + count) + kind + bytes(count + count % 2) for kind, count in ((b"AVI ", 99), (b"AVIX", 50))
    )
    assert layout(tmp_path / "a", chunks * 1) == Layout(len(chunks))
    assert layout(tmp_path / "a", chunks + chunks).joints == (len(chunks),)


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"\0\0\0\x01moov", b"GIF8", b"OggS", b"DKIF", b"FLV", b"\x1a\x45\xdf\xa3", b"\0\0\0\x08ftyp"]
)
def test_stumps_do_not_matter(tmp_path, content):
    for length in (0, 1, 30):
        assert layout(tmp_path / "a", content + bytes(length)).joints == ()
