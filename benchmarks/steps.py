"""Whole training steps, forward, loss, backward and update, by ours and by other libraries, as groups of the harness."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import peers
import torch
from harness import TIME_STEPS, Group, Runner, count_flops, release_memory
from machine import DEVICE, HAS_GPU
from ported import Build, PortedModel, port
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvit_fast.config import ComputeOptions, Model, Optim, Task, Train
from polyvit_fast.model.cost import forward_flops
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import CapturedStep
from polyvit_fast.train.feed import InputBuffers
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.step import Step

LR = 1e-4
LOSS_TOLERANCE = 0.02
"""How far a candidate's losses in its first two steps may be from ours, relatively: bf16 stays within 0.01."""


@dataclass(kw_only=True)
class Trainer:
    """A model in training. `step` is one whole step, in which it computes `flops`; `loss` reads the loss of the last one."""

    step: Callable[[], object]
    loss: Callable[[], float]
    flops: float
    note: str = ""
    peak_gib: float | None = None
    """The device memory that it took, where its maker measured that."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A model on one task's batch; the dtype of our residual stream on a GPU."""

    model: Model
    task: Task
    residual: Literal["fp32", "bf16"] = "fp32"

    @property
    def config(self) -> Train:
        """A run of this task alone."""
        found = config_of(self.model, {"task": self.task})
        return replace(found, compute=ComputeOptions(residual=self.residual)) if HAS_GPU else found


def config_of(model: Model, tasks: dict[str, Task]) -> Train:
    """A run as it is compared: AdamW without decay, no clipping, bf16 on a GPU."""
    optim = Optim(name="adamw", lr=LR, clip_norm=0.0)
    return Train(tasks=tasks, model=model, optim=optim, device=DEVICE.type, precision="bf16" if HAS_GPU else "fp32")


def group_of(
    title: str, amount: float, unit: str, trainers: Mapping[str, Callable[[], Trainer] | str], tolerance: float = LOSS_TOLERANCE
) -> Group:
    """Steps that handle `amount` `unit`s each. Whose first two losses are not those of the first to enter is refused."""
    expected: list[float] = []

    def build(make: Callable[[], Trainer]) -> Runner:
        with Footprint() as footprint:
            trainer = make()
            losses = first_losses(trainer)
        expected.extend([] if expected else losses)
        assert_equal_losses(losses, expected, tolerance)
        peak = footprint.gib if trainer.peak_gib is None else trainer.peak_gib
        return Runner(run=trainer.step, flops=trainer.flops, describe=partial(_describe, trainer, peak))

    builders = {name: make if isinstance(make, str) else partial(build, make) for name, make in trainers.items()}
    return Group(title=title, amount=amount, unit=unit, candidates=builders, timer=TIME_STEPS)


def _describe(trainer: Trainer, peak_gib: float | None, seconds: float) -> dict[str, Any]:
    """Memory, and the ratio of a step that Python takes to queue it."""
    host = seconds_on_host(trainer.step) if HAS_GPU else None
    return {"note": trainer.note, "peak_gib": peak_gib, "host_ratio": host and host / seconds}


def seconds_on_host(run: Callable[[], object]) -> float:
    """How long Python needs to queue a step on a GPU that has nothing else to do."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(times)


def first_losses(trainer: Trainer) -> list[float]:
    """Of two steps: the second shows the first update."""
    losses = []
    for _ in range(2):
        trainer.step()
        losses.append(trainer.loss())
    return losses


def assert_equal_losses(found: Sequence[float], expected: Sequence[float], tolerance: float = LOSS_TOLERANCE) -> None:
    """ValueError unless each loss is as near to the expected one as that, relatively."""
    if not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(found, expected, strict=True)):  # nor is a NaN near
        texts = [" and ".join(f"{loss:.4g}" for loss in losses) for losses in (found, expected)]
        raise ValueError(f"its losses are {texts[0]}, those of the first candidate {texts[1]}")


class Footprint:
    """Inside, the device memory that the process takes is watched: `gib` is the most, beyond what it held before; None on a CPU."""

    gib: float | None = None

    def __enter__(self) -> "Footprint":
        if HAS_GPU:
            release_memory()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_reserved()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if HAS_GPU:
            torch.cuda.synchronize()
            self.gib = (torch.cuda.max_memory_reserved() - self._before) / 2**30


def make_batch(task: Task) -> tuple[Tensor, Tensor]:
    """A grid and labels on the device: bytes for colours, numbers of the given mean and standard deviation for spectrograms."""
    generator = torch.Generator(DEVICE).manual_seed(0)
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
    step = Step(deepcopy(model).train(), config)
    batches = {name: make_batch(task) for name, task in config.tasks.items()}
    buffers = InputBuffers(config, {name: grid.dtype for name, (grid, _) in batches.items()}, DEVICE)
    steps = CapturedStep(step, buffers, [(name,) for name in config.tasks]) if captured else step

    def fill(name: str) -> None:
        inputs, (grid, labels) = buffers.view(name, 0), batches[name]
        inputs.grid.copy_(grid)
        inputs.labels.copy_(labels)

    def run() -> None:
        for name in batches:
            if len(batches) > 1:  # the buffer holds one task's batch at a time
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


def our_trainers_apart(config: Train, model: PolyViT, *, captured: bool) -> Trainer:
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


def peer_trainer(
    case: StepCase,
    build: Build,
    ours: PolyViT,
    *,
    backend: SDPBackend | None,
    compiled: bool = False,
    captured: bool = False,
    pure: bool = False,
) -> Trainer:
    """Another library's model with our weights, torch's fused AdamW, SDPA's backend pinned.

    With `captured`, what is compiled is replayed from CUDA graphs, as ours is. A `pure` one is all in bf16, its weights and their moments
    too, without autocast.
    """
    grid, labels = make_batch(case.task)
    ported = port(build, ours, case.model, case.task, grid)
    if pure:
        ported = PortedModel(ported.module.bfloat16(), ported.pixels.bfloat16())
    mode = "reduce-overhead" if captured else None
    call = torch.compile(ported.module, dynamic=False, mode=mode) if compiled else ported.module
    optimizer = torch.optim.AdamW(ported.module.parameters(), lr=LR, weight_decay=0.0, fused=True)
    last = torch.zeros((), device=DEVICE)

    def forward(call: Callable[[Tensor], object], pixels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU and not pure):
            return ported.logits(call, pixels)

    def run() -> None:
        if captured:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is needed any more
        with nullcontext() if backend is None else sdpa_kernel(backend):
            optimizer.zero_grad(set_to_none=True)
            loss = LOSSES[case.task.loss](forward(call, ported.pixels), labels, case.task.label_smoothing)
            loss.backward()
            optimizer.step()
            last.copy_(loss.detach())

    with torch.no_grad():
        example_flops = count_flops(lambda: forward(ported.module, ported.pixels[:1]))
    note = "" if backend is None else peers.name_backend(backend)
    return Trainer(step=run, loss=last.item, flops=3 * case.task.batch * example_flops, note=note)


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
                TIME_STEPS(run, 3)
                return median(TIME_STEPS(run, 7))
        except RuntimeError:  # it has no kernel for this
            return float("inf")

    return min(peers.BACKENDS.values(), key=seconds)
