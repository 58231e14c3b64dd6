"""Waveforms to log-mel spectrograms: windows of 25 ms every 10 ms, neither centred nor padded, in one of two forms.

kaldi: Kaldi's `compute-fbank-feats` with a Hann window and no dither, as AST (arXiv 2104.01778) calls it.
mbt: MBT (arXiv 2107.00135, section 4.2), Hamming windows; what the paper leaves open follows TensorFlow's and librosa's HTK filters.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polyvit_fast.data.audio.modality import FRAMES_PER_SECOND
from polyvit_fast.data.device import send

Form = Literal["kaldi", "mbt"]
PRE_EMPHASIS = 0.97
FLOORS = {"kaldi": 2.0**-23, "mbt": 1e-6}  # lower energies are raised to it before the logarithm
LOWEST_HZ = {"kaldi": 20.0, "mbt": 0.0}
NUM_GROUPS = 4  # of mel bands: takes two fifths of the time of one matrix; eight are no faster


def num_samples(frames: int, sample_rate_hz: int) -> int:
    """How many samples give exactly `frames` frames."""
    return (frames - 1) * (sample_rate_hz // FRAMES_PER_SECOND) + _window_size(sample_rate_hz)


def num_frames(samples: int, sample_rate_hz: int) -> int:
    """How many frames have their windows within `samples` samples."""
    return max(0, 1 + (samples - _window_size(sample_rate_hz)) // (sample_rate_hz // FRAMES_PER_SECOND))


def log_mel(
    waves: Float[Tensor, "batch samples"], *, form: Form, sample_rate_hz: int, num_mel_bins: int
) -> Float[Tensor, "batch frames mel"]:
    """The natural logarithms of the energies in mel bands, on the device of `waves`."""
    window, groups = _window(form, sample_rate_hz, waves.device), _band_groups(form, sample_rate_hz, num_mel_bins, waves.device)
    frames = waves.unfold(-1, len(window), sample_rate_hz // FRAMES_PER_SECOND)
    padded = frames.new_zeros(*frames.shape[:-1], _fft_size(sample_rate_hz))
    windowed = padded[..., : len(window)]
    if form == "kaldi":
        frames = frames - frames.mean(-1, keepdim=True)
        torch.sub(frames[..., 1:], frames[..., :-1], alpha=PRE_EMPHASIS, out=windowed[..., 1:])
        torch.mul(frames[..., 0], 1 - PRE_EMPHASIS, out=windowed[..., 0])
        windowed *= window
    else:
        torch.mul(frames, window, out=windowed)
    spectrum = torch.fft.rfft(padded)
    energies = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    sums = torch.cat([energies[..., lowest:end] @ bands for lowest, end, bands in groups], -1)
    return sums.clamp_(min=FLOORS[form]).log_()


def _window_size(sample_rate_hz: int) -> int:
    return sample_rate_hz * 25 // 1000


def _fft_size(sample_rate_hz: int) -> int:
    return 1 << (_window_size(sample_rate_hz) - 1).bit_length()


@cache
def _window(form: Form, sample_rate_hz: int, device: torch.device) -> Float[Tensor, " window"]:
    size = _window_size(sample_rate_hz)
    return send(torch.hann_window(size, periodic=False) if form == "kaldi" else torch.hamming_window(size), device)


@cache
def _band_groups(form: Form, sample_rate_hz: int, num_mel_bins: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """(lowest frequency, end, weights) of groups of neighbouring bands: one matrix for all bands would be zeros for the most part."""
    groups = []
    for bands in _bands(form, sample_rate_hz, num_mel_bins).tensor_split(NUM_GROUPS, -1):
        used = bands.any(-1).nonzero()
        lowest, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        groups.append((lowest, end, send(bands[lowest:end].contiguous(), device)))
    return groups


def _bands(form: Form, sample_rate_hz: int, num_mel_bins: int) -> Float[Tensor, "frequency mel"]:
    """Triangles with corners evenly spaced in mel. Kaldi's sides are straight in mel, the others' in Hz."""
    hertz = np.arange(_fft_size(sample_rate_hz) // 2 + 1) * sample_rate_hz / _fft_size(sample_rate_hz)
    lowest, highest = _mel(np.array([LOWEST_HZ[form], sample_rate_hz / 2]))
    corners = np.linspace(lowest, highest, num_mel_bins + 2)
    positions = _mel(hertz) if form == "kaldi" else hertz
    if form == "mbt":
        corners = 700 * np.expm1(corners / 1127)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (positions[:, None] - left) / (centre - left), (right - positions[:, None]) / (right - centre)
    return torch.from_numpy(np.minimum(rising, falling).clip(0)).float()


def _mel(hertz: Float[np.ndarray, " any"]) -> Float[np.ndarray, " any"]:
    return 1127 * np.log1p(hertz / 700)
