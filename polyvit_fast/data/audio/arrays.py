"""Waveforms in memory, as the files that hold the same: each becomes a WAV, which the decoders read like any other file."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.pixels import to_numpy
from polyvit_fast.media import Media, MemoryMedia

WANTED = (
    "wanted is a pair (waveform, rate): the waveform [samples] or [channels, samples] of floats with full scale 1, int16 or int32, "
    "and its samples per second"
)
MOST_CHANNELS = 64
LOUDEST = 100.0
"""Floats beyond it are whole numbers' levels rather than loud sounds."""
CODES = {np.dtype(np.int16): 1, np.dtype(np.int32): 1, np.dtype(np.float32): 3}
"""Of WAV: whole numbers and floats."""


def read_waveform(audio: Audio, value: Any, name: str) -> list[Media]:
    """The sound of a pair (waveform, rate). Raises ValueError for other values."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise ValueError(f"an input of type {type(value).__name__} does not say its sample rate; {WANTED}")
    wave, rate = to_numpy(value[0]), value[1]
    if wave is None:
        raise ValueError(f"a waveform of type {type(value[0]).__name__} cannot be read; {WANTED}")
    return [MemoryMedia(name, content=_as_wav(_channels_last(wave), _whole_rate(rate)))]


def _whole_rate(rate: Any) -> int:
    try:
        number = float(rate)
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= 1 and number == int(number)):
        raise ValueError(f"the sample rate {rate!r} is no whole number of samples per second; {WANTED}")
    return int(number)


def _channels_last(wave: np.ndarray) -> np.ndarray:
    """[samples, channels] of int16, int32 or float32. The axis of channels is the shorter one."""
    if wave.ndim not in (1, 2) or not wave.size:
        raise ValueError(f"an array of shape {list(wave.shape)} is no waveform; {WANTED}")
    if np.issubdtype(wave.dtype, np.floating):
        wave = wave.astype(np.float32)
        loudest = float(np.abs(wave).max())
        if loudest > LOUDEST:
            raise ValueError(f"its samples reach {loudest:,.0f}, which is no full scale of 1; {WANTED}")
    if wave.dtype not in CODES:
        raise ValueError(f"a waveform of {wave.dtype} does not say its full scale; {WANTED}")
    if wave.ndim == 1:
        return wave[:, None]
    if wave.shape[0] == wave.shape[1] or min(wave.shape) > MOST_CHANNELS:
        raise ValueError(f"an array of shape {list(wave.shape)} does not say which axis is that of channels; {WANTED}")
    return wave.T if wave.shape[0] < wave.shape[1] else wave


def _as_wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file of these numbers as they are."""
    little = samples.astype(samples.dtype.newbyteorder("<"))
    width, channels = samples.dtype.itemsize, samples.shape[1]
    fields = (CODES[samples.dtype], channels, rate, rate * channels * width, channels * width, 8 * width)
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, *fields)
    return (
        struct.pack("<4sI4s", b"RIFF", 4 + len(fmt) + 8 + little.nbytes, b"WAVE")
        + fmt
        + struct.pack("<4sI", b"data", little.nbytes)
        + little.tobytes()
    )
