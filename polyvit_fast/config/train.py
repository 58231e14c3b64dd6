"""A training run: `Train`, which holds all other records."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyvit_fast.config.modality import Modality
from polyvit_fast.config.model import Model
from polyvit_fast.config.optim import Optim
from polyvit_fast.config.options import ComputeOptions, DataOptions, DistributedOptions, LogOptions
from polyvit_fast.config.record import ConfigError, Record, check_range
from polyvit_fast.config.task import MOST_STEPS, Task

StepPlan = list[tuple[str, ...]]
"""The tasks of every step of a run: one name, or several that make one update together."""
Schedule = Callable[["Train"], StepPlan]
"""Makes the step plan of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Train(Record):
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
    init: Annotated[str | dict[str, str], tyro.conf.arg(constructor=str, metavar="SOURCE|PART=SOURCE,...")] = ""
    """Trained weights that a new run starts from: a run folder (runs/mine, runs/mine@best), a file or folder of timm, Hugging Face,
    torchvision or JAX, or a name on Hugging Face's hub. PART=SOURCE,... takes each part from a source of its own: a modality, a task (for
    its head) or trunk, which is the first modality's if it is not named. Empty: random weights."""
    init_positions: Literal["bilinear", "bicubic"] = "bilinear"
    """How position embeddings of another grid are resized. bilinear: between aligned corners, as the paper's code; bicubic: as timm."""
    init_tubelets: Literal["central", "average"] = "central"
    """How a picture's tokenizer becomes one for videos. central: the tubelet's middle frame gets its weights, the others zeros, as in the
    paper's code; average: each frame gets an equal part."""
    out: str = ""
    """Run folder. Empty: runs/NAME. This path, like all others, starts from the folder in which the command runs, if it is relative."""
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
                raise ConfigError("tasks", f"task name {name!r} may hold letters, digits, - and _ only")
        if (steps := sum(task.steps for task in self.tasks.values())) > MOST_STEPS:
            raise ConfigError("tasks", f"tasks have {steps:,} steps together: a run has at most {MOST_STEPS:,}")
        check_range(self, f"[{-(2**63)}, {2**63 - 1}]", "seed")
        if self.data.decoding == "gpu" and self.device == "cpu":
            raise ValueError("--decoding gpu needs --device cuda; leave it auto")
        if self.compute.attention != "auto" and self.device == "cpu":
            raise ValueError(f"--attention {self.compute.attention} needs --device cuda; leave it auto")
        if self.compute.residual == "bf16" and self.precision == "fp32":
            raise ValueError("--residual bf16 needs --precision bf16; leave it fp32")
        if self.distributed.sharded and self.optim.clip == "process":
            raise ValueError("--optim.clip process needs each process's whole gradient, which --sharded never has; leave one of them off")
        self._check_tokenizers()
        self._check_init()

    def _check_init(self) -> None:
        parts = ["trunk", *self.modalities, *self.tasks]
        unknown = [part for part in self.init_parts if part and part not in parts]
        if unknown:
            raise ValueError(f"init names the part {unknown[0]!r}; there are {', '.join(parts)}")

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

    def only(self, names: Collection[str]) -> Train:
        """This run with some of its tasks alone: the baseline of each by itself, say. It has a run folder of its own.

        The schedule plans as many steps as these tasks have, and the warm-up takes the same fraction of them. Raises ValueError for a name
        that no task has.
        """
        unknown = [name for name in names if name not in self.tasks]
        if unknown or not names:
            what = f"there is no task {', '.join(unknown)}" if unknown else "no task is named"
            raise ValueError(f"--only: {what}; there are {', '.join(self.tasks)}")
        tasks = {name: task for name, task in self.tasks.items() if name in names}
        before, now = (sum(task.steps for task in some.values()) for some in (self.tasks, tasks))
        optim = replace(self.optim, warmup_steps=-(-self.optim.warmup_steps * now // before))
        out = self.out and f"{self.out}-only-{'-'.join(tasks)}"
        return replace(self, tasks=tasks, optim=optim, init=self._find_init(tasks), out=out)

    def _find_init(self, tasks: dict[str, Task]) -> str | dict[str, str]:
        """What these tasks begin with in this run: the same trunk, even where the modality that it comes from is left out."""
        parts = self.init_parts
        if "" in parts or not parts:
            return self.init
        first = next((part for part in parts if part in self.modalities), None)
        trunk = {"trunk": parts[first]} if first else {}
        left = {"trunk", *tasks, *(task.modality.name for task in tasks.values())}
        return {part: source for part, source in (trunk | parts).items() if part in left}

    @property
    def init_parts(self) -> dict[str, str]:
        """The source of each part that `init` names; that of the whole model under ""."""
        if isinstance(self.init, dict):
            return self.init
        pairs = [[text.strip() for text in pair.partition("=")] for pair in self.init.split(",")]
        if all(part and source for part, _, source in pairs):
            return {part: source for part, _, source in pairs}
        return {"": self.init} if self.init else {}

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
    own = {name: getattr(modality, name) for name in ("grid", "tubelet", "token_stride", "num_class_tokens", "pool", "positions")}
    return own | modality.shared_settings
