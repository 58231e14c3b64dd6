"""A kind of input: `Modality`, and the `Decoder` that turns its files into grids."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from polyvit_fast.config.preprocessing import Preprocessing
from polyvit_fast.config.record import Record
from polyvit_fast.media import Media

if TYPE_CHECKING:  # PyTorch takes seconds to import, which `--help` and `list` have no need of
    from torch import Tensor

MOST_NUMBERS = 2**31 - 1
"""In the grid of one view."""


@runtime_checkable
class Decoder(Protocol):
    """Turns the media of a batch into grids. One is built for each task and split, for a largest batch size.

    The grid of a sample depends only on that sample and its random generator, never on the rest of the batch.
    """

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        """Grids `[sample, view, frames, rows, columns, channels]`, uint8 or float32. Raises MediaError for a broken file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Modality(Record, ABC):
    """A kind of input: the grid that a sample is decoded to, and how the grid is cut into tokens."""

    name: ClassVar[str]
    num_class_tokens: int = 1
    """Learned tokens in front of the tubelets.
    1: a class token, as in ViT. 2: one for distillation too, as in AST and DeiT. 0: none, as in VideoMAE."""
    pool: Literal["cls", "class_tokens", "mean"] = "cls"
    """What heads read.
    cls: the first class token, as in ViT and ViViT.
    class_tokens: the mean of all class tokens, as in AST.
    mean: the mean of the tubelets' tokens, normalised afterwards, as in VideoMAE."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Position embeddings. sinusoidal: fixed sines and cosines of the token's number, as in VideoMAE."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int, int, int]:
        """(frames, rows, columns, channels) of one view. Images and spectrograms have one frame."""

    @property
    @abstractmethod
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, rows, columns) that become one token."""

    @property
    def token_stride(self) -> tuple[int, int, int]:
        """(frames, rows, columns) from one token to the next: less than `tubelet` where tokens overlap."""
        return self.tubelet

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

    @property
    def preprocessing(self) -> Preprocessing:
        """What evaluation does with a file, for those who use a model elsewhere. The default says nothing."""
        return Preprocessing()

    @classmethod
    def suggest(cls, value: object) -> str:
        """The modalities of the package."""
        return "write Image(), Video() or Audio(), of polyvit_fast.data"

    def thorough(self) -> Modality:
        """This modality with evaluation views that cover as much of every file as possible, for `polyvit-fast check`."""
        return self

    def with_views(self, *counts: int) -> Modality:
        """This modality with so many evaluation views, as in `polyvit-fast eval RUN --views 4x3`. Raises ValueError for other counts."""
        raise ValueError(f"{self.name}: evaluation has one view, which cannot be changed")

    @property
    def tubelets(self) -> tuple[int, int, int]:
        """How many tubelets a view has along (frames, rows, columns)."""
        frames, rows, columns = map(_count_steps, self.grid, self.tubelet, self.token_stride)
        return frames, rows, columns

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one view, including the class tokens."""
        return math.prod(self.tubelets) + self.num_class_tokens

    def check_grid(self) -> None:
        """Raise ValueError when the tubelet does not divide the grid, or heads would read tokens that are not there."""
        for axis, size, step, stride in zip(("frames", "rows", "columns"), self.grid, self.tubelet, self.token_stride, strict=False):
            if not 0 < stride <= step <= size:
                raise ValueError(f"{self.name}: tubelets of {step} {axis} every {stride} do not fit a grid of {size} {axis}")
            if stride == step and size % step:
                raise ValueError(f"{self.name}: {axis} = {size} does not divide by the tubelet's {step}; change one of the two")
        if math.prod(self.grid) > MOST_NUMBERS:
            raise ValueError(f"{self.name}: a grid of {' x '.join(map(str, self.grid))} has more than {MOST_NUMBERS:,} numbers")
        if self.num_class_tokens not in (0, 1, 2):
            raise ValueError(f"{self.name}: num_class_tokens = {self.num_class_tokens} must be 0, 1 or 2")
        if not self.num_class_tokens and self.pool != "mean":
            raise ValueError(f"{self.name}: pool = {self.pool} needs a class token; set num_class_tokens = 1, or pool = mean")


def _count_steps(size: int, step: int, stride: int) -> int:
    return (size - step) // stride + 1
