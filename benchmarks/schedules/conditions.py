"""What is compared: `Condition`s of the experiment `schedules`, and the `RunSpec`s of each stage and form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from polyvit_fast import experiments
from polyvit_fast.config import ComputeOptions, DataOptions, LogOptions, Train

Stage = Literal["sweep", "table", "knobs", "transfer"]
STAGES: tuple[Stage, ...] = ("sweep", "table", "knobs", "transfer")
SCHEDULES = ("task-by-task", "alternating", "uniform", "weighted", "accumulating")
OWN_COSINES = "task-by-task, own cosines"
EVALUATE_EVERY = {"task-by-task": 200, OWN_COSINES: 200}
"""Steps between evaluations on val: of task-by-task, steps that every task's are a multiple of. Others: a quarter of the run."""


@dataclass(frozen=True)
class Condition:
    """A way to train, which the table has a line for."""

    name: str
    schedule: str
    tasks: tuple[str, ...] = ()
    """Those that are trained; none: all."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    absent: Literal["auto", "coast", "rest"] = "auto"
    accumulate: Literal["mean", "sum"] = "mean"
    has_own_cosines: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The peak learning rates that the sweep tries."""
        return (0.03, 0.1, 0.3) if self.optimizer == "sgd" else (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Form:
    """How large the comparison is."""

    seeds: int
    steps_ratio: float
    """Of the experiment's steps."""
    stages: tuple[Stage, ...]
    sweeps: bool
    """Whether rates are chosen by sweeps of this form; otherwise they are those that the full form's committed results chose."""
    knob_seeds: int = 3


FORMS = {
    "tiny": Form(seeds=1, steps_ratio=0.02, stages=("table",), sweeps=False),
    "small": Form(seeds=2, steps_ratio=0.5, stages=("table", "transfer"), sweeps=False),
    "full": Form(seeds=5, steps_ratio=1.0, stages=STAGES, sweeps=True),
}


@dataclass(frozen=True)
class RunSpec:
    """One run."""

    stage: Stage
    condition: Condition
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its file of results, within the folder of its stage."""
        condition = self.condition.name.replace(", ", "-").replace(" ", "-")
        some = "" if condition.endswith("alone") or not self.condition.tasks else f"-of-{'-'.join(self.condition.tasks)}"
        return f"{condition}{some}-lr{self.rate:g}-seed{self.seed}"


def load_experiment() -> Train:
    """The experiment with all its tasks."""
    return experiments.load("schedules")


def list_conditions(stage: Stage, names: Sequence[str]) -> list[Condition]:
    """The conditions of a stage, of the tasks with these names."""
    tasks = load_experiment().tasks
    some = tuple(names) if len(names) < len(tasks) else ()  # where the data of some are missing
    schedules = [Condition(schedule, schedule, some) for schedule in SCHEDULES]
    main = [*schedules, Condition(OWN_COSINES, "task-by-task", some, has_own_cosines=True)]
    singles = [Condition(f"{name} alone", "weighted", tasks=(name,)) for name in names]
    knobs = [
        Condition("weighted, adamw, coast", "weighted", some, absent="coast"),
        Condition("weighted, sgd, rest", "weighted", some, optimizer="sgd", absent="rest"),
        Condition("weighted, sgd, coast", "weighted", some, optimizer="sgd", absent="coast"),
        Condition("accumulating, adamw, sum", "accumulating", some, accumulate="sum"),
        Condition("accumulating, sgd, mean", "accumulating", some, optimizer="sgd"),
        Condition("accumulating, sgd, sum", "accumulating", some, optimizer="sgd", accumulate="sum"),
    ]
    modalities = {"images alone": "image", "videos alone": "video", "sounds alone": "audio"}
    trunks = [
        Condition(label, "weighted", tasks=tuple(name for name in names if tasks[name].modality.name == modality))
        for label, modality in modalities.items()
    ]
    trunks = [trunk for trunk in trunks if trunk.tasks]
    return {"sweep": [*main, *singles, *knobs], "table": [*main, *singles], "knobs": knobs, "transfer": trunks}[stage]


def list_runs(form: Form, stage: Stage, names: Sequence[str], best: Mapping[str, float]) -> Iterator[RunSpec]:
    """The runs of a stage. `best` has the rate of each condition that was swept; others have the first that a sweep tries."""
    for condition in list_conditions(stage, names):
        if stage == "sweep":
            yield from (RunSpec(stage, condition, 0, rate) for rate in condition.rates)
            continue
        # A trunk of one modality is trained as the weighted run is.
        rate = best.get("weighted" if stage == "transfer" else condition.name, condition.rates[0])
        # The sweep's runs have seed 0, and its choice must not favour those that it has seen.
        for seed in range(1, 1 + (form.knob_seeds if stage == "knobs" else form.seeds)):
            yield RunSpec(stage, condition, seed, rate)


def build_config(spec: RunSpec, form: Form, device: str) -> Train:
    """The configuration of a run, on one thread of a CPU so that as many run at once as there are cores."""
    config = load_experiment()
    condition = spec.condition
    tasks = {name: replace(task, steps=max(1, round(task.steps * form.steps_ratio))) for name, task in config.tasks.items()}
    warmup_ratio = config.optim.warmup_steps / sum(task.steps for task in config.tasks.values())
    if condition.has_own_cosines:
        tasks = {name: replace(task, lr_schedule="cosine", warmup_steps=round(warmup_ratio * task.steps)) for name, task in tasks.items()}
    warmup_steps = round(config.optim.warmup_steps * form.steps_ratio)
    optim = replace(
        config.optim,
        name=condition.optimizer,
        lr=spec.rate,
        warmup_steps=warmup_steps,
        absent=condition.absent,
        accumulate=condition.accumulate,
        weight_decay=config.optim.weight_decay if condition.optimizer == "adamw" else 1e-4,
    )
    config = replace(config, tasks=tasks, optim=optim, schedule=condition.schedule, seed=spec.seed)
    config = config.only(condition.tasks) if condition.tasks else config
    num_steps = sum(task.steps for task in config.tasks.values())
    updates = num_steps // len(config.tasks) if condition.schedule == "accumulating" else num_steps
    every = round(EVALUATE_EVERY.get(condition.name, 0) * form.steps_ratio) or -(-updates // 4)
    return replace(
        config,
        device=device,
        precision="auto" if device == "cuda" else "fp32",
        compute=ComputeOptions(compute_threads=1),
        data=DataOptions(num_threads=1),
        log=LogOptions(log_every_steps=100, eval_every_steps=every if spec.stage == "table" else 0, save_every_steps=500, keep=1),
    )
