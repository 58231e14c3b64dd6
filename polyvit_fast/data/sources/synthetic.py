"""Samples without files: a pattern for each class, with noise. For trying out a model or a configuration anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from polyvit_fast.config import Decoder, Source, Task
from polyvit_fast.config.record import check_range
from polyvit_fast.media import Media, Sample
from polyvit_fast.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor

PERIOD = 8  # pixels; a divisor of every common patch size, so that each token shows the whole pattern
EXTRA_LABEL_PROB = 0.2


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Grids of any modality, made up: the patterns of a sample's classes (the same in every `Synthetic`) plus noise of half their size."""

    num_samples: int = 1000
    """Samples; class i is that of samples i, i + num_classes, …"""
    seed: int = 0
    """Seed of the noise and of the further labels of multi-label tasks; give train and val different ones."""

    def __post_init__(self) -> None:
        check_range(self, "[1, 100000000]", "num_samples")
        check_range(self, f"[{-(2**63)}, {2**63 - 1}]", "seed")

    def samples(self, task: Task) -> Sequence[Sample]:
        """Media whose paths hold their number, and their labels."""
        return [Sample(Media(f"synthetic:{index}"), self._labels(task, index)) for index in range(self.num_samples)]

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder:
        """A decoder whose grids depend only on the sample's number: float32, in the units of the modality's normalisation."""
        import torch

        views = 1 if train else task.modality.eval_views
        shape = (views, *task.modality.grid)
        mean, std = (np.array(numbers, np.float32) for numbers in task.modality.normalisation)

        def decode(media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Float[Tensor, "sample view frames rows columns c"]:
            indices = [int(one.path.partition(":")[2]) for one in media]
            grids = [_pattern(self._labels(task, index), shape) + self._noise(index, shape) for index in indices]
            return torch.from_numpy(np.stack(grids) * std + mean)

        return decode

    def _labels(self, task: Task, index: int) -> tuple[int, ...]:
        first = index % task.num_classes
        if not task.multi_label:
            return (first,)
        extra = generator(self.seed, "synthetic labels", index).random(task.num_classes) < EXTRA_LABEL_PROB
        return tuple(c for c in range(task.num_classes) if c == first or extra[c])

    def _noise(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        return generator(self.seed, "synthetic noise", index).standard_normal(shape, np.float32) / 2


def _pattern(labels: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The sum of the classes' textures: random numbers of variance 1 that repeat every `PERIOD` pixels and every second frame."""
    texture = np.zeros((1, 2, PERIOD, PERIOD, shape[-1]), np.float32)
    for label in labels:
        texture += generator("synthetic pattern", label).standard_normal(texture.shape, np.float32)
    repeats = [-(-size // period) for size, period in zip(shape, texture.shape, strict=True)]
    return np.tile(texture, repeats)[tuple(slice(size) for size in shape)]
