"""Real sound files for the tests."""

import io
from types import SimpleNamespace

import av
import numpy as np
import soundfile

CODECS = {
    ".m4a": ("mp4", "aac"),
    ".mp4": ("mp4", "aac"),
    ".aac": ("adts", "aac"),
    ".webm": ("webm", "libopus"),
    ".opus": ("ogg", "libopus"),
}


def tone(hertz, seconds, rate, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds, rate, channels=1, seed=0, amplitude=0.1):
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(seed).normal(0, amplitude, shape).clip(-1, 1).astype(np.float32)


def encode(samples, rate, suffix, subtype=None):
    """The bytes of a sound file. Samples are [time] or [time, channels]."""
    file = io.BytesIO()
    if suffix in CODECS:
        _encode_with_ffmpeg(file, np.atleast_2d(samples.T), rate, *CODECS[suffix])
    else:
        soundfile.write(file, samples, rate, format=suffix[1:].upper(), subtype=subtype)
    return file.getvalue()


def write(path, samples, rate, subtype=None):
    path.write_bytes(encode(samples, rate, path.suffix, subtype))
    return path


def _encode_with_ffmpeg(file, samples, rate, container, codec):
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    with av.open(file, "w", format=container) as output:
        picture = _add_picture(output) if container == "mp4" else None  # a stream before the sound must not matter
        stream = output.add_stream(codec, rate=rate, layout=layout, options={"b": "128k"})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
        frame.sample_rate = rate
        if picture:
            _mux_picture(output, picture)
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


def mux(samples, rate, container, codec, piped=False):
    """The bytes of a file that FFmpeg writes, to where it can go back to complete the header, or to a pipe. Samples are [time]."""
    content = io.BytesIO()
    file = SimpleNamespace(write=content.write) if piped else content
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(stream.codec_context.format.name, "mono", rate, stream.codec_context.frame_size or 1024)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(piece))
        output.mux(stream.encode())
    return content.getvalue()


def silent_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        _mux_picture(output, _add_picture(output))
    return file.getvalue()


def write_video(path, sound_seconds, video_seconds, rate=48_000):
    """An MP4 file with its table of contents in front, so that a part of it can be read."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as output:
        picture = _add_picture(output)
        stream = output.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(noise(sound_seconds, rate).T), "fltp", "mono")
        frame.sample_rate = rate
        _mux_picture(output, picture, 25 * video_seconds)
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def _add_picture(output):
    stream = output.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    return stream


def _mux_picture(output, stream, times=1):
    for _ in range(times):
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
    output.mux(stream.encode())


def amplitude(wave, hertz, rate):
    """Of a steady tone, away from the ends."""
    inner = wave[len(wave) // 5 : -len(wave) // 5].astype(float)
    window = np.hanning(len(inner))
    return 2 * abs((window * inner * np.exp(-2j * np.pi * hertz * np.arange(len(inner)) / rate)).sum()) / window.sum()
