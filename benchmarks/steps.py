"""Whole training steps: forward, loss, backward and update, by ours and by others, raced against one another."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import card
import peers
import torch
from card import DEVICE, HAS_GPU
from race import Group, Lane, release, time_steps, told
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from twins import Build, Twin, twin_of

from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.model.cost import forward_flops
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import CapturedStep
from polyvit_fast.train.feed import InputBuffers
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.step import Step

LR = 1e-4
FURTHEST_LOSS = 0.02
"""How far a contender's losses in its first two steps may be from ours, relatively: bf16 is within 0.01."""


@dataclass(kw_only=True)
class Trainer:
    """A model in training. `step` is one whole step; `loss` reads the loss of the last one; `flops` are those that a step computes."""

    step: Callable[[], object]
    loss: Callable[[], float]
    flops: float
    note: str = ""
    peak_gib: float | None = None
    """The device memory that it took, where its maker measured that."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A step and who makes it; one that is a string is not there, for that reason. The first is ours.

    A step handles `amount` `unit`s.
    """

    title: str
    amount: float
    unit: str
    contenders: Mapping[str, Callable[[], Trainer] | str]
    furthest: float = FURTHEST_LOSS
    """How far losses may be from those of the first, relatively."""

    def enter(self, direction: str, names: set[str]) -> Group:
        """Of `names`, those that run and have the losses of the first in their first two steps."""
        trainers, absent = train_two_steps({name: way for name, way in self.contenders.items() if name in names}, self.furthest)
        lanes = [Lane(name=name, run=trainer.step) for name, trainer in trainers.items()]
        return Group(
            title=self.title, lanes=lanes, absent=absent, watch=time_steps, info=lambda lane: self._info(lane, trainers[lane.name])
        )

    def _info(self, lane: Lane, trainer: Trainer) -> dict[str, object]:
        seconds, host, peak = median(lane.seconds), seconds_on_host(lane.run) if HAS_GPU else None, card.peak_flops(card.name())
        return {
            "kind": "step",
            "amount": self.amount,
            "unit": self.unit,
            "flops": trainer.flops,
            "tflops": trainer.flops / seconds / 1e12,
            "mfu": peak and trainer.flops / seconds / peak,
            "peak_gib": trainer.peak_gib,
            "note": trainer.note,
            "host_seconds": host,
            "host_share": host and host / seconds,
        }


def seconds_on_host(run: Callable[[], object]) -> float:
    """How long Python needs to queue a step on a card that has nothing else to do."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(times)


def train_two_steps(ways: Mapping[str, Callable[[], Trainer] | str], furthest: float) -> tuple[dict[str, Trainer], dict[str, str]]:
    """The trainers whose losses in their first two steps are those of the first, and why the others are absent."""
    trainers: dict[str, Trainer] = {}
    absent: dict[str, str] = {}
    expected: list[float] = []
    for name, way in ways.items():
        if isinstance(way, str):
            absent[name] = way
            continue
        try:
            with Footprint() as footprint:
                trainer = way()
                losses = first_losses(trainer)
            expected = expected or losses
            assert_equal_losses(losses, expected, furthest)
        except Exception as error:
            absent[name] = told(error)
            trainer = None  # its memory is for the next
            continue
        trainer.peak_gib = footprint.gib if trainer.peak_gib is None else trainer.peak_gib
        trainers[name] = trainer
    return trainers, absent


def first_losses(trainer: Trainer) -> list[float]:
    """Of two steps: the second shows the first update."""
    losses = []
    for _ in range(2):
        trainer.step()
        losses.append(trainer.loss())
    return losses


def assert_equal_losses(found: Sequence[float], expected: Sequence[float], furthest: float = FURTHEST_LOSS) -> None:
    """ValueError unless each loss is as near to the expected one as that, relatively."""
    # A NaN is not near.
    if not all(abs(a - b) <= furthest * abs(b) for a, b in zip(found, expected, strict=True)):
        raise ValueError(f"its losses are {_told(found)}, those of the first contender {_told(expected)}")


def _told(losses: Sequence[float]) -> str:
    return " and ".join(f"{loss:.4g}" for loss in losses)


class Footprint:
    """Inside, the device memory that the process takes is watched: `gib` is the most, beyond what it held before; None on a CPU."""

    gib: float | None = None

    def __enter__(self) -> "Footprint":
        if HAS_GPU:
            release()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_reserved()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if HAS_GPU:
            torch.cuda.synchronize()
            self.gib = (torch.cuda.max_memory_reserved() - self._before) / 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on one task's batch."""

    model: Model
    task: Task
    seed: int = 0
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of ours, on a GPU."""

    @property
    def config(self) -> Train:
        """A run of this task alone. Nothing is clipped, as the others clip nothing."""
        found = run_of(self.model, {"task": self.task})
        return replace(found, residual=self.residual) if HAS_GPU else found

    @property
    def nominal_flops(self) -> float:
        """Of a step of the whole model, all tokens through all blocks."""
        return 3 * self.task.batch * nominal_flops(self.model, self.task)


def run_of(model: Model, tasks: dict[str, Task]) -> Train:
    """A run as it is compared: AdamW without decay, no clipping, bf16 on a GPU."""
    optim = Optim(name="adamw", lr=LR, clip_norm=0.0)
    return Train(tasks=tasks, model=model, optim=optim, device=DEVICE.type, precision="bf16" if HAS_GPU else "fp32")


def nominal_flops(model: Model, task: Task) -> float:
    """Operations of one example's forward pass when every token goes through every block, as in all other libraries."""
    tokens = task.modality.num_tokens
    frames, rows, columns = task.modality.tubelet
    block = tokens * model.dim * (4 * model.dim + 2 * model.mlp_dim) + 2 * tokens**2 * model.dim
    patches = (tokens - 1) * frames * rows * columns * task.modality.grid[3] * model.dim
    return 2.0 * (model.depth * block + patches + model.dim * task.num_classes)


def batch_of(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A grid and labels on the device: bytes for colours, numbers of the given mean and deviation for spectrograms."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape, common = (task.batch, *task.modality.grid), {"generator": generator, "device": DEVICE}
    mean, std = (torch.tensor(values, device=DEVICE) for values in task.modality.normalisation)
    if task.modality.name == "audio":
        grid = torch.randn(shape, **common) * std + mean
    else:
        grid = torch.randint(0, 256, shape, dtype=torch.uint8, **common)
    if task.multi_label:
        return grid, (torch.rand(task.batch, task.num_classes, **common) < 0.01).float()
    return grid, torch.randint(0, task.num_classes, (task.batch,), **common)


def our_trainer(config: Train, model: PolyViT, *, captured: bool) -> Trainer:
    """Our step on one batch of each task of `config`, one update after each; the losses are added up."""
    model = deepcopy(model).train()
    step = Step(model, config)
    batches = {name: batch_of(task) for name, task in config.tasks.items()}
    buffers = InputBuffers(config, {name: grid.dtype for name, (grid, _) in batches.items()}, DEVICE)
    steps = CapturedStep(step, buffers, [(name,) for name in config.tasks]) if captured else step

    def fill(name: str) -> None:
        inputs, (grid, labels) = buffers.view(name, 0), batches[name]
        inputs.grid.copy_(grid)
        inputs.labels.copy_(labels)

    def run() -> None:
        for name in batches:
            if len(batches) > 1:  # the slot holds one task's batch at a time
                fill(name)
            steps.begin((name,), LR, 1)
            steps.forward_backward(name, buffers.view(name, 0))
            steps.update()

    def loss() -> float:
        found = step.counters[:, 0].sum().item()
        step.counters.zero_()
        return found

    fill(next(iter(batches)))
    flops = sum(3 * task.batch * forward_flops(config.model, task.modality, task.num_classes) for task in config.tasks.values())
    return Trainer(step=run, loss=loss, flops=flops)


def peer_trainer(
    case: Case, build: Build, ours: PolyViT, *, compiled: bool, backend: SDPBackend | None, recorded: bool = False, pure: bool = False
) -> Trainer:
    """Another library's model with our weights, torch's fused AdamW, SDPA's backend pinned.

    With `recorded`, what is compiled is replayed from CUDA graphs, as ours is. A `pure` one is all in bf16, its weights and their moments
    too, without autocast.
    """
    grid, labels = batch_of(case.task)
    twin = twin_of(build, ours, case.model, case.task, grid)
    if pure:
        twin = Twin(twin.module.bfloat16(), twin.pixels.bfloat16())
    mode = "reduce-overhead" if recorded else None
    call = torch.compile(twin.module, dynamic=False, mode=mode) if compiled else twin.module
    optimizer = torch.optim.AdamW(twin.module.parameters(), lr=LR, weight_decay=0.0, fused=True)
    last = torch.zeros((), device=DEVICE)

    def run() -> None:
        if recorded:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is needed any more
        with nullcontext() if backend is None else sdpa_kernel(backend):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU and not pure):
                logits = twin.logits(call, twin.pixels)
            loss = LOSSES[case.task.loss](logits, labels, case.task.label_smoothing)
            loss.backward()
            optimizer.step()
            last.copy_(loss.detach())

    note = "" if backend is None else peers.backend_name(backend)
    return Trainer(step=run, loss=last.item, flops=case.nominal_flops, note=note)


def fastest_backend(model: Model, task: Task) -> SDPBackend | None:
    """Which of SDPA's backends takes the least time there and back for the model's attention on this task; None on a CPU."""
    if not HAS_GPU:
        return None
    shape = (task.batch, task.modality.num_tokens, model.num_heads, model.head_dim)
    q, k, v, upstream = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def run() -> None:
        torch.autograd.grad(functional.scaled_dot_product_attention(*leaves), leaves, upstream)

    def seconds(backend: SDPBackend) -> float:
        try:
            with sdpa_kernel(backend):
                lane = Lane(name="", run=run)
                time_steps(lane, 3)
                return median(time_steps(lane, 7))
        except RuntimeError:  # it has no kernel for this
            return float("inf")

    return min(peers.BACKENDS.values(), key=seconds)


def apart(config: Train, model: PolyViT, *, captured: bool) -> Trainer:
    """Each task of `config` by a model of its own, one step of each after the other; the memory is that of the largest."""
    trainers, peaks = [], []
    for name, task in config.tasks.items():
        with Footprint() as footprint:
            own = PolyViT.from_config(replace(config, tasks={name: task}))
            own.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in own.state_dict()})
            trainers.append(our_trainer(replace(config, tasks={name: task}), own.to(DEVICE), captured=captured))
            first_losses(trainers[-1])
        peaks.append(footprint.gib)
    return Trainer(
        step=lambda: [trainer.step() for trainer in trainers],
        loss=lambda: sum(trainer.loss() for trainer in trainers),
        flops=sum(trainer.flops for trainer in trainers),
        peak_gib=max(peaks) if HAS_GPU else None,
    )
