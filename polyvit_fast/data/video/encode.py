"""Frames to an MP4 file: the same bytes on every CPU, for data that is made and not recorded."""

from __future__ import annotations

import io
import logging
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

VIDEO_ENCODERS = ("libx264", "mpeg4")
EXACT = {"flags": "+bitexact", "dct": "int", "idct": "simple"}  # FFmpeg's own encoder: the same bytes with all instruction sets

_logger = logging.getLogger(__name__)


def encode_h264(frames: UInt8[np.ndarray, "frames rows columns 3"], frames_per_second: int) -> bytes:
    """An MP4 file of RGB frames with an even number of rows and columns. MPEG-4, after a warning, where PyAV has no libx264."""
    import av
    from av.video.reformatter import Interpolation

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread: with more, the result depends on their number. No assembly: that for AVX-512 is not deterministic, and that for
        # SSSE3 and later differs from that for SSE2.
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "asm=0"} | EXACT
        stream: Any = container.add_stream(_video_encoder(), rate=frames_per_second, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="yuv420p", interpolation=Interpolation.BILINEAR | Interpolation.BITEXACT)))
        container.mux(stream.encode())
    return file.getvalue()


@cache
def _video_encoder() -> str:
    import av

    name = next(name for name in VIDEO_ENCODERS if name in av.codecs_available)
    if name != VIDEO_ENCODERS[0]:
        _logger.warning("this build of PyAV has no %s: clips are %s instead of H.264", VIDEO_ENCODERS[0], name)
    return name
