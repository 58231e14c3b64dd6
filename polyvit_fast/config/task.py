"""One dataset: `Task`, and the `Source`s of its samples."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from polyvit_fast.config.modality import Decoder, Modality
from polyvit_fast.config.record import ConfigError, Record, check_range
from polyvit_fast.media import Sample

MOST_STEPS = 100_000_000
"""Of a run: its plan names the task of each, at eight bytes a step."""


@dataclass(frozen=True, kw_only=True)
class Source(Record, ABC):
    """Where the samples of one split come from."""

    @abstractmethod
    def samples(self, task: Task) -> Sequence[Sample]:
        """Every sample, in an order that is the same on every machine. Raises ValueError or OSError with the cause."""

    def count(self, task: Task) -> int:
        """Number of samples. A source that generates its files generates none for this. Raises as `samples`."""
        return len(self.samples(task))

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder | None:
        """The decoder of a source whose media are not files; None: use the modality's decoder."""
        return None

    @classmethod
    def suggest(cls, value: object) -> str:
        """The source that a path looks like."""
        if not isinstance(value, str | os.PathLike):
            return "write Folder(path=…), Manifest(path=…) or Shards(paths=(…,)), of polyvit_fast.data"
        path = os.fsdecode(value)
        if path.lower().endswith((".csv", ".tsv")):
            return f'write Manifest(path="{path}")'
        return f'write Shards(paths=("{path}",))' if path.lower().endswith(".tar") else f'write Folder(path="{path}")'

    def class_names(self, task: Task) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their numbers, if the source itself has them; None if it has numbers only."""
        return None

    def describe_classes(self, names: Sequence[str]) -> str:
        """Where `class_names` come from and how many there are, for messages."""
        return f"{self}: it names {len(names)} classes"

    def remarks(self, task: Task) -> list[str]:
        """Warnings for `check` and `plan`: a sentence for each thing that may be a mistake, such as files that are left out."""
        return []


@dataclass(frozen=True, kw_only=True)
class Task(Record):
    """One dataset: its samples, and how the model is trained and evaluated on it."""

    modality: Modality
    train: Source
    val: Source
    num_classes: int
    """Number of classes: outputs of the task's head."""
    steps: int
    """The paper's U_j: steps on this task with the schedules weighted and task-by-task. Their sum over all tasks is the run's length."""
    test: tyro.conf.AvoidSubcommands[Source | None] = None
    """Samples that no run looks at, for `polyvit-fast eval RUN --split test`."""
    batch: int = 64
    """Examples per step, over all processes and micro-batches together."""
    micro_batches: int = 1
    """Compute the batch in this many equal chunks, one after the other, to fit into memory. The gradient is that of the whole batch."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy, averaged over the batch.
    sigmoid: binary cross-entropy, summed over the classes and averaged over the batch."""
    multi_label: bool = False
    """An example may have any number of classes. The metric is then mAP instead of top-1 accuracy. Needs the sigmoid loss."""
    lr_scale: float = 1.0
    """Factor on the learning rate in this task's steps."""
    lr_schedule: Literal["run", "cosine", "constant"] = "run"
    """How the learning rate changes over this task's steps.
    run: as in the whole run, with optim.warmup_steps and a cosine over the steps of all tasks.
    cosine: from optim.lr to 0 over this task's own steps, after its warmup_steps.
    constant: optim.lr, after its warmup_steps.
    In an update from several tasks (schedule accumulating) the highest of their rates holds.
    The other tasks' losses are then multiplied by the fraction that their own rates are of it."""
    warmup_steps: int = 0
    """Steps of this task over which its learning rate rises, with lr_schedule cosine or constant.
    They are counted in U_j; where the schedule gives the task another number of steps, it warms up for the same fraction of them."""
    loss_weight: float = 1.0
    """Factor on this task's loss, for updates from several tasks (schedule accumulating).
    In an update from one task adamw divides most of it out again, and so does sgd where it clips: take lr_scale there."""
    mixup: float = 0.0
    """Mixup: alpha of the Beta distribution of the weight with which two examples of a batch are mixed. 0: off."""
    cutmix: float = 0.0
    """CutMix: alpha of the Beta distribution of the fraction of a grid that stays. 0: off.
    The rest, a box of rows and columns in all frames, is the other example's; labels are mixed by area.
    With mixup too, each batch has one of the two at random, as in timm."""
    mixup_pairs: Literal["neighbours", "reversed"] = "neighbours"
    """Which two examples mixup and CutMix mix. Micro-batches do not matter.
    neighbours: 0 with 1, 2 with 3 and so on. The pairs do not depend on the number of processes.
    reversed: the first with the last and so on, within the part of the batch that a process has, as in the paper's code."""
    label_smoothing: float = 0.0
    """Fraction of each target that is spread evenly over all classes."""
    drop_path_rate: float = 0.0
    """Stochastic depth: probability of skipping a residual branch of the last block. It falls linearly to 0 at the first block."""
    head_norm: bool = False
    """Normalise what the head reads once more, as AST does. It already comes from a normalised token."""
    zero_head: bool = False
    """Initialise the task's head with zeros, as the paper's code does for videos and sounds, which start from a pretrained model.
    Otherwise LeCun's normal distribution, as in the paper's code for images: training from random weights is faster with it."""

    def __post_init__(self) -> None:
        check_range(self, "[1, 10000000]", "num_classes")
        check_range(self, f"[1, {MOST_STEPS}]", "steps")
        check_range(self, "[1, 1048576]", "batch", "micro_batches")
        if self.batch % self.micro_batches:
            raise ValueError(f"batch = {self.batch} does not divide into micro_batches = {self.micro_batches}")
        if self.multi_label and self.loss != "sigmoid":
            raise ValueError("multi_label = True needs loss = sigmoid")
        check_range(self, "[0, 1)", "label_smoothing", "drop_path_rate")
        check_range(self, "[0, inf)", "mixup", "cutmix", "lr_scale")
        if self.loss_weight <= 0:
            raise ValueError(
                f"loss_weight = {self.loss_weight} must be positive; to leave a task out, take --only with the names of the others"
            )
        if self.warmup_steps and self.lr_schedule == "run":
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} of a task needs lr_schedule cosine or constant; optim.warmup_steps is that of the run"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} must not be negative, and less than the task's steps = {self.steps}")
        try:
            self.modality.check_grid()
        except ValueError as error:
            raise ConfigError("modality", f"modality {error}") from error

    @property
    def mixes(self) -> bool:
        """Whether the examples of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    @property
    def metric(self) -> str:
        """Name of the metric: top1 or mAP."""
        return "mAP" if self.multi_label else "top1"
