"""Which decoder reads the files of a modality, on the CPU or on the current GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from polyvit_fast.config import Decoder, Modality, Source, Task
from polyvit_fast.data.audio.cpu import AudioDecoder
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.cpu import ImageDecoder, ThoroughDecoder
from polyvit_fast.data.image.modality import Image, ThoroughImage
from polyvit_fast.data.video.cpu import VideoDecoder
from polyvit_fast.data.video.modality import Video
from polyvit_fast.extras import DECODING, require

Device = Literal["cpu", "cuda"]


def build_decoder(modality: Modality, *, batch: int, train: bool, num_threads: int, device: Device = "cpu") -> Decoder:
    """The decoder from files to grids: one randomly augmented view per sample when `train`, else `eval_views` fixed ones.

    With `device` = "cuda" the current GPU decodes and augments what it can, and the grids lie there. Raises ValueError for a modality
    without a decoder here, UnavailableError when DALI lacks something that it needs, MissingExtraError.
    """
    build = next((BUILDERS[kind] for kind in type(modality).__mro__ if kind in BUILDERS), None)
    if build is None:
        known = ", ".join(kind.__name__ for kind in BUILDERS)
        raise ValueError(
            f"{type(modality).__name__}: no decoder is known for this modality (there are some for {known}); "
            "a source may bring its own: see Source.decoder"
        )
    require("decoding files", *DECODING)
    return build(modality, batch, train, num_threads, device)


def build_task_decoder(source: Source, task: Task, *, batch: int, train: bool, num_threads: int, device: Device = "cpu") -> Decoder:
    """The decoder that the source brings, else that of the task's modality."""
    own = source.decoder(task, batch=batch, train=train, num_threads=num_threads, device=device)
    return own or build_decoder(task.modality, batch=batch, train=train, num_threads=num_threads, device=device)


def _build_image(kind: type[ImageDecoder], image: Image, batch: int, train: bool, num_threads: int, device: Device) -> Decoder:
    on_cpu = kind(image, batch, train, num_threads)
    if device == "cpu":
        on_cpu.prepare()
        return on_cpu
    from polyvit_fast.data.image.gpu import GpuImageDecoder

    return GpuImageDecoder(on_cpu, _current_gpu())


def _build_video(video: Video, batch: int, train: bool, num_threads: int, device: Device) -> Decoder:
    on_cpu = VideoDecoder(video, train, num_threads)
    if device == "cpu":
        return on_cpu
    from polyvit_fast.data.video.gpu import GpuVideoDecoder

    return GpuVideoDecoder(on_cpu, batch, _current_gpu())


def _build_audio(audio: Audio, batch: int, train: bool, num_threads: int, device: Device) -> Decoder:
    on_cpu = AudioDecoder(audio, batch, train, num_threads)
    if device == "cpu":
        on_cpu.prepare()
        return on_cpu
    from polyvit_fast.data.audio.gpu import GpuAudioDecoder

    return GpuAudioDecoder(on_cpu, _current_gpu())


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


BUILDERS: dict[type[Modality], Callable[[Any, int, bool, int, Device], Decoder]] = {
    Image: partial(_build_image, ImageDecoder),
    ThoroughImage: partial(_build_image, ThoroughDecoder),
    Video: _build_video,
    Audio: _build_audio,
}
"""By class of modality. A subclass without a line of its own is decoded as its parent class."""
