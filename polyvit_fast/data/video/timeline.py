"""Which frame of a video file is frame k: by time where the file has one clock, by order in the file where its clock restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from polyvit_fast.media import MediaError

TOLERATED_RATIO = 0.02  # of the length that a header promises may be missing; and one frame
PROMISING = ("mov,", "matroska,", "flv")
"""Containers whose headers state a duration. Others promise bytes or frames, or FFmpeg computes the duration from what it finds."""
BROADCAST = ("mpegts", "mpeg")  # containers whose clock may also jump ahead
JUMP_SECONDS, JUMP_STEPS = 0.25, 5  # the most from one frame to the next without a break: the larger of both
GUESSED_STEPS = 3  # the largest error of FFmpeg's guesses of decoding times
REORDERED_FRAMES = 16  # the most that are stored before one that is shown earlier: the largest buffer of H.264, HEVC and VVC
SEQUENTIAL = "apng,dv,h264,hevc,m4v,mjpeg,mpegvideo,mxf,obu"
"""FFmpeg's demuxers in which seeking, or a frame's time, is a guess, or which lack time stamps."""
KEPT_FRAMES = 3  # the most that FFmpeg keeps until it knows where the last of them ends
SECOND_STREAM = "its video goes on in a second stream, with time stamps of its own, as in concatenated files: split it there"


class Stamp(NamedTuple):
    """The ticks at which a packet's frame is shown and decoded, and whether decoding can begin with it."""

    pts: int | None
    dts: int | None
    key: bool


@dataclass(frozen=True)
class FileOrder:
    """How to number the frames of a file that is read from its start: recording after recording."""

    starts: Sequence[int]
    """The packets with which time stamps restart, including the first one."""
    concatenated: bool
    """Whether separate recordings begin there, rather than one recording having strange time stamps."""
    numbers: Sequence[int] = ()
    """The frame number of each packet, -1 for a frame that needs others which the file lacks. Empty: frames are numbered as decoded."""
    entries: Sequence[int] = ()
    """The packets with which decoding can begin."""

    def entry(self, number: int) -> int:
        """The packet to begin with to decode frame `number`."""
        return max((packet for packet in self.entries if self.numbers[packet] <= number), default=0)


@dataclass(frozen=True)
class Timeline:
    """Frame numbers from time stamps: frame k is the one shown k average frame times after the start.

    With a constant rate that is the k-th frame; with a variable rate, motion keeps its speed. Where time stamps restart, or packets do
    not say when they are shown (some AVI and MPEG files with B-frames), frame k is the k-th one in the file.
    """

    start: int
    frames_per_tick: float
    num_frames: int
    first_dts: int
    """The decoding time stamp of the first packet, the earliest to which one can seek."""
    regular: bool = False
    """Whether all time stamps were read and frame k is the k-th one."""
    order: FileOrder | None = None
    """Set where frames are numbered by their order, not by time."""

    def number(self, pts: int) -> int:
        """The number of the frame with this time stamp."""
        return round((pts - self.start) * self.frames_per_tick)

    def pts(self, number: int) -> int:
        """The time stamp of a frame."""
        return self.start + round(number / self.frames_per_tick)

    def failure(self, reason: str) -> str:
        """The message when decoding fails for this reason, which may come from the restart of time stamps only."""
        if self.order is None or len(self.order.starts) < 2:
            return f"damaged: {reason}"
        joint = f"its time stamps restart at frame {self.order.starts[1]}, as in concatenated files"
        return f"{joint}, and it cannot be read on ({reason}): split it there"


def header_timeline(container: Any, stream: Any) -> Timeline | None:
    """The timeline from the header alone, where it has the stream's own duration and an index of its frames (MP4, AVI)."""
    index = stream.index_entries
    if not (stream.frames and stream.duration and stream.average_rate and len(index) >= stream.frames):
        return None
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        return None
    if index[-1].pos + index[-1].size > container.size:
        raise MediaError(f"truncated: its index has a frame at byte {index[-1].pos}, the file has {container.size}")
    frames_per_tick = float(stream.average_rate * stream.time_base)
    num_frames = max(1, round(stream.duration * frames_per_tick))
    return Timeline(stream.start_time or 0, frames_per_tick, num_frames, index[0].timestamp)


def has_regular_index(stream: Any, timeline: Timeline) -> bool:
    """Whether the frames in the header's index follow each other at a constant rate, which `header_timeline` does not look at."""
    index = stream.index_entries
    return len(index) == stream.frames == timeline.num_frames and all(
        not entry.is_discard and round((entry.timestamp - timeline.first_dts) * timeline.frames_per_tick) == k
        for k, entry in enumerate(index)
    )


def counted_timeline(container: Any, stream: Any, joints: Sequence[int], videos_from: Callable[[int], set[tuple[str, int]]]) -> Timeline:
    """The timeline from the time stamps of all packets: reads the whole file, decodes nothing.

    Matroska and WebM need it, as their header gives the length of the longest stream, which may be the sound, and a guessed rate.
    `joints` are the bytes at which other recordings begin that FFmpeg reads too; `videos_from` finds the videos after a byte.
    """
    found = _read_packets(container, stream, joints)
    stamps = found.stamps
    broadcast = container.format.name in BROADCAST
    if broadcast and found.last_byte < 0.95 * container.size:  # PyAV skips streams that begin late
        known = {one.id for one in container.streams}
        if any(name == container.format.name and video not in known for name, video in videos_from(found.last_byte)):
            raise MediaError(SECOND_STREAM)
    shown = [stamp.pts for stamp in stamps if stamp.pts is not None]
    decoded = [stamp.dts for stamp in stamps if stamp.dts is not None]
    sequential = container.format.name in SEQUENTIAL.split(",")
    if not (stamps if sequential else shown or decoded):
        raise MediaError("there are no frames with time stamps in it")
    if len(found.joints) < len(joints):
        raise MediaError(format_joint(joints[len(found.joints)]))
    breaks = _breaks(stamps, stream, container.format.name)
    starts = sorted({0, *breaks, *found.joints})
    first, last, num_frames = min(shown or decoded or [0]), max(shown or decoded or [0]), len(stamps)
    if len(starts) == 1:
        _check_promises(container, stream, found, last - first)
    if not found.whole:
        raise MediaError("truncated: its last frame is incomplete")
    concatenated = broadcast or set(breaks) <= set(found.joints)
    if sequential or len(shown) < num_frames or not concatenated:
        return Timeline(0, 1.0, num_frames, 0, order=FileOrder(starts, concatenated))
    if len(starts) > 1:
        order = _order(shown, [stamp.key for stamp in stamps], starts)
        return Timeline(0, 1.0, 1 + max(order.numbers), 0, order=order)
    frames_per_tick = (num_frames - 1) / (last - first) if last > first else 1.0
    regular = not found.hidden and [round((pts - first) * frames_per_tick) for pts in sorted(shown)] == list(range(num_frames))
    return Timeline(first, frames_per_tick, num_frames, min([first, *decoded]), regular)


def format_joint(byte: int) -> str:
    """The message for a file that FFmpeg reads only up to this byte."""
    return f"its time stamps restart at byte {byte}, where another file was appended: split it there"


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of these streams."""
    with suppress(IndexError):  # PyAV raises it after the last packet of a file in which another stream begins late
        yield from container.demux(*streams)


@dataclass
class _PacketSummary:
    """What the packets of a file say."""

    stamps: list[Stamp] = field(default_factory=list)
    """Time stamps of the video stream."""
    hidden: int = 0
    """Packets of the video stream that show nothing."""
    whole: bool = True
    """Whether the last frame is complete."""
    end_seconds: float = 0.0
    """The end of the stream that ends last."""
    last_byte: int = 0
    """Where the last packet of the video stream begins."""
    joints: list[int] = field(default_factory=list)
    """The first packets of recordings whose offset in the file is known."""


def _read_packets(container: Any, stream: Any, joints: Sequence[int]) -> _PacketSummary:
    found, previous, begun, ahead = _PacketSummary(), {}, {}, list(joints)
    videos = {other.index for other in container.streams.video}
    for packet in packets(container):
        own, stamp = packet.stream_index == stream.index, packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            length = packet.duration or max(0, stamp - previous.get(packet.stream_index, stamp))
            found.end_seconds = max(found.end_seconds, float((stamp + length) * packet.time_base))
            previous[packet.stream_index] = stamp
        if own and packet.size and not packet.is_discard:
            found.last_byte = packet.pos or found.last_byte
            if ahead and found.last_byte > ahead[0]:
                found.joints.append(len(found.stamps))
                del ahead[0]
            found.stamps.append(Stamp(packet.pts, packet.dts, packet.is_keyframe))
            found.whole = not packet.is_corrupt
        elif own and packet.pts is not None:
            found.hidden += 1
        elif packet.size and packet.stream_index in videos:
            begun.setdefault(packet.stream_index, len(found.stamps))
    count = len(found.stamps)
    if any(before >= count - KEPT_FRAMES and before > count / 2 for before in begun.values()):
        raise MediaError(SECOND_STREAM)
    return found


def _check_promises(container: Any, stream: Any, found: _PacketSummary, ticks: int) -> None:
    num_frames = len(found.stamps)
    frame_seconds = float(ticks * stream.time_base) / (num_frames - 1) if num_frames > 1 else found.end_seconds
    promised = (container.duration or 0) / 1e6 if container.format.name.startswith(PROMISING) else 0.0
    if 0 < found.end_seconds < (1 - TOLERATED_RATIO) * promised - 1.5 * frame_seconds:
        raise MediaError(f"truncated: it ends after {found.end_seconds:.1f} of the {promised:.1f} seconds that its header promises")
    # AVI counts in ticks, one a frame: empty ones are not stored.
    if max(num_frames + found.hidden, ticks) < (1 - TOLERATED_RATIO) * stream.frames - 1:
        raise MediaError(f"truncated: it ends after {num_frames} of the {stream.frames} frames that its header promises")


def _breaks(stamps: Sequence[Stamp], stream: Any, container: str) -> list[int]:
    """The packets with which time stamps restart.

    Without a restart, a frame with which decoding can begin is shown after all that are stored before it, and any other frame before only
    a few of them.
    """
    stamped = all(stamp.pts is not None for stamp in stamps)
    context = stream.codec_context
    depth = REORDERED_FRAMES if context.has_b_frames or (context.codec.reorder and container in BROADCAST) else 0
    back, ahead = _usual_steps(stamps, JUMP_SECONDS / float(stream.time_base), stamped, container in BROADCAST)
    breaks, latest, end, last_dts = [], [], -math.inf, None
    for i, (pts, dts, key) in enumerate(stamps):
        step = 0 if last_dts is None or dts is None else dts - last_dts
        last_dts = last_dts if dts is None else dts
        restarts = not -back <= step <= ahead
        if stamped and pts is not None:
            restarts = restarts or (key and pts <= end) or (len(latest) > depth and pts < latest[0])
            latest, end = ([], -math.inf) if restarts else (latest, end)
            end = max(end, pts)
            heappush(latest, pts) if len(latest) <= depth else heappushpop(latest, pts)
        if restarts:
            breaks.append(i)
    return breaks


def _usual_steps(stamps: Sequence[Stamp], jump: float, stamped: bool, broadcast: bool) -> tuple[float, float]:
    """How many ticks decoding times may go (back, ahead) without a restart; they go back where FFmpeg has to guess them."""
    if not stamped:
        return jump, math.inf
    steps = [abs(after.dts - before.dts) for before, after in pairwise(stamps) if before.dts is not None and after.dts is not None]
    if not steps or not broadcast:
        return math.inf, math.inf
    usual = float(np.median(steps))
    return GUESSED_STEPS * usual, max(JUMP_STEPS * usual, jump)


def _order(times: Sequence[int], keys: Sequence[bool], starts: Sequence[int]) -> FileOrder:
    numbers, entries, count = [-1] * len(times), [], 0
    for start, end in pairwise([*starts, len(times)]):
        own = [packet for packet in range(start, end) if keys[packet]] or [start]
        shown = sorted((packet for packet in range(own[0], end) if times[packet] >= times[own[0]]), key=times.__getitem__)
        for number, packet in enumerate(shown, count):
            numbers[packet] = number
        count, entries = count + len(shown), entries + own
    return FileOrder(starts, True, numbers, entries)
