"""The vocabulary of a run: `Modality`, `Source`, `Task`, `Model`, `Optim` and `Train`, as frozen dataclasses.

A record only states what is wanted. `__post_init__` checks and never changes; numbers that follow from others are properties.
A field's docstring is its line in `polyvit-fast train NAME --help`.
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
    """Turns media into grids; built once per task and split, called with at most its batch size of samples.

    The result for one sample depends on that sample and its generator alone, never on its neighbours in the batch.
    """

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        """Grids `[sample, view, frames, rows, columns, channels]`, uint8 or float32. Raises on a broken file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Modality(ABC):
    """A kind of input: the grid that a sample becomes, how it is cut into tokens, how files are decoded into it."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int, int, int]:
        """(frames, rows, columns, channels) of one view. An image has one frame; a spectrogram is a picture."""

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
        """Beside grid and tubelet, the fields that say what a token's place means: tasks that share a tokenizer must have them equal."""
        return {}

    @property
    @abstractmethod
    def eval_views(self) -> int:
        """Evenly spaced views of one sample whose logits are averaged in evaluation."""

    def thorough(self) -> Modality:
        """The same, but evaluation sees as much of every file as it can: for checks. This one, when it does so already."""
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of one view, class token included."""
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
        """How many samples there are, for a plan: a source that makes its files makes none for it. Raises as `samples`."""
        return len(self.samples(task))

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: Literal["cpu", "cuda"] = "cpu") -> Decoder | None:
        """A decoder of the source's own, for media that are no files; None: the modality's decoder reads them."""
        return None

    def class_names(self, task: Task) -> tuple[str, ...] | None:
        """The names of classes that this source knows by itself, in the order of their numbers; None: it knows numbers alone."""
        return None

    def describe_classes(self, names: Sequence[str]) -> str:
        """What a message says of `class_names`: where they stand, and how many there are."""
        return f"{self}: it names {len(names)} classes"

    def remarks(self, task: Task) -> list[str]:
        """A sentence for each oddity that is no error but may be a mistake, such as files that were left out; for `check` and `plan`."""
        return []


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that is particular to one dataset. No fact about it stands anywhere else."""

    modality: Modality
    train: Source
    val: Source
    num_classes: int
    """Outputs of this task's head."""
    steps: int
    """U_j: steps that this task has alone; the schedule's weight (the paper's tuned hyper-parameter)."""
    batch: int = 64
    """Examples per step."""
    micro_batches: int = 1
    """Pieces that a batch is computed in, one after the other, to fit memory; the gradient is the same mean."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross-entropy, mean over the batch. sigmoid: binary cross-entropy, summed over classes, mean over the batch."""
    multi_label: bool = False
    """Whether an example may have any number of classes; then the metric is mAP instead of accuracy."""
    lr_scale: float = 1.0
    """c_j: multiplies the learning rate on this task's steps."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that mixes each example with another one of the batch; 0 switches it off."""
    mixup_pairs: Literal["neighbours", "reversed"] = "neighbours"
    """Which: neighbours: 0 with 1, 2 with 3 …, the same pairs on any number of processes; reversed: the first with the last …, each process
    within its own part of the batch, as the paper's code does on each device. Micro-batches change no pair."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes."""
    drop_path_rate: float = 0.0
    """Chance to skip a residual branch in the last block; falls linearly to 0 in the first."""
    zero_head: bool = False
    """Start this task's head at zero, as the paper's code does for videos and sounds, whose trunk is trained before; else by LeCun's normal
    law, as there for images, and by which the demo, whose trunk is not, learns faster."""

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
        """Name of the number that this task is judged by."""
        return "mAP" if self.multi_label else "top1"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shared Vision Transformer."""

    dim: int = 768
    """Width of a token."""
    depth: int = 12
    """Transformer blocks that an input passes, adaptors included."""
    num_heads: int = 12
    """Attention heads."""
    mlp_dim: int = 3072
    """Width of the MLP's hidden layer."""
    num_adaptor_layers: int = 0
    """L_adapt: how many of the blocks belong to each modality alone, before the shared ones."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """tanh: as the paper's JAX code; erf: exact, as timm and Hugging Face ViT."""
    dropout: float = 0.0
    """After the positions, the attention projection and both MLP layers."""
    rescale_drop_path: bool = False
    """Divide kept residual branches by their chance to be kept (timm does, the paper's code does not)."""

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
    """One optimizer over all tasks."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: momentum, as in the paper; adamw: for training from scratch."""
    lr: float = 1.0
    """Peak learning rate, before a task's lr_scale."""
    warmup_steps: int = 0
    """Steps, of the sum of all tasks' steps, over which the rate rises linearly; then a cosine lowers it to the end of the run. A schedule
    with fewer updates, such as accumulating, has the same share of them."""
    momentum: float = 0.9
    """Of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    eps: float = 1e-8
    """Of adamw."""
    weight_decay: float = 0.0
    """Decoupled for adamw, added to the gradient for sgd; weight matrices only, not biases, norms, positions, class tokens."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient over all parameters; 0 switches clipping off."""
    clip: Literal["mean", "process"] = "mean"
    """Which gradient is clipped under torchrun. mean: that of the whole batch; process: each process's own before they are averaged, as the
    paper's code does for videos and sounds; then the result depends on the number of processes. One process: the same."""
    accumulate: Literal["mean", "sum"] = "mean"
    """How an update from several tasks joins their gradients. mean: as if one task had them all, so that rate and clip_norm mean what they
    mean for one; sum: as many times larger as there are tasks. Where clipping acts, sgd moves alike by both; adamw always nearly does."""
    absent: Literal["auto", "coast", "rest"] = "auto"
    """What heads and tokenizers do in an update that has no gradient for them. coast: theirs is zero, so that their moments fade and still
    move them, and weight decay goes on, as in the paper's code; rest: nothing of them changes, as if their tasks were trained alone. auto:
    coast with sgd, rest with adamw, which else moves the head of a task that has one of N updates sqrt(N) times as far for each of them,
    decays it N times as much, and learned a third of the demo worse."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights and evaluate that; 0 switches it off."""

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
        """Whether absent parameters rest."""
        return self.absent == "rest" or (self.absent == "auto" and self.name == "adamw")


StepPlan = list[tuple[str, ...]]
"""The tasks of every step, known before step 0: one name, or several whose gradients are averaged."""
Schedule = Callable[["Train"], StepPlan]
"""A rule that turns a configuration into a step plan."""


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
    """Split parameters, gradients and optimizer state over the processes (FSDP2), for models too large for one GPU. Excludes --capture."""
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
    """Which task each step trains: task-by-task, alternating, uniform, weighted or accumulating. An experiment file may also
    give a function Train -> list of task tuples."""
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
        self._check_shared_modalities()

    def _check_shared_modalities(self) -> None:
        first: dict[str, str] = {}
        for name, task in self.tasks.items():
            other = first.setdefault(task.modality.name, name)
            ours, theirs = _tokenizer_settings(task.modality), _tokenizer_settings(self.tasks[other].modality)
            for setting in theirs | ours:
                if ours.get(setting) != theirs.get(setting):
                    raise ValueError(
                        f"tasks {other} and {name} share the modality {task.modality.name}, hence one tokenizer, but {other} has "
                        f"{setting} = {theirs.get(setting)} and {name} has {ours.get(setting)}; make them equal"
                    )

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities in use, each once, by name: the record of the first task that has it."""
        found: dict[str, Modality] = {}
        for task in self.tasks.values():
            found.setdefault(task.modality.name, task.modality)
        return found

    @property
    def keeps_rounded(self) -> bool:
        """Whether each update writes the parameters in bf16 too. A CPU rounds them at each use, and FSDP gathers them in fp32."""
        return self.precision == "bf16" and self.device != "cpu" and not self.distributed.sharded

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out)


def _tokenizer_settings(modality: Modality) -> dict[str, object]:
    """What tasks of one tokenizer must have equal: their mean and std may differ."""
    return {"grid": modality.grid, "tubelet": modality.tubelet} | modality.shared_settings
