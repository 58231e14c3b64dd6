"""The record of audio: any common sound file, or the sound of a video file, becomes a log-mel spectrogram, whose rows are times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from polyvit_fast.config import Modality, Preprocessing
from polyvit_fast.config.record import check_range

FRAMES_PER_SECOND = 100
"""Rows of a spectrogram."""
AST_HZ = 16_000
"""The rate of the sounds that AST's feature extractor is for."""


@dataclass(frozen=True, kw_only=True)
class Audio(Modality):
    """Sounds: all that libsndfile reads (WAV, FLAC, AIFF ...), MP3, AAC, Ogg, Opus, WMA, the sound of videos; channels are averaged."""

    name: ClassVar[str] = "audio"
    clip_seconds: float = 8.0
    """Length of a clip. A shorter sound is padded after its end."""
    patch: int = 16
    """Rows and columns of one token: hundredths of a second and mel bins."""
    patch_stride: int = 0
    """Rows and columns from one token to the next; 10 lets them overlap, as in AST. 0: `patch`, so that they do not."""
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
        check_range(self, "[1, inf)", "patch", "num_mel_bins", "channels")
        check_range(self, "[1, 1000]", "eval_clips")
        check_range(self, "[0, 1000]", "freq_masks", "time_masks")
        check_range(self, "(0, inf)", "clip_seconds", "max_seconds", "std")
        if abs(self._frames - self.clip_seconds * FRAMES_PER_SECOND) > 1e-6:
            raise ValueError(f"clip_seconds = {self.clip_seconds} must be a whole number of hundredths")
        if not 1000 <= self.sample_rate_hz <= 1_000_000 or self.sample_rate_hz % FRAMES_PER_SECOND:
            raise ValueError(f"sample_rate_hz = {self.sample_rate_hz} must be a multiple of {FRAMES_PER_SECOND}, from 1,000 to 1,000,000")
        for count, width, most in (
            ("freq_masks", "freq_mask_bins", self.num_mel_bins),
            ("time_masks", "time_mask_frames", self._frames),
        ):
            if getattr(self, count) and not 0 < getattr(self, width) <= most:
                raise ValueError(f"{width} = {getattr(self, width)} must lie between 1 and {most}")
        if not 0 <= self.patch_stride <= self.patch:
            raise ValueError(f"patch_stride = {self.patch_stride} must lie between 0 and patch = {self.patch}")

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
    def token_stride(self) -> tuple[int, int, int]:
        """From one patch to the next."""
        return (1, self.patch_stride or self.patch, self.patch_stride or self.patch)

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

    @property
    def preprocessing(self) -> Preprocessing:
        """The clip's spectrogram. AST's feature extractor makes that of kaldi at 16 kHz, padded with rows of 0."""
        pads_rows = self.padding == "spectrogram" or (self.padding == "auto" and self.spectrogram == "kaldi")
        extractor = {
            "feature_extractor_type": "ASTFeatureExtractor",
            "feature_size": 1,
            "sampling_rate": self.sample_rate_hz,
            "num_mel_bins": self.num_mel_bins,
            "max_length": self._frames,
            "padding_value": 0.0,
            "do_normalize": True,
            "return_attention_mask": False,
        }
        is_asts = pads_rows and self.spectrogram == "kaldi" and self.sample_rate_hz == AST_HZ
        form = "Kaldi's, with pre-emphasis and Hann windows" if self.spectrogram == "kaldi" else "MBT's, with Hamming windows"
        clips = "the one in the middle" if self.eval_clips == 1 else f"{self.eval_clips} and averages their logits"
        filling = "rows of 0" if pads_rows else "silence"
        return Preprocessing(
            input_name="spectrogram",
            is_mono=True,
            steps=(
                f"The sound's channels are averaged, and it is resampled to {self.sample_rate_hz} Hz.",
                f"A clip is {self.clip_seconds:g} seconds; evaluation takes {clips}.",
                f"It becomes {self._frames} rows of natural logarithms of the energies in {self.num_mel_bins} mel bands"
                f" ({form}: 25 ms every 10 ms); {filling} after a shorter sound.",
            ),
            hugging_face=extractor if is_asts else {},
            differences=(
                ("The feature extractor takes the first seconds of a longer sound, not the middle ones, and one channel at 16 kHz.",)
                if is_asts
                else ("No feature extractor of the library makes this spectrogram.",)
            ),
        )

    def with_views(self, *counts: int) -> Audio:
        """With so many clips of a file."""
        clips, *others = counts
        if others:
            raise ValueError(f"audio: views are clips, such as 4, and not {'x'.join(map(str, counts))}")
        return replace(self, eval_clips=clips)
