"""Real sound files for the tests."""

import io
import struct
from types import SimpleNamespace

import av
import numpy as np
import soundfile

from polyvit_fast.data.audio.reader import SoundReader, read_header
from polyvit_fast.media import Media

RATE = 16_000
SMALL = {"clip_seconds": 0.32, "num_mel_bins": 32, "patch": 16}
"""Fields of an `Audio` with short clips."""
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
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(part))
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
    """The amplitude of a steady tone, away from the ends."""
    inner = wave[len(wave) // 5 : -len(wave) // 5].astype(float)
    window = np.hanning(len(inner))
    return 2 * abs((window * inner * np.exp(-2j * np.pi * hertz * np.arange(len(inner)) / rate)).sum()) / window.sum()


def read_waves(*paths, sample_rate_hz=RATE, max_seconds=100.0, num_threads=2):
    reader = SoundReader(batch=max(1, len(paths)), num_threads=num_threads, sample_rate_hz=sample_rate_hz, max_seconds=max_seconds)
    return waves_of(reader, *paths)


def waves_of(reader, *paths):
    found = {}
    reader.read([Media(str(path)) for path in paths], lambda i, wave: found.update({i: wave.copy()}))
    return [found[i] for i in range(len(paths))]


def with_dali(path):
    return read_header(Media(str(path))) is not None


def chunk(name, content):
    return struct.pack("<4sI", name, len(content)) + content + bytes(len(content) % 2)


def wav(*chunks):
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks))) + b"WAVE" + b"".join(chunks)


def wav_format(code=1, channels=1, rate=RATE, bits=16):
    return chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * channels * bits // 8 % 2**32, channels * bits // 8, bits))


WAVE = (noise(1, RATE)[:, 0] * 32767).astype("<i2")
SAMPLES = WAVE.tobytes()
PLAIN = wav(wav_format(), chunk(b"data", SAMPLES))
FLAC = encode(noise(1, RATE), RATE, ".flac")
