"""Audio: any common sound file, or the sound of a video file, to a log-mel spectrogram: a float32 picture whose rows are times.

DALI and PyAV decode, PyAV resamples, PyTorch makes the spectrogram. That is done sample by sample: a batch's would not fit the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from polyvit_fast.config import Decoder, Modality
from polyvit_fast.data.audio.reader import SoundReader
from polyvit_fast.data.audio.spectrogram import FRAMES_PER_SECOND, log_mel, num_frames, num_samples
from polyvit_fast.media import Media

PADDINGS: dict[str, Literal["spectrogram", "waveform"]] = {"kaldi": "spectrogram", "mbt": "waveform"}


@dataclass(frozen=True, kw_only=True)
class Audio(Modality):
    """Sounds: all that libsndfile reads (WAV, FLAC, AIFF ...), MP3, AAC, Ogg, Opus, WMA, the sound of videos; channels are averaged."""

    name: ClassVar[str] = "audio"
    clip_seconds: float = 8.0
    """Length of a clip. A shorter sound is padded after its end."""
    patch: int = 16
    """Rows and columns of one token: hundredths of a second and mel bins."""
    num_mel_bins: int = 128
    """Columns of the spectrogram: frequency bands."""
    channels: int = 3
    """Copies of the spectrogram; with 3 the tokenizer's weights may come from an image model's (as in the paper)."""
    spectrogram: Literal["kaldi", "mbt"] = "kaldi"
    """kaldi: as AST, from 20 Hz on, with pre-emphasis and Hann windows; mbt: from 0 Hz on, with Hamming windows."""
    padding: Literal["auto", "spectrogram", "waveform"] = "auto"
    """After a short sound. spectrogram: rows of 0, before mean and std, as in AST; waveform: silence, down to the logarithm's floor.
    auto: spectrogram for kaldi, which is AST's, and waveform for mbt, whose authors publish none."""
    sample_rate_hz: int = 16_000
    """Files of another rate are resampled. The highest band ends at half of it."""
    eval_clips: int = 1
    """Evenly spaced clips of a file in evaluation; one is the middle. Their logits are averaged."""
    freq_masks: int = 0
    """SpecAugment: random bands of each training spectrogram that are set to the mean; 0 switches it off."""
    freq_mask_bins: int = 48
    """Mel bins that such a band has at most."""
    time_masks: int = 0
    """SpecAugment: random stretches of time that are set to the mean; 0 switches it off."""
    time_mask_frames: int = 48
    """Hundredths of a second that such a stretch has at most."""
    max_seconds: float = 900.0
    """A longer file counts as broken and is not decoded to its end."""
    mean: float = -4.2677393
    """Subtracted from the logarithms before the model (the default: AudioSet's, as AST has it for kaldi)."""
    std: float = 2 * 4.5689974
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        for name in ("patch", "num_mel_bins", "channels", "eval_clips"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self._frames <= 0 or abs(self._frames - self.clip_seconds * FRAMES_PER_SECOND) > 1e-6:
            raise ValueError(f"clip_seconds = {self.clip_seconds} must be a whole number of hundredths, and not 0")
        if self.sample_rate_hz < 1000 or self.sample_rate_hz % FRAMES_PER_SECOND:
            raise ValueError(f"sample_rate_hz = {self.sample_rate_hz} must be a multiple of {FRAMES_PER_SECOND}, from 1000 on")
        for count, width, most in (
            ("freq_masks", "freq_mask_bins", self.num_mel_bins),
            ("time_masks", "time_mask_frames", self._frames),
        ):
            if getattr(self, count) < 0:
                raise ValueError(f"{count} = {getattr(self, count)} must not be negative")
            if getattr(self, count) and not 0 < getattr(self, width) <= most:
                raise ValueError(f"{width} = {getattr(self, width)} must lie between 1 and {most}")
        if self.max_seconds <= 0 or self.std <= 0:
            raise ValueError("max_seconds and std must be positive")

    @property
    def _frames(self) -> int:
        return round(self.clip_seconds * FRAMES_PER_SECOND)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """One picture: a row for every hundredth of a second, a column for every mel bin."""
        return (1, self._frames, self.num_mel_bins, self.channels)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """One square patch."""
        return (1, self.patch, self.patch)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in nepers of energy."""
        return (self.mean,) * self.channels, (self.std,) * self.channels

    @property
    def shared_settings(self) -> dict[str, object]:
        """What says which frequency a column is, and how its energy is measured."""
        return {"spectrogram": self.spectrogram, "sample_rate_hz": self.sample_rate_hz}

    @property
    def eval_views(self) -> int:
        """The clips of a file."""
        return self.eval_clips

    def decoder(self, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder:
        """Files to float32 grids [sample, view, 1, rows, columns, channels], channels without memory of their own.

        A broken file raises MediaError, the next call works.
        """
        on_cpu = AudioDecoder(self, batch, train, num_threads)
        if device == "cpu":
            on_cpu.reader.waves.ready()  # so that what is missing is told at once
            return on_cpu
        from polyvit_fast.data.audio.gpu import DeviceAudio

        return DeviceAudio(on_cpu, torch.device("cuda", torch.cuda.current_device()))


class AudioDecoder:
    """Decodes on the CPU and computes there."""

    def __init__(self, audio: Audio, batch: int, train: bool, num_threads: int) -> None:
        self.audio, self.train = audio, train
        self.num_views = 1 if train else audio.eval_views
        self.samples = num_samples(audio.grid[1], audio.sample_rate_hz)
        self.reader = SoundReader(batch=batch, num_threads=num_threads, sample_rate_hz=audio.sample_rate_hz, max_seconds=audio.max_seconds)

    def __call__(
        self, media: Sequence[Media], rngs: Sequence[np.random.Generator]
    ) -> Float32[Tensor, "sample view 1 rows columns channels"]:
        """Grids; raises MediaError on a broken file."""
        _, rows, columns, _ = self.audio.grid
        pictures = torch.empty(len(media), self.num_views, rows, columns)

        def fill(i: int, wave: Float32[np.ndarray, " samples"]) -> None:
            clips = np.empty((self.num_views, self.samples), np.float32)
            self.cut(wave, rngs[i], clips)
            pictures[i] = self.spectrograms(torch.from_numpy(clips))
            pictures[i][:, self.count_rows(len(wave)) :] = 0
            if self.train:
                masked_rows, masked_columns = self.draw_masks(rngs[i])
                pictures[i][:, torch.from_numpy(masked_rows)] = self.audio.mean
                pictures[i][..., torch.from_numpy(masked_columns)] = self.audio.mean

        self.reader.read(media, fill)
        return self.as_grid(pictures)

    def cut(self, wave: Float32[np.ndarray, " all"], rng: np.random.Generator, clips: Float32[np.ndarray, "view samples"]) -> None:
        """Write the wanted clips of a sound into `clips`; all those of a short one are its beginning, followed by silence."""
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

    def spectrograms(self, clips: Float32[Tensor, "clip samples"]) -> Float32[Tensor, "clip rows columns"]:
        """On the device of `clips`."""
        audio = self.audio
        return log_mel(clips, form=audio.spectrogram, sample_rate_hz=audio.sample_rate_hz, num_mel_bins=audio.num_mel_bins)

    def draw_masks(self, rng: np.random.Generator) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " columns"]]:
        """The rows and the columns of a training spectrogram that are set to the mean."""
        audio = self.audio
        columns = random_ranges(audio.num_mel_bins, audio.freq_masks, audio.freq_mask_bins, rng)
        return random_ranges(audio.grid[1], audio.time_masks, audio.time_mask_frames, rng), columns

    def as_grid(self, pictures: Float32[Tensor, "sample view rows columns"]) -> Float32[Tensor, "sample view 1 rows columns channels"]:
        """With its one frame and its channels."""
        return pictures[:, :, None, :, :, None].expand(-1, -1, -1, -1, -1, self.audio.channels)

    def _choose_starts(self, last: int, rng: np.random.Generator) -> list[int]:
        if self.train:
            return [int(rng.integers(last + 1))]
        places = np.linspace(0, 1, self.audio.eval_clips) if self.audio.eval_clips > 1 else np.array([0.5])
        return np.rint(places * last).astype(int).tolist()


def random_ranges(size: int, num_masks: int, max_width: int, rng: np.random.Generator) -> Bool[np.ndarray, " size"]:
    """Which of `size` places random ranges cover (SpecAugment, Park et al. 2019): widths from 0 to `max_width`, then places, uniform."""
    covered = np.zeros(size, bool)
    for _ in range(num_masks):
        width = int(rng.integers(max_width + 1))
        start = int(rng.integers(size - width + 1))
        covered[start : start + width] = True
    return covered
