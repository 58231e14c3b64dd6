"""Waveforms of any sound file, or of the sound of any video file, through PyAV (FFmpeg) on CPU threads.

FFmpeg's filter `amovie` decodes many packets per call. Packet by packet, threads would wait for Python's lock so often that two are no
faster than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32

from polyvit_fast.data.audio.container import format_cut, states_duration
from polyvit_fast.data.file_kinds import describe_recording
from polyvit_fast.media import Media, MediaError

Wave = Float32[np.ndarray, " samples"]
# FFmpeg's demuxers. Playlists are left out, as they name other files.
FORMATS = "mp3,aac,ogg,mov,matroska,asf,wav,flac,aiff,au,w64,caf,amr,ac3,eac3,avi,mpegts,mpeg,flv,voc"
# The lengths of these are FFmpeg's guesses from a bit rate or time stamps, as some have no header that states it, or are checked in bytes.
GUESSED = ("aac", "ac3", "eac3", "amr", "mpegts", "mpeg", "avi", "asf")
FORMAT_CHANGES = "its sample rate or channels change midway, which is not supported"
RATES_HZ = (1_000, 768_000)
MAX_NUMBERS = 1 << 28  # 1 GiB of float32 in all channels: 15 minutes of six at 48 kHz
BLOCK_SAMPLES = 1 << 16
ENCODER_SAMPLES = 4096  # that a header may count in addition: packets hold a fixed number, and decoders start late
FILTER_SAMPLES = 64  # more than the length of the resampling filter, in samples of the lower rate


def decode(media: Media, max_seconds: float) -> tuple[int, Wave]:
    """(sample rate, waveform) of the first sound stream, channels averaged, full scale 1. A few damaged packets are left out.

    Raises MediaError when the file holds no sound, is truncated or damaged, or as soon as it turns out to be longer than `max_seconds`.
    """
    from av.error import FFmpegError

    rate, samples, num_bad, blocks = 1, 0, 0, []
    try:
        with _find_url(media) as url:
            source, stated_seconds = _open(url, media, max_seconds)
            for frame in _decode(source):
                if frame is not None:
                    rate, samples = frame.sample_rate, samples + frame.samples
                    check_size(samples, 1, rate, max_seconds)
                    blocks.append(frame.to_ndarray().mean(0))
                elif (num_bad := num_bad + 1) > 1 + max_seconds:
                    break
    except FFmpegError as error:
        reason = describe_recording(media) or f": {error.strerror}"
        raise MediaError(f"not a sound that can be decoded{reason}") from None
    if num_bad > 1 + samples / rate:
        raise MediaError(f"damaged: {num_bad} of its packets or more cannot be decoded")
    stated = stated_seconds * rate
    if samples < 0.95 * stated - (1152 if source["f"] == "mp3" else ENCODER_SAMPLES):
        raise MediaError(format_cut(samples, stated, rate))
    return rate, np.concatenate([np.zeros(0, np.float32), *blocks])


def resample(wave: Wave, from_hz: int, to_hz: int) -> Float32[np.ndarray, " resampled"]:
    """The waveform at another rate, as `ffmpeg -ar` gives it: frequencies that the new rate cannot represent are filtered out."""
    if from_hz == to_hz:
        return wave
    import av

    # FFmpeg returns nothing for fewer samples than its filter is long.
    padded = np.pad(wave, (0, max(0, FILTER_SAMPLES * max(from_hz, to_hz) // to_hz - len(wave))))
    graph = _chain(
        ("abuffer", {"sample_rate": str(from_hz), "sample_fmt": "flt", "channel_layout": "mono"}),
        ("aresample", {"sample_rate": str(to_hz)}),
    )
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(padded[None]), "flt", "mono")
    frame.sample_rate = from_hz
    graph.push(frame)
    graph.push(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in _pull(graph)])[: -(-len(wave) * to_hz // from_hz)]


def check_size(samples: int, channels: int, rate: int, max_seconds: float) -> None:
    """Raise MediaError when a sound is too long or too large for the memory, or its sample rate is not supported."""
    if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise MediaError(f"its sample rate is {rate} Hz; {RATES_HZ[0]} to {RATES_HZ[1]} are supported")
    if samples > max_seconds * rate:
        raise MediaError(f"it lasts more than max_seconds = {max_seconds:g}")
    if samples * channels > MAX_NUMBERS:
        raise MediaError(f"it has {samples} samples of {channels} channels, more than {MAX_NUMBERS} numbers")


def _chain(*filters: tuple[str, dict[str, str]]) -> Any:
    """FFmpeg's filters, one after the other."""
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1  # files are decoded in parallel instead
    contexts = [graph.add(name, **options) for name, options in (*filters, ("abuffersink", {}))]
    for one, following in pairwise(contexts):
        one.link_to(following)
    graph.configure()
    return graph


def _decode(source: dict[str, str]) -> Iterator[Any]:
    """Planar frames of float32, and None for every packet that cannot be decoded."""
    from av.error import PatchWelcomeError

    planar, blocked = ("aformat", {"sample_fmts": "fltp"}), ("asetnsamples", {"n": str(BLOCK_SAMPLES), "p": "0"})
    begun = False
    try:
        for frame in _pull(_chain(("amovie", source), planar, blocked)):
            yield frame
            begun = True
    except PatchWelcomeError:
        if begun:
            raise MediaError(FORMAT_CHANGES) from None
        yield from _decode_by_packets(source)  # `amovie` expects other numbers of MPEG's layers I and II than it gets


def _decode_by_packets(source: dict[str, str]) -> Iterator[Any]:
    import av
    from av.error import InvalidDataError

    planar, shapes = av.AudioResampler("fltp"), set()
    with _open_container(source["filename"], source["f"]) as container:
        for packet in container.demux(container.streams[int(source["streams"])]):
            try:
                frames = packet.decode()
            except InvalidDataError:
                yield None
                continue
            shapes |= {(frame.sample_rate, frame.layout.name) for frame in frames}
            if len(shapes) > 1:
                raise MediaError(FORMAT_CHANGES)
            for frame in frames:
                yield from planar.resample(frame)


def _pull(graph: Any) -> Iterator[Any]:
    """The output frames of the filters, and None for every packet that cannot be decoded."""
    from av.error import InvalidDataError

    while True:
        try:
            yield graph.pull()
        except EOFError:
            return
        except InvalidDataError:
            yield None


@contextmanager
def _find_url(media: Media) -> Iterator[str]:
    """A URL that FFmpeg opens by itself: reading through a Python file, it would wait for Python's lock."""
    with ExitStack() as stack:
        path = stack.enter_context(media.find_path())
        try:
            path.encode()
        except UnicodeEncodeError:  # FFmpeg takes names in UTF-8 only, so another file is opened by its descriptor
            path = f"/proc/self/fd/{stack.enter_context(open(path, 'rb')).fileno()}"
        url = f"file:{path}"
        yield url if media.size is None else f"subfile,,start,{media.offset},end,{media.offset + media.size},,:{url}"


def _open(url: str, media: Media, max_seconds: float) -> tuple[dict[str, str], float]:
    """(options of `amovie` for the file, the seconds that its header states or 0)."""
    from av.error import ArgumentError

    try:
        opened = _open_container(url)
    except ArgumentError:
        reason = describe_recording(media) or ": its format is not supported"
        raise MediaError(f"not a sound that can be decoded{reason}") from None
    with opened as container:
        if not container.streams.audio:
            raise MediaError("there is no sound in it")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise MediaError("its sound codec is not supported")
        seconds = _stated_seconds(media, container, stream)
        rate = stream.codec_context.sample_rate
        check_size(int(seconds * rate), 1, rate, max_seconds)
        name = container.format.name.partition(",")[0]
        return {"filename": url, "f": name, "streams": str(stream.index), "dec_threads": "1"}, seconds


def _open_container(url: str, name: str | None = None) -> Any:
    import av

    return av.open(url, format=name, metadata_errors="replace", container_options={"format_whitelist": FORMATS})


def _stated_seconds(media: Media, container: Any, stream: Any) -> float:
    name = container.format.name
    if name in GUESSED or (name == "mp3" and not _counts_frames(media)) or ("matroska" in name and not states_duration(media)):
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # of several streams, it is that of the longest


def _counts_frames(media: Media) -> bool:
    """Whether the first frame of an MP3, after its tags (ID3v2), states how many there are."""
    with media.open() as file:
        start = file.read(10)
        size = sum((byte & 127) << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + size if start.startswith(b"ID3") else 0)
        first = file.read(2000)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
