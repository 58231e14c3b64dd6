"""Frames of a video file by number, through PyAV (FFmpeg): every container and codec, on plain CPU threads.

PyAV decodes all codecs on a CPU, not only those that DALI's CPU decoder refuses (H.264, HEVC, AV1): it is as fast on the others
(VP8, VP9, MJPEG), and with a single decoder colours are equal everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from polyvit_fast.data.file_kinds import HEAD_BYTES, check_no_document, describe_recording
from polyvit_fast.data.layout import read_layout
from polyvit_fast.data.video.orientation import UPRIGHT, Orientation, orientation_of
from polyvit_fast.data.video.timeline import (
    SEQUENTIAL,
    FileOrder,
    Timeline,
    counted_timeline,
    format_joint,
    has_regular_index,
    header_timeline,
    packets,
)
from polyvit_fast.media import Media, MediaError

FORMATS = f"mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,ivf,gif,{SEQUENTIAL}"  # demuxers. Playlists are left out, as they name other files
SEEK_FRAMES = 250  # in nearly every file a gap this long has a keyframe, so that seeking is faster than decoding on
FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
MAX_ASPECT = 16  # a thinner picture would become huge when its short side is scaled


@dataclass(frozen=True)
class VideoHeader:
    """The header of a video file and properties of its first frame, with FFmpeg's names and numbers."""

    container: str
    codec: str
    num_frames: int
    height: int
    width: int
    pixels: str
    colorspace: int
    plain: bool
    """Whether its k-th frame is frame k, and frames are upright, progressive and have the usual (limited) range of levels."""


def read_header(media: Media, max_pixels: int) -> VideoHeader:
    """The header of a file, of which only the first frame is decoded. Raises MediaError as `read_clips` does."""
    with _open_video(media, max_pixels) as (container, stream, timeline):
        _, frame, orientation = _reader(container, stream, timeline).frame(0)
        check_size(frame, max_pixels)
        return VideoHeader(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            num_frames=timeline.num_frames,
            height=frame.height,
            width=frame.width,
            pixels=frame.format.name,
            colorspace=int(frame.colorspace),
            plain=(timeline.regular or has_regular_index(stream, timeline))
            and frame.pts == timeline.start
            and orientation == UPRIGHT
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
    """The RGB frames that `choose` numbers, given how many there are, scaled to the (height, width) that `resize` gives for their own.

    The file is decoded from the last keyframe before the first of these frames. Frames are turned and mirrored as the file says;
    non-square pixels count as square. Raises MediaError when the file is no video, is truncated or exceeds `max_pixels`, when its time
    stamps restart where it cannot be read on, and when the decoder reports damage on the way to one of the frames.
    """
    from av.video.reformatter import VideoReformatter

    with _open_video(media, max_pixels) as (container, stream, timeline):
        numbers = choose(timeline.num_frames)
        reader, converter = _reader(container, stream, timeline), VideoReformatter()
        clips = None
        for number in np.unique(numbers):
            shown = reader.frame(int(number))
            check_size(shown.frame, max_pixels)
            if clips is None:  # all frames get the size of the first, for sizes may change in the middle of a stream
                clips = np.empty((*numbers.shape, *_choose_size(shown, resize), 3), np.uint8)
            clips[numbers == number] = _convert(converter, shown, clips.shape[-3], clips.shape[-2])
        assert clips is not None
        return clips


@contextmanager
def _open_video(media: Media, max_pixels: int) -> Iterator[tuple[Any, Any, Timeline]]:
    """The container, its video stream and the stream's timeline."""
    with media.open() as file:
        check_no_document(file.read(HEAD_BYTES))
        layout = read_layout(file)
        if layout.end > layout.size:
            raise MediaError(f"truncated: it ends after {layout.size} of at least {layout.end} bytes")
        if layout.joints and not layout.read_on:
            raise MediaError(format_joint(layout.joints[0]))
        with _open(file, max_pixels, media) as container, _translate_errors("damaged: {}".format):
            stream = _video_stream(container, max_pixels)
            timeline = header_timeline(container, stream) or counted_timeline(
                container, stream, layout.joints, partial(_find_videos, media, max_pixels, end=layout.size)
            )
            if timeline.order is None:
                yield container, stream, timeline
                return
    with media.open() as file, _open(file, max_pixels, media) as container, _translate_errors(timeline.failure):
        yield container, _video_stream(container, max_pixels), timeline


def _find_videos(media: Media, max_pixels: int, start: int, end: int) -> set[tuple[str, int]]:
    """(container, id) of each video stream in a part of a file; nothing where the part cannot be read by itself."""
    part = replace(media, offset=media.offset + start, size=end - start)
    with suppress(MediaError), part.open() as file, _open(file, max_pixels, part) as container, _translate_errors(str):
        keys = [packet for packet in packets(container, *container.streams.video) if packet.is_keyframe]
        return {(container.format.name, packet.stream.id) for packet in keys}
    return set()


@contextmanager
def _translate_errors(failure: Callable[[str], str]) -> Iterator[None]:
    """Turn the errors of FFmpeg and of the disk into a MediaError with the text of `failure`."""
    from av.error import FFmpegError

    try:
        yield
    except (FFmpegError, OSError) as error:
        raise MediaError(failure(error.strerror or str(error))) from None


def _open(file: Any, max_pixels: int, media: Media) -> Any:
    import av
    from av.error import ArgumentError, FFmpegError

    try:
        return av.open(
            file,
            options=_decoder_limit(max_pixels),  # opening already decodes frames
            container_options={
                "format_whitelist": FORMATS,
                "fflags": "-genpts",
            },  # the time stamps that FFmpeg would make up are wrong in AVI
            metadata_errors="replace",
        )
    except ArgumentError:
        raise MediaError(f"its format is none of {FORMATS}{describe_recording(media)}") from None
    except (FFmpegError, OSError) as error:
        reason = describe_recording(media) or f": {error.strerror or error}"
        raise MediaError(f"not a video that can be opened{reason}") from None


def _decoder_limit(max_pixels: int) -> dict[str, str]:
    return {"max_pixels": str(2 * max_pixels + 100_000)}  # decoders round sides up to multiples of 128


def _video_stream(container: Any, max_pixels: int) -> Any:
    from av.stream import Disposition

    streams = [
        s for s in container.streams.video if not s.disposition & Disposition.attached_pic
    ]  # a sound file's cover is a video stream too
    if not streams:
        raise MediaError("there is no video stream in it")
    stream = next((s for s in streams if s.frames != 1), streams[0])  # an animated AVIF begins with a still picture
    context = stream.codec_context
    if context is None:
        raise MediaError("its video codec is not supported")
    check_size(context, max_pixels)
    context.options = _decoder_limit(max_pixels)  # frames may become larger in the middle of a stream
    context.thread_count = 1  # files are decoded in parallel instead
    return stream


def check_size(picture: Any, max_pixels: int) -> None:
    """Raise MediaError when a picture, of any class with a width and a height, is empty, too large or too thin."""
    width, height = picture.width, picture.height
    if not width * height:
        raise MediaError(f"its frames cannot be decoded or have far more than max_pixels = {max_pixels}")
    if width * height > max_pixels:
        raise MediaError(f"its frames have {width} x {height} pixels, more than max_pixels = {max_pixels}")
    if not 1 / MAX_ASPECT <= width / height <= MAX_ASPECT:
        raise MediaError(f"its frames have {width} x {height} pixels; more than {MAX_ASPECT} to 1 is refused")


class _Shown(NamedTuple):
    number: int
    frame: Any
    orientation: Orientation


class _FrameReader(ABC):
    """Gives the frames that are shown at ascending numbers."""

    def __init__(self, container: Any, stream: Any, timeline: Timeline) -> None:
        self.container, self.stream, self.timeline = container, stream, timeline
        self.shown: _Shown | None = None
        self.next: _Shown | None = None
        self.decoded: Iterator[_Shown] = iter(())

    def frame(self, number: int) -> _Shown:
        """The last frame that is not later than `number`. Raises MediaError when the file ends long before it."""
        if self.shown is None or number - self.shown.number > SEEK_FRAMES:
            self.jump(number)
        while self.next is not None and (self.shown is None or self.next.number <= number):
            self.shown, self.next = self.next, next(self.decoded, None)
        if self.shown is None:
            raise MediaError("not one of its frames can be decoded")
        if self.next is None:
            self._check_end(number, self.shown)
        if self.shown.frame.is_corrupt:
            raise MediaError(self.timeline.failure(f"its frame {self.shown.number} cannot be decoded completely"))
        return self.shown

    @abstractmethod
    def jump(self, number: int) -> None:
        """Make `next` a frame that is not later than `number`, where there is one."""

    def start(self, decoded: Iterator[tuple[int, Any]]) -> None:
        """Continue with these frames and their numbers."""
        self.decoded = _orient(decoded)
        self.shown, self.next = None, next(self.decoded, None)

    def _check_end(self, number: int, shown: _Shown) -> None:
        last = shown.number
        if self.timeline.order is None:
            last += max(0, round((shown.frame.duration or 0) * self.timeline.frames_per_tick) - 1)
        if number > last + max(2, 0.02 * self.timeline.num_frames):
            raise MediaError(self.timeline.failure(f"none of its {self.timeline.num_frames} frames after frame {last} can be decoded"))


def _orient(decoded: Iterator[tuple[int, Any]]) -> Iterator[_Shown]:
    orientation = UPRIGHT
    for number, frame in decoded:
        orientation = orientation_of(frame, orientation)
        yield _Shown(number, frame, orientation)


class _TimeReader(_FrameReader):
    """Seeks to time stamps."""

    def jump(self, number: int) -> None:
        # Containers seek by decoding time, which is ahead of the time shown, so the keyframe that is found may be too late.
        for earlier in (number, number - 10, number - 50, number - SEEK_FRAMES):
            if earlier > 0:
                self._seek(self.timeline.pts(earlier))
                if self.next is not None and self.next.number <= number:
                    return
        self._seek(self.timeline.first_dts)

    def _seek(self, timestamp: int) -> None:
        self.container.seek(timestamp, stream=self.stream, backward=True)
        self.start(self._decode())

    def _decode(self) -> Iterator[tuple[int, Any]]:
        first = None
        for packet in packets(self.container, self.stream):
            if first is None:
                if not packet.is_keyframe or packet.pts is None:
                    continue
                first = packet
            for frame in packet.decode():
                # Frames that follow the keyframe in the file but are shown before it (open GOP) lack their references.
                if frame.pts is not None and frame.pts >= first.pts:
                    yield self.timeline.number(frame.pts), frame


class _OrderReader(_FrameReader):
    """Reads a newly opened file from its start, as its time stamps do not identify frames, and decodes from the entry it needs on."""

    def __init__(self, container: Any, stream: Any, timeline: Timeline, order: FileOrder) -> None:
        super().__init__(container, stream, timeline)
        self.order = order
        self.read = -1
        self.packets = enumerate(packet for packet in packets(container, stream) if packet.size and not packet.is_discard)

    def jump(self, number: int) -> None:
        entry = self.order.entry(number)
        if self.shown is None or entry > self.read:
            self.stream.codec_context.flush_buffers()
            self.start(self._decode(entry))

    def _decode(self, entry: int) -> Iterator[tuple[int, Any]]:
        numbers = self.order.numbers
        for count, frame in enumerate(self._frames(entry)):
            if not numbers:
                yield count, frame
            elif frame.pts is not None and frame.pts >= numbers[entry]:  # the others follow the keyframe but need frames before it
                yield frame.pts, frame

    def _frames(self, entry: int) -> Iterator[Any]:
        """The frames from packet `entry` on; their time stamps are their numbers."""
        numbers, recording = self.order.numbers, bisect_right(self.order.starts, entry)
        for number, packet in self.packets:
            self.read = number
            if number < entry or (numbers and numbers[number] < 0):
                continue
            if self.order.concatenated and recording < (recording := bisect_right(self.order.starts, number)):
                yield from self._finish()
            if numbers:
                packet.pts = numbers[number]
            yield from packet.decode()
        yield from self._finish()

    def _finish(self) -> list[Any]:
        """The frames that the decoder still holds. The next recording's time stamps may lie before theirs, so this comes first."""
        frames = self.stream.codec_context.decode(None)
        self.stream.codec_context.flush_buffers()
        return frames


def _reader(container: Any, stream: Any, timeline: Timeline) -> _FrameReader:
    return _TimeReader(container, stream, timeline) if timeline.order is None else _OrderReader(container, stream, timeline, timeline.order)


def _choose_size(shown: _Shown, resize: Callable[[int, int], tuple[int, int]]) -> tuple[int, int]:
    height, width = shown.frame.height, shown.frame.width
    return resize(width, height) if shown.orientation.swaps_sides else resize(height, width)


def _convert(converter: Any, shown: _Shown, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    if shown.orientation.swaps_sides:
        height, width = width, height
    return shown.orientation.apply(converter.reformat(shown.frame, width, height, "rgb24", threads=1).to_ndarray())
