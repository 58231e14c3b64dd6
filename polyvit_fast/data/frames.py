"""Frames of a video file by number, through PyAV (FFmpeg): every container and codec, on plain CPU threads.

PyAV decodes all codecs on a CPU, not only those that DALI's CPU decoder refuses (H.264, HEVC, AV1): it is as quick on the others
(VP8, VP9, MJPEG), and one decoder means that colours are equal everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from polyvit_fast.media import Media, MediaError

FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,ivf,gif"  # FFmpeg's demuxers; playlists, which name other files, stay shut
SEEK_FRAMES = 250  # a gap this long holds a keyframe in nearly every file, so that seeking beats decoding on
FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
MAX_ASPECT = 16  # a thinner picture would be huge once its short side has the wanted size


@dataclass(frozen=True)
class _Timeline:
    """Frame numbers from time stamps: frame k is the one shown k average frame times after the start.

    In a file with a constant rate that is the k-th frame; in one with a variable rate, motion keeps its speed.
    """

    start: int
    frames_per_tick: float
    num_frames: int
    first_dts: int
    """The decoding time stamp of the first packet, from which on seeking is possible."""
    regular: bool = False
    """Whether all time stamps were read and frame k is the k-th one."""
    stamped: bool = True
    """Whether packets say when they are shown. Some AVI and MPEG files with B-frames do not; their k-th decoded frame is frame k."""

    def number(self, pts: int) -> int:
        return round((pts - self.start) * self.frames_per_tick)

    def pts(self, number: int) -> int:
        return self.start + round(number / self.frames_per_tick)


@dataclass(frozen=True)
class Header:
    """What a video file says of itself and of its first frame, in FFmpeg's words and numbers."""

    container: str
    codec: str
    num_frames: int
    height: int
    width: int
    pixels: str
    colorspace: int
    plain: bool
    """Whether its k-th frame is frame k, and frames are upright, progressive and of the usual (limited) range of levels."""


def read_header(media: Media, max_pixels: int) -> Header:
    """Decodes the first frame only. Raises MediaError as `read_clips` does."""
    with _opened(media, max_pixels) as (container, stream, timeline):
        frame = _Reader(container, stream, timeline).frame(0)
        _check_size(frame, max_pixels)
        return Header(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            num_frames=timeline.num_frames,
            height=frame.height,
            width=frame.width,
            pixels=frame.format.name,
            colorspace=int(frame.colorspace),
            plain=(timeline.regular or _has_regular_index(stream, timeline))
            and frame.pts == timeline.start
            and not _quarter_turns(frame)
            and not frame.interlaced_frame
            and int(frame.color_range) != FULL_RANGE
            and len(container.streams.video) == 1,
        )


def read_clips(
    media: Media,
    choose: Callable[[int], Int[np.ndarray, "clips frames"]],
    *,
    resize: Callable[[int, int], tuple[int, int]],
    max_pixels: int,
) -> UInt8[np.ndarray, "clips frames height width 3"]:
    """The RGB frames whose numbers `choose` picks, given how many there are, in the (height, width) that `resize` gives for their own.

    The file is opened once and decoded from the keyframe before the first wanted frame on. Frames are turned as the file's rotation
    says; non-square pixels are taken as square. Raises MediaError when the file is no video, is truncated or exceeds `max_pixels`, and
    when the decoder reports damage on the way to a wanted frame.
    """
    from av.video.reformatter import VideoReformatter

    with _opened(media, max_pixels) as (container, stream, timeline):
        numbers = choose(timeline.num_frames)
        reader, converter = _Reader(container, stream, timeline), VideoReformatter()
        clips = None
        for number in np.unique(numbers):
            frame = reader.frame(int(number))
            _check_size(frame, max_pixels)
            if clips is None:  # all frames get the size of the first: theirs may change in the middle of a stream
                clips = np.empty((*numbers.shape, *_resized(frame, resize), 3), np.uint8)
            clips[numbers == number] = _picture(converter, frame, clips.shape[-3], clips.shape[-2])
        assert clips is not None
        return clips


@contextmanager
def _opened(media: Media, max_pixels: int) -> Iterator[tuple[Any, Any, _Timeline]]:
    """The container, its video stream and that one's timeline."""
    from av.error import FFmpegError

    with media.open() as file, _open(file, max_pixels) as container:
        try:
            stream = _video_stream(container, max_pixels)
            yield container, stream, _header_timeline(container, stream) or _counted_timeline(container, stream)
        except (FFmpegError, OSError) as error:
            raise MediaError(f"damaged: {error.strerror or error}") from None


def _open(file: Any, max_pixels: int) -> Any:
    import av
    from av.error import ArgumentError, FFmpegError

    try:
        return av.open(
            file,
            options=_decoder_limit(max_pixels),  # opening decodes frames already
            container_options={"format_whitelist": FORMATS, "fflags": "-genpts"},  # time stamps made up by FFmpeg are wrong in AVI
            metadata_errors="replace",
        )
    except ArgumentError:
        raise MediaError(f"its format is none of {FORMATS}") from None
    except (FFmpegError, OSError) as error:
        raise MediaError(f"not a video that can be opened: {error.strerror or error}") from None


def _decoder_limit(max_pixels: int) -> dict[str, str]:
    return {"max_pixels": str(2 * max_pixels + 100_000)}  # decoders count sides that are rounded up to multiples of 128


def _video_stream(container: Any, max_pixels: int) -> Any:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # a sound file's cover is one
    if not streams:
        raise MediaError("there is no video stream in it")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise MediaError("its video codec is not supported")
    _check_size(context, max_pixels)
    context.options = _decoder_limit(max_pixels)  # frames may grow in the middle of a stream
    context.thread_count = 1  # files are decoded side by side instead
    return stream


def _check_size(picture: Any, max_pixels: int) -> None:
    width, height = picture.width, picture.height
    if not width * height:
        raise MediaError(f"its frames cannot be decoded or have far more than max_pixels = {max_pixels}")
    if width * height > max_pixels:
        raise MediaError(f"its frames have {width} x {height} pixels, more than max_pixels = {max_pixels}")
    if not 1 / MAX_ASPECT <= width / height <= MAX_ASPECT:
        raise MediaError(f"its frames have {width} x {height} pixels; more than {MAX_ASPECT} to 1 is refused")


def _header_timeline(container: Any, stream: Any) -> _Timeline | None:
    """From the header alone, where it holds the stream's own duration and an index of its frames (MP4, AVI)."""
    index = stream.index_entries
    if not (stream.frames and stream.duration and stream.average_rate and len(index) >= stream.frames):
        return None
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        return None
    if index[-1].pos + index[-1].size > container.size:
        raise MediaError(f"truncated: its header places a frame at byte {index[-1].pos}, the file has {container.size}")
    frames_per_tick = float(stream.average_rate * stream.time_base)
    num_frames = max(1, round(stream.duration * frames_per_tick))
    return _Timeline(stream.start_time or 0, frames_per_tick, num_frames, index[0].timestamp)


def _has_regular_index(stream: Any, timeline: _Timeline) -> bool:
    """Whether the index of a header, which `_header_timeline` leaves unread, places one frame after the other at a constant rate."""
    index = stream.index_entries
    return len(index) == stream.frames == timeline.num_frames and all(
        not entry.is_discard and round((entry.timestamp - timeline.first_dts) * timeline.frames_per_tick) == k
        for k, entry in enumerate(index)
    )


def _counted_timeline(container: Any, stream: Any) -> _Timeline:
    """From the time stamps of all packets: reads the file through, decodes nothing.

    Matroska and WebM need it. Their header gives the length of the longest stream, which may be the sound, and a guessed rate.
    """
    stamps, dts, end_seconds, whole, stamped, skipped = [], [], 0.0, True, True, False
    for packet in _packets(container):
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            end_seconds = max(end_seconds, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size and not packet.is_discard:
            stamps.append(stamp)
            dts.append(stamp if packet.dts is None else packet.dts)
            stamped &= packet.pts is not None
            whole = not packet.is_corrupt
        elif packet.stream_index == stream.index and packet.pts is not None:
            skipped = True
    known = [stamp for stamp in stamps if stamp is not None]
    if not known:
        raise MediaError("there are no frames with time stamps in it")
    first, last, num_frames = min(known), max(known), len(stamps)
    promised_seconds = (container.duration or 0) / 1e6
    if end_seconds < 0.95 * promised_seconds - 0.5:
        raise MediaError(f"truncated: it ends after {end_seconds:.1f} of the {promised_seconds:.1f} seconds that its header promises")
    if max(num_frames, last - first) < 0.95 * stream.frames - 2:  # AVI counts in ticks, one a frame: empty ones are not stored
        raise MediaError(f"truncated: it ends after {num_frames} of the {stream.frames} frames that its header promises")
    if not whole:
        raise MediaError("truncated: its last frame is incomplete")
    frames_per_tick = (num_frames - 1) / (last - first) if last > first else 1.0
    regular = stamped and not skipped and [round((stamp - first) * frames_per_tick) for stamp in sorted(known)] == list(range(num_frames))
    return _Timeline(first, frames_per_tick, num_frames, min(stamp for stamp in dts if stamp is not None), regular, stamped)


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    with suppress(IndexError):  # PyAV's, after the last packet, of a file in which another stream begins late
        yield from container.demux(*streams)


class _Reader:
    """The frames shown at ascending numbers."""

    def __init__(self, container: Any, stream: Any, timeline: _Timeline) -> None:
        self.container, self.stream, self.timeline = container, stream, timeline
        self.shown: tuple[int, Any] | None = None
        self.next: tuple[int, Any] | None = None
        self.decoded: Iterator[tuple[int, Any]] = iter(())

    def frame(self, number: int) -> Any:
        """The last frame that is not later than `number`. Raises MediaError when the file ends far before it."""
        if self.shown is None or (self.timeline.stamped and number - self.shown[0] > SEEK_FRAMES):
            self._seek(number)
        while self.next is not None and (self.shown is None or self.next[0] <= number):
            self.shown, self.next = self.next, next(self.decoded, None)
        if self.shown is None:
            raise MediaError("not one of its frames can be decoded")
        if self.next is None:
            self._check_end(number, *self.shown)
        if self.shown[1].is_corrupt:
            raise MediaError(f"damaged: its frame {self.shown[0]} cannot be decoded completely")
        return self.shown[1]

    def _check_end(self, number: int, last: int, frame: Any) -> None:
        last += max(0, round((frame.duration or 0) * self.timeline.frames_per_tick) - 1)
        if number > last + max(2, 0.02 * self.timeline.num_frames):
            raise MediaError(f"damaged: none of its {self.timeline.num_frames} frames after frame {last} can be decoded")

    def _seek(self, number: int) -> None:
        # Containers seek by decoding time, which runs ahead of the time shown, so that the keyframe found may be too late.
        for earlier in (number, number - 10, number - 50, number - SEEK_FRAMES):
            if earlier > 0 and self.timeline.stamped:
                self._start(self.timeline.pts(earlier))
                if self.next is not None and self.next[0] <= number:
                    return
        self._start(self.timeline.first_dts)

    def _start(self, timestamp: int) -> None:
        self.container.seek(timestamp, stream=self.stream, backward=True)
        self.decoded = self._decode_from_keyframe() if self.timeline.stamped else self._decode_and_count()
        self.shown, self.next = None, next(self.decoded, None)

    def _decode_and_count(self) -> Iterator[tuple[int, Any]]:
        return enumerate(frame for packet in _packets(self.container, self.stream) for frame in packet.decode())

    def _decode_from_keyframe(self) -> Iterator[tuple[int, Any]]:
        first = None
        for packet in _packets(self.container, self.stream):
            if first is None:
                if not packet.is_keyframe or packet.pts is None:
                    continue
                first = packet
            for frame in packet.decode():
                # Frames shown before the keyframe that they follow in the file (open GOP) lack their references.
                if frame.pts is not None and frame.pts >= first.pts:
                    yield self.timeline.number(frame.pts), frame


def _quarter_turns(frame: Any) -> int:
    """Anticlockwise."""
    return round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0  # else FFmpeg's number for a matrix of zeros


def _resized(frame: Any, resize: Callable[[int, int], tuple[int, int]]) -> tuple[int, int]:
    return resize(frame.width, frame.height) if _quarter_turns(frame) % 2 else resize(frame.height, frame.width)


def _picture(converter: Any, frame: Any, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    turns = _quarter_turns(frame)
    if turns % 2:
        height, width = width, height
    return np.rot90(converter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray(), turns)
