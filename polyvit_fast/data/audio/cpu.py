"""Audio on the CPU: DALI and PyAV decode, PyAV resamples, PyTorch makes the spectrogram.

Spectrograms are made sample by sample, as the intermediate results of a whole batch would not fit the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.audio.reader import SoundReader
from polyvit_fast.data.audio.spectrogram import log_mel, num_frames, num_samples
from polyvit_fast.media import Media

PADDINGS: dict[str, Literal["spectrogram", "waveform"]] = {"kaldi": "spectrogram", "mbt": "waveform"}
"""What padding = auto means for each form of spectrogram."""


class AudioDecoder:
    """Sound files to float32 grids, on the CPU."""

    def __init__(self, audio: Audio, batch: int, train: bool, num_threads: int) -> None:
        self.audio, self.train = audio, train
        self.num_views = 1 if train else audio.eval_views
        self.samples = num_samples(audio.grid[1], audio.sample_rate_hz)
        self.reader = SoundReader(batch=batch, num_threads=num_threads, sample_rate_hz=audio.sample_rate_hz, max_seconds=audio.max_seconds)

    def prepare(self) -> None:
        """Build the graph now, so that a missing library is reported at once."""
        self.reader.waves.ready()

    def __call__(
        self, media: Sequence[Media], rngs: Sequence[np.random.Generator]
    ) -> Float32[Tensor, "sample view 1 rows columns channels"]:
        """Grids, whose channels are views of one. Raises MediaError on a broken file."""
        _, rows, columns, _ = self.audio.grid
        spectrograms = torch.empty(len(media), self.num_views, rows, columns)

        def fill(i: int, wave: Float32[np.ndarray, " samples"]) -> None:
            clips = np.empty((self.num_views, self.samples), np.float32)
            self.cut_clips(wave, rngs[i], clips)
            spectrograms[i] = self.make_spectrograms(torch.from_numpy(clips))
            spectrograms[i][:, self.count_rows(len(wave)) :] = 0
            if self.train:
                masked_rows, masked_columns = self.draw_masks(rngs[i])
                spectrograms[i][:, torch.from_numpy(masked_rows)] = self.audio.mean
                spectrograms[i][..., torch.from_numpy(masked_columns)] = self.audio.mean

        self.reader.read(media, fill)
        return self.as_grid(spectrograms)

    def cut_clips(self, wave: Float32[np.ndarray, " all"], rng: np.random.Generator, clips: Float32[np.ndarray, "view samples"]) -> None:
        """Write the clips of a sound into `clips`. A sound that is shorter than a clip is followed by silence."""
        for clip, start in zip(clips, self._choose_starts(max(0, len(wave) - self.samples), rng), strict=True):
            part = wave[start : start + self.samples]
            clip[: len(part)], clip[len(part) :] = part, 0

    def count_rows(self, samples: int) -> int:
        """How many rows are kept of a clip from a sound of so many samples; zeros follow.

        Where the spectrogram is padded, these are the windows of the sound alone, and at least one: AST has none of less than 25 ms.
        """
        audio, rows = self.audio, self.audio.grid[1]
        padding = PADDINGS[audio.spectrogram] if audio.padding == "auto" else audio.padding
        return rows if padding == "waveform" else min(rows, max(1, num_frames(samples, audio.sample_rate_hz)))

    def make_spectrograms(self, clips: Float32[Tensor, "clip samples"]) -> Float32[Tensor, "clip rows columns"]:
        """The log-mel spectrograms of clips, on the clips' device."""
        audio = self.audio
        return log_mel(clips, form=audio.spectrogram, sample_rate_hz=audio.sample_rate_hz, num_mel_bins=audio.num_mel_bins)

    def draw_masks(self, rng: np.random.Generator) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " columns"]]:
        """The rows and the columns of a training spectrogram that are set to the mean."""
        audio = self.audio
        columns = draw_ranges(audio.num_mel_bins, audio.freq_masks, audio.freq_mask_bins, rng)
        return draw_ranges(audio.grid[1], audio.time_masks, audio.time_mask_frames, rng), columns

    def as_grid(self, spectrograms: Float32[Tensor, "sample view rows columns"]) -> Float32[Tensor, "sample view 1 rows columns channels"]:
        """Spectrograms with the axes of frames and channels."""
        return spectrograms[:, :, None, :, :, None].expand(-1, -1, -1, -1, -1, self.audio.channels)

    def _choose_starts(self, last: int, rng: np.random.Generator) -> list[int]:
        if self.train:
            return [int(rng.integers(last + 1))]
        fractions = np.linspace(0, 1, self.audio.eval_clips) if self.audio.eval_clips > 1 else np.array([0.5])
        return np.rint(fractions * last).astype(int).tolist()


def draw_ranges(size: int, num_masks: int, max_width: int, rng: np.random.Generator) -> Bool[np.ndarray, " size"]:
    """Which of `size` indices are covered by random ranges (SpecAugment, Park et al. 2019).

    The width of a range is uniform from 0 to `max_width`, then its start is uniform.
    """
    covered = np.zeros(size, bool)
    for _ in range(num_masks):
        width = int(rng.integers(max_width + 1))
        start = int(rng.integers(size - width + 1))
        covered[start : start + width] = True
    return covered
