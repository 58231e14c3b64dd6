import io
import logging

import av
import numpy as np
import pytest

from polyvit_fast.data.video import encode
from polyvit_fast.data.video.encode import encode_h264


def wander(num_frames=10, rows=48, columns=64):
    """Smooth colours that move."""
    time, y, x = np.mgrid[:num_frames, :rows, :columns]
    return np.stack([127 + 90 * np.sin((x + 3 * time) / 9), 127 + 90 * np.cos(y / 7), 60 + 2 * x], -1).astype(np.uint8)


def decode(content):
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, stream.average_rate, np.stack(frames)


@pytest.fixture
def without_x264(monkeypatch):
    """As with a build of FFmpeg that has no x264; the lines that are logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logger = logging.getLogger(encode.__name__)
    logger.addHandler(handler)
    monkeypatch.setattr(encode, "VIDEO_ENCODERS", ("libx264-of-nobody", "mpeg4"))
    encode._video_encoder.cache_clear()
    yield lines
    logger.removeHandler(handler)
    encode._video_encoder.cache_clear()


def test_decoded_frames_are_close_to_those_encoded():
    frames = wander()
    codec, rate, decoded = decode(encode_h264(frames, 15))
    assert (codec, rate) == ("h264", 15)
    assert decoded.shape == frames.shape
    errors = np.abs(decoded[:, None].astype(float) - frames).mean((2, 3, 4))  # of each decoded frame as each of those encoded
    assert np.diag(errors).max() < 5
    assert errors.argmin(1).tolist() == list(range(len(frames)))


def test_colours_keep_their_order():
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[..., 0] = 200
    mean = decode(encode_h264(frames, 10))[2].mean((0, 1, 2))
    assert mean == pytest.approx([200, 0, 0], abs=8)


def test_the_same_frames_are_the_same_bytes():
    first = encode_h264(wander(), 15)
    assert encode_h264(wander(), 15) == first
    assert encode_h264(np.ascontiguousarray(wander()[::-1]), 15) != first
    assert encode_h264(wander(), 30) != first


def test_frames_may_be_a_view():
    frames = wander()
    assert encode_h264(frames[::-1, :, ::-1], 15) == encode_h264(np.ascontiguousarray(frames[::-1, :, ::-1]), 15)


def test_without_x264_clips_are_mpeg4_after_one_warning(without_x264):
    frames = wander()
    first, second = (encode_h264(frames, 15) for _ in range(2))
    codec, rate, decoded = decode(first)
    assert first == second
    assert (codec, rate) == ("mpeg4", 15)
    assert np.abs(decoded.astype(float) - frames).mean() < 6
    assert without_x264 == [("WARNING", "this build of PyAV has no libx264-of-nobody: clips are mpeg4 instead of H.264")]
