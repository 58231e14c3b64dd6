"""A kind of input: `Modality`, and the `Decoder` that turns its files into grids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from polyvit_fast.media import Media


@runtime_checkable
class Decoder(Protocol):
    """Turns the media of a batch into grids. One is built for each task and split, for a largest batch size.

    The grid of a sample depends only on that sample and its random generator, never on the rest of the batch.
    """

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        """Grids `[sample, view, frames, rows, columns, channels]`, uint8 or float32. Raises MediaError for a broken file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Modality(ABC):
    """A kind of input: the grid that a sample is decoded to, and how the grid is cut into tokens."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int, int, int]:
        """(frames, rows, columns, channels) of one view. Images and spectrograms have one frame."""

    @property
    @abstractmethod
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, rows, columns) that become one token."""

    @property
    @abstractmethod
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), one number each per channel, in the units of the grid that the decoder returns."""

    @property
    def shared_settings(self) -> dict[str, object]:
        """Further fields, besides grid and tubelet, that tasks with the same tokenizer must have in common."""
        return {}

    @property
    @abstractmethod
    def eval_views(self) -> int:
        """Evenly spaced views of one sample whose logits are averaged in evaluation."""

    def thorough(self) -> Modality:
        """This modality with evaluation views that cover as much of every file as possible, for `polyvit-fast check`."""
        return self

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one view, including the class token."""
        counts = [size // step for size, step in zip(self.grid, self.tubelet, strict=False)]
        return counts[0] * counts[1] * counts[2] + 1

    def check_grid(self) -> None:
        """Raise ValueError when the tubelet does not divide the grid."""
        for axis, size, step in zip(("frames", "rows", "columns"), self.grid, self.tubelet, strict=False):
            if size <= 0 or step <= 0 or size % step:
                raise ValueError(f"{self.name}: {axis} = {size} does not divide by the tubelet's {step}; change one of the two")
