import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from video_kinds import HEIGHT, LIMIT, WIDTH, X264, Kind, encode

from polyvit_fast.data.video.frames import read_clips, read_header
from polyvit_fast.data.video.orientation import UPRIGHT, Orientation, nearest, orientation_of
from polyvit_fast.media import Media

MATRICES = {  # a, b, c, d: what is stored at column x and row y is shown at column a x + c y and row b x + d y
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
}
PICTURE = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)


def with_matrix(path, target, box, matrix):
    """A copy of an MP4 with a matrix in its movie or track header."""
    content = bytearray(path.read_bytes())
    at = content.index(box) + {b"tkhd": 44, b"mvhd": 40}[box]
    assert struct.unpack(">9I", content[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target


def seen(path, stored):
    """The picture that a file shows, and the (height, width) that its size is chosen for."""
    sizes = []

    def resize(height, width):
        sizes.append((height, width))
        return height, width

    [[picture]] = read_clips(Media(str(path)), lambda count: np.array([[3]]), resize=resize, max_pixels=LIMIT)
    assert sizes == [picture.shape[:2]]
    assert {stored.shape[:2], stored.shape[1::-1]} >= {picture.shape[:2]}
    return picture


@pytest.fixture(scope="module")
def stored(video):
    return seen(video("h264.mp4", count=10), np.empty((HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
@pytest.mark.parametrize("box", [b"tkhd", b"mvhd"])
def test_all_eight_orientations_of_an_mp4(video, tmp_path, stored, box, matrix):
    path = with_matrix(video("h264.mp4", count=10), tmp_path / "a.mp4", box, matrix)
    assert np.array_equal(seen(path, stored), MATRICES[matrix](stored))
    assert read_header(Media(str(path)), LIMIT).plain == (matrix == (1, 0, 0, 1))


def test_the_matrices_of_movie_and_track_follow_each_other(video, tmp_path, stored):
    turned = with_matrix(video("h264.mp4", count=10), tmp_path / "a.mp4", b"tkhd", (0, 1, -1, 0))
    both = with_matrix(turned, tmp_path / "b.mp4", b"mvhd", (-1, 0, 0, 1))
    assert np.array_equal(seen(both, stored), np.rot90(stored, -1)[:, ::-1])


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_all_eight_orientations_of_a_matroska(video, tmp_path, stored, matrix):
    """FFmpeg writes them as turns of a projection."""
    source = with_matrix(video("h264.mp4", count=10), tmp_path / "a.mp4", b"tkhd", matrix)
    with av.open(str(source)) as there, av.open(str(tmp_path / "a.mkv"), "w") as container:
        copy = container.add_stream_from_template(there.streams.video[0])
        for packet in there.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
    assert np.array_equal(seen(tmp_path / "a.mkv", stored), MATRICES[matrix](stored))


@pytest.mark.parametrize(("rotate", "flip"), [(0, "horizontal"), (0, "vertical"), (90, ""), (270, ""), (180, ""), (90, "horizontal")])
@pytest.mark.parametrize("format", ["mpegts", "mp4", "h264"])
def test_what_h264_says_itself(tmp_path, stored, rotate, flip, format):
    """ITU-T H.264, D.2.27: mirrored first, then turned anticlockwise."""
    kind = Kind("h264", "libx264", X264 | {"bf": "0"}, count=10)
    encode(tmp_path / "a.h264", kind)
    with av.open(str(tmp_path / "a.h264")) as there, av.open(str(tmp_path / "a.video"), "w", format=format) as container:
        source = there.streams.video[0]
        copy = container.add_stream_from_template(source)
        options = f"display_orientation=insert:rotate={rotate}" + (f":flip={flip}" if flip else "")
        change, ticks = BitStreamFilterContext(f"h264_metadata={options}", source), 0
        for packet in there.demux(source):
            for changed in change.filter(packet if packet.size else None):
                changed.stream, changed.pts, changed.dts, ticks = copy, ticks, ticks, ticks + 3600
                changed.duration, changed.time_base = 3600, Fraction(1, 90000)
                container.mux(changed)
    turned = {"": stored, "horizontal": stored[:, ::-1], "vertical": stored[::-1]}[flip]
    assert np.abs(seen(tmp_path / "a.video", stored).astype(int) - np.rot90(turned, rotate // 90)).mean() < 12


def test_matrices_of_zeros_and_such_that_flatten_show_the_picture_as_stored():
    for matrix in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 5, 0, 3)):
        assert nearest(*matrix) == UPRIGHT


@pytest.mark.parametrize("degrees", [-44, -20, -1, 0, 1, 20, 44])
@pytest.mark.parametrize("scale", [(1, 1), (3, 0.5)])
def test_other_angles_go_to_the_nearest_quarter_turn_and_sizes_do_not_count(degrees, scale):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for matrix in MATRICES:
        other = np.diag(scale) @ np.reshape(matrix, (2, 2)) @ turn
        assert nearest(*other.ravel().tolist()) == nearest(*matrix)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_pictures_are_shown_as_their_matrix_says(matrix):
    shown = nearest(*matrix).apply(PICTURE)
    assert np.array_equal(shown, MATRICES[matrix](PICTURE))
    assert nearest(*matrix).swaps_sides == (shown.shape != PICTURE.shape)
    assert (nearest(*matrix) == Orientation()) == (matrix == (1, 0, 0, 1))


def test_an_orientation_lasts_until_the_next_keyframe(video):
    with av.open(str(video("h264.mp4", count=10, degrees=90))) as container:
        turned = next(container.decode(video=0))
    with av.open(str(video("h264.mp4", count=10))) as container:
        key, between = [frame for frame, _ in zip(container.decode(video=0), range(2), strict=False)]
    assert (key.key_frame, between.key_frame) == (1, 0)
    assert orientation_of(turned) == nearest(0, -1, 1, 0)
    assert orientation_of(between, orientation_of(turned)) == orientation_of(turned)
    assert orientation_of(key, orientation_of(turned)) == UPRIGHT
    assert orientation_of(between) == UPRIGHT
