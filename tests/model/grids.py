"""Modalities with the grids of the paper, or smaller ones, for models that see tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polyvit_fast.config import Modality, Source, Task
from polyvit_fast.media import Sample


@dataclass(frozen=True, kw_only=True)
class Bytes(Modality):
    """What they have in common: colours 0 to 255, which become -1 to 1."""

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (127.5,) * self.grid[3], (127.5,) * self.grid[3]

    @property
    def eval_views(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Picture(Bytes):
    name: ClassVar[str] = "picture"
    size: int = 384
    patch: int = 16

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (1, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        return (1, self.patch, self.patch)


@dataclass(frozen=True, kw_only=True)
class Clip(Bytes):
    name: ClassVar[str] = "clip"
    frames: int = 32
    size: int = 224
    tubelet_frames: int = 4
    patch: int = 16

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (self.frames, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        return (self.tubelet_frames, self.patch, self.patch)


@dataclass(frozen=True, kw_only=True)
class Sound(Bytes):
    name: ClassVar[str] = "sound"
    time: int = 800
    bins: int = 128

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (1, self.time, self.bins, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        return (1, 16, 16)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * 3, (1.0,) * 3


@dataclass(frozen=True, kw_only=True)
class NoFiles(Source):
    def samples(self, task: Task) -> Sequence[Sample]:
        return []


def task(modality: Modality, num_classes: int, **changes) -> Task:
    """A task whose data nobody asks for."""
    return Task(modality=modality, train=NoFiles(), val=NoFiles(), num_classes=num_classes, steps=1, **changes)


PAPER = {"picture": Picture(), "clip": Clip(), "sound": Sound()}
SMALL = {"picture": Picture(size=16, patch=8), "clip": Clip(frames=4, size=16, tubelet_frames=2, patch=8), "sound": Sound(time=48, bins=32)}
PAPER_HEADS = {
    "imagenet": ("picture", 1000),
    "cifar100": ("picture", 100),
    "cifar10": ("picture", 10),
    "pets": ("picture", 37),
    "resisc45": ("picture", 45),
    "kinetics400": ("clip", 400),
    "moments": ("clip", 339),
    "audioset": ("sound", 527),
    "vggsound": ("sound", 309),
}
