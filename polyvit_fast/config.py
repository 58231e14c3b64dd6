"""The configuration of a run: `Train`, its `Task`s with their `Modality` and `Source`s, `Model`, `Optim` and four groups of options.

All are frozen dataclasses. `__post_init__` checks values and never changes them; numbers that follow from others are properties.
A field's docstring is its text in `polyvit-fast train NAME --help`, where a new line in the docstring begins a new line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import tyro
from torch import Tensor

from polyvit_fast.media import Media, Sample


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


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
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
class Task:
    """One dataset: its samples, and how the model is trained and evaluated on it."""

    modality: Modality
    train: Source
    val: Source
    num_classes: int
    """Number of classes: outputs of the task's head."""
    steps: int
    """The paper's U_j: steps on this task with the schedules weighted and task-by-task. Their sum over all tasks is the run's length."""
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
    mixup: float = 0.0
    """Mixup: alpha of the Beta distribution of the weight with which two examples of a batch are mixed. 0: off."""
    mixup_pairs: Literal["neighbours", "reversed"] = "neighbours"
    """Which two examples are mixed. Micro-batches do not matter.
    neighbours: 0 with 1, 2 with 3 and so on. The pairs do not depend on the number of processes.
    reversed: the first with the last and so on, within the part of the batch that a process has, as in the paper's code."""
    label_smoothing: float = 0.0
    """Fraction of each target that is spread evenly over all classes."""
    drop_path_rate: float = 0.0
    """Stochastic depth: probability of skipping a residual branch of the last block. It falls linearly to 0 at the first block."""
    zero_head: bool = False
    """Initialise the task's head with zeros, as the paper's code does for videos and sounds, which start from a pretrained model.
    Otherwise LeCun's normal distribution, as in the paper's code for images: training from random weights is faster with it."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "steps", "batch", "micro_batches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.batch % self.micro_batches:
            raise ValueError(f"batch = {self.batch} does not divide into micro_batches = {self.micro_batches}")
        if self.multi_label and self.loss != "sigmoid":
            raise ValueError("multi_label = True needs loss = sigmoid")
        for name in ("label_smoothing", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1)")
        if self.mixup < 0 or self.lr_scale < 0:
            raise ValueError("mixup and lr_scale must not be negative")
        self.modality.check_grid()

    @property
    def metric(self) -> str:
        """Name of the metric: top1 or mAP."""
        return "mAP" if self.multi_label else "top1"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The Vision Transformer that all tasks train."""

    dim: int = 768
    """Width of the tokens (embedding dimension)."""
    depth: int = 12
    """Number of transformer blocks that an input passes through, including adaptor layers."""
    num_heads: int = 12
    """Number of attention heads. Must divide dim."""
    mlp_dim: int = 3072
    """Width of the MLP's hidden layer."""
    num_adaptor_layers: int = 0
    """The first so many blocks are separate for each modality; the others are common to all (the paper's L_adapt)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """tanh: the approximation of the paper's JAX code. erf: exact, as in timm and in Hugging Face's ViT."""
    dropout: float = 0.0
    """Dropout probability after the position embedding, the attention projection and both layers of the MLP."""
    rescale_drop_path: bool = False
    """Divide the residual branches that drop path keeps by their probability of being kept, as timm does. The paper's code does not."""

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.num_heads, self.mlp_dim) <= 0:
            raise ValueError("dim, depth, num_heads and mlp_dim must be at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"dim = {self.dim} does not divide by num_heads = {self.num_heads}")
        if not 0 <= self.num_adaptor_layers <= self.depth:
            raise ValueError(f"num_adaptor_layers = {self.num_adaptor_layers} must lie between 0 and depth = {self.depth}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


MODELS: dict[str, Model] = {  # arXiv 2010.11929, table 1; Ti and S from arXiv 2106.04560, table 2
    "Ti": Model(dim=192, depth=12, num_heads=3, mlp_dim=768),
    "S": Model(dim=384, depth=12, num_heads=6, mlp_dim=1536),
    "B": Model(dim=768, depth=12, num_heads=12, mlp_dim=3072),
    "L": Model(dim=1024, depth=24, num_heads=16, mlp_dim=4096),
}


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer, one for the parameters of all tasks."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: SGD with momentum, as in the paper, for fine-tuning. adamw: for training from random weights."""
    lr: float = 1.0
    """Peak learning rate. A task's lr_scale multiplies it."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; after them a cosine lowers it to 0 at the end of the run.
    They are counted in the sum of all tasks' steps. A schedule with fewer updates, such as accumulating, warms up for the same fraction."""
    momentum: float = 0.9
    """Momentum of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adamw's two moments."""
    eps: float = 1e-8
    """Added to adamw's denominator."""
    weight_decay: float = 0.0
    """Weight decay of the weight matrices, not of biases, norms, position embeddings and class tokens.
    Decoupled from the gradient with adamw, added to it with sgd."""
    clip_norm: float = 1.0
    """Clip the gradient to this global norm over all parameters. 0: off."""
    clip: Literal["mean", "process"] = "mean"
    """Which gradient is clipped under torchrun. With one process both are the same.
    mean: the mean over all processes, which is the gradient of the whole batch.
    process: each process's own gradient before the mean, as the paper's code does for videos and sounds."""
    accumulate: Literal["mean", "sum"] = "mean"
    """How an update over several tasks (schedule accumulating) combines their gradients.
    mean: learning rate and clip_norm then mean the same as for one task.
    sum: larger by the number of tasks. That changes little with adamw, and nothing with sgd in steps whose gradient is clipped."""
    absent: Literal["auto", "coast", "rest"] = "auto"
    """How an update treats parameters of tasks that are not in the step (heads, tokenizers, adaptors).
    coast: their gradient is zero. Momentum still moves them and weight decay goes on, as in the paper's code.
    rest: neither they nor their moments change, as if each task were trained alone.
    auto: coast with sgd, rest with adamw. If it coasted, adamw would move a head that is in one of N updates about sqrt(N) times too far
    for each of them, and decay it N times as much."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated in their stead. 0: off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr = {self.lr} must be positive")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise ValueError("warmup_steps, weight_decay and clip_norm must not be negative")
        for name, value in (("momentum", self.momentum), ("ema_decay", self.ema_decay), *(("betas", beta) for beta in self.betas)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value} must be in [0, 1)")

    @property
    def rests(self) -> bool:
        """Whether parameters without a gradient rest: `absent` with auto resolved."""
        return self.absent == "rest" or (self.absent == "auto" and self.name == "adamw")


StepPlan = list[tuple[str, ...]]
"""The tasks of every step of a run: one name, or several that make one update together."""
Schedule = Callable[["Train"], StepPlan]
"""Makes the step plan of a configuration."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How files are read and decoded."""

    decoding: Literal["auto", "cpu", "gpu"] = "auto"
    """Where files are decoded. auto: on the GPU with --device cuda, else on the CPU. Formats without a GPU decoder always use the CPU."""
    num_threads: int = 2
    """CPU threads that decode files."""
    prefetch: int = 4
    """Batches that are decoded ahead of the step that needs them."""
    decode_timeout_seconds: float = 120.0
    """Stop the run when a batch takes longer than this to decode; the message names the file."""
    max_bad_ratio: float = 0.01
    """Largest fraction of a task's files that may be broken before the run stops. Until then each is replaced by another of the task."""
    changed_files: Literal["refuse", "allow"] = "refuse"
    """Whether a run may resume when training files have changed in size or content since its checkpoint, for example because broken ones
    were repaired."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "num_threads", "prefetch")
        if not 0 <= self.max_bad_ratio <= 1:
            raise ValueError(f"max_bad_ratio = {self.max_bad_ratio} must be in [0, 1]")
        if self.decode_timeout_seconds <= 0:
            raise ValueError(f"decode_timeout_seconds = {self.decode_timeout_seconds} must be positive")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How a step is computed."""

    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision of the residual stream between blocks. bf16 halves its memory and needs --precision bf16."""
    attention: Literal["auto", "cudnn", "flash", "xformers"] = "auto"
    """Attention kernel on a GPU. auto: the fastest one measured for the sequence length. xformers needs `pip install mslk-cuda`."""
    capture: bool = True
    """On a GPU, capture each task's step once as a CUDA graph and replay it, so that launching kernels costs no CPU time."""
    recompute: bool = False
    """Activation checkpointing: keep only each block's input and recompute the rest in the backward pass. Far less memory, about a third
    more time."""
    compute_threads: int = 0
    """CPU threads of PyTorch's operators. 0: one less than there are cores, which leaves one for the decoders."""
    nonfinite_patience: int = 10
    """Stop the run after this many steps in a row with a non-finite loss or gradient. Each of them skips its update."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "nonfinite_patience")
        if self.compute_threads < 0:
            raise ValueError(f"compute_threads = {self.compute_threads} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """How often a run logs, evaluates and saves. All intervals count steps of all tasks together."""

    log_every_steps: int = 20
    """Steps from one log line, with its row of metrics.jsonl and its TensorBoard point, to the next."""
    eval_every_steps: int = 0
    """Steps from one evaluation to the next. 0: only at the end."""
    save_every_steps: int = 500
    """Steps from one checkpoint to the next. One is also saved after each evaluation, at the end and when a signal stops the run."""
    keep: int = 2
    """How many of the newest checkpoints are kept. The best one is kept as well."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "log_every_steps", "save_every_steps", "keep")
        if self.eval_every_steps < 0:
            raise ValueError(f"eval_every_steps = {self.eval_every_steps} must not be negative")


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """How the processes of torchrun work together."""

    sharded: bool = False
    """Split parameters, gradients and optimizer state over the processes (FSDP2), for models too large for one GPU. Turns --capture off."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are all-reduced. bf16 halves the traffic."""


def _check_at_least_one(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) <= 0:
            raise ValueError(f"{name} = {getattr(options, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training run."""

    tasks: dict[str, Task]
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = field(default_factory=ComputeOptions)
    log: tyro.conf.OmitArgPrefixes[LogOptions] = field(default_factory=LogOptions)
    distributed: tyro.conf.OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)
    schedule: Annotated[str | Schedule, tyro.conf.arg(constructor=str, metavar="NAME")] = "weighted"
    """Which task each step trains: task-by-task, alternating, uniform, weighted or accumulating.
    An experiment file may instead give a function that takes a Train and returns the tasks of every step as a list of tuples of names."""
    out: str = ""
    """Run folder. Empty: runs/NAME."""
    seed: int = 0
    """Seed of everything random: initial weights, order of tasks and samples, augmentation, dropout."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model computes. Under torchrun, cuda gives each process one GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and backward under autocast; parameters and optimizer state stay in fp32."""
    resume: bool = True
    """Resume from the newest checkpoint in the run folder, if there is one. The configuration must be the same."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: a run needs at least one")
        for name in self.tasks:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"task name {name!r} may hold letters, digits, - and _ only")
        if self.data.decoding == "gpu" and self.device == "cpu":
            raise ValueError("--decoding gpu needs --device cuda; leave it auto")
        if self.compute.attention != "auto" and self.device == "cpu":
            raise ValueError(f"--attention {self.compute.attention} needs --device cuda; leave it auto")
        if self.compute.residual == "bf16" and self.precision == "fp32":
            raise ValueError("--residual bf16 needs --precision bf16; leave it fp32")
        if self.distributed.sharded and self.optim.clip == "process":
            raise ValueError("--optim.clip process needs each process's whole gradient, which --sharded never has; leave one of them off")
        self._check_tokenizers()

    def _check_tokenizers(self) -> None:
        first: dict[str, str] = {}
        for name, task in self.tasks.items():
            other = first.setdefault(task.modality.name, name)
            ours, theirs = _tokenizer_settings(task.modality), _tokenizer_settings(self.tasks[other].modality)
            for setting in theirs | ours:
                if ours.get(setting) != theirs.get(setting):
                    raise ValueError(
                        f"tasks {other} and {name} have the same modality {task.modality.name}, hence one tokenizer, but {other} has "
                        f"{setting} = {theirs.get(setting)} and {name} has {ours.get(setting)}; make them equal"
                    )

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities in use by name, each as its first task has it."""
        found: dict[str, Modality] = {}
        for task in self.tasks.values():
            found.setdefault(task.modality.name, task.modality)
        return found

    @property
    def keeps_rounded(self) -> bool:
        """Whether each update also writes the parameters in bf16. A CPU rounds them at each use instead; FSDP gathers them in fp32."""
        return self.precision == "bf16" and self.device != "cpu" and not self.distributed.sharded

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out)


def _tokenizer_settings(modality: Modality) -> dict[str, object]:
    """What tasks with the same tokenizer must have in common. Their mean and std may differ."""
    return {"grid": modality.grid, "tubelet": modality.tubelet} | modality.shared_settings
