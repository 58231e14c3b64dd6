"""A whole training step on one batch: forward, loss, backward, update; ours against timm's ViT and Hugging Face's ViT, ViViT and AST.

Run: pytest benchmarks/bench_step.py. All start from the same weights (asserted: logits, and the losses of two steps), have AdamW and no
clipping, and get their batch on the device: ours as bytes, the others normalised. Peers have torch's fused AdamW and SDPA with the backend
pinned that is fastest for this attention. Ours is captured as CUDA graphs unless it is called eager, and so is a peer that is compiled to
reduce overhead, for the smallest models, whose launches take as long as their kernels; on a CPU all run eagerly. The peer of a bf16
residual stream is all in bf16: its weights and moments too, and so it loses updates that are smaller than a weight's rounding. MFU counts
what is computed: ours computes the last block for the class token alone, which is all that the head reads. Memory is what the process takes
from the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import machine
import peers
import ported
import pytest
from harness import OURS, Group, candidate_params
from machine import DEVICE, HAS_GPU
from ported import Build
from steps import LOSS_TOLERANCE, StepCase, Trainer, config_of, fastest_backend, group_of, our_trainer, our_trainers_apart, peer_trainer

from polyvit_fast.config import MODELS, Modality, Model, Task
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.video.modality import Video
from polyvit_fast.model.polyvit import PolyViT

OURS_EAGER, APART = "ours eager", "each task apart"
TIMM, VIT, VIVIT, AST = "timm", "HF ViT", "HF ViViT", "HF AST"
PURE = "all in bf16"
BUILDS: dict[str, Build] = {
    TIMM: ported.timm_vit,
    VIT: ported.hugging_face_vit,
    VIVIT: ported.hugging_face_vivit,
    AST: ported.hugging_face_ast,
}


def task_of(modality: Modality, batch: int, num_classes: int = 1000, **changes) -> Task:
    """A task whose files nobody reads."""
    return Task(modality=modality, train=Synthetic(), val=Synthetic(), num_classes=num_classes, steps=1, batch=batch, **changes)


def vit(size: str, batch: int, residual: Literal["fp32", "bf16"] = "fp32") -> StepCase:
    model = replace(MODELS[size], gelu="erf", depth=2 if machine.IS_TINY else MODELS[size].depth)
    return StepCase(model=model, task=task_of(Image(size=224), batch), residual=residual)


def vit_with_drop_path() -> StepCase:
    case = vit("B", 256)
    return replace(case, model=replace(case.model, rescale_drop_path=True), task=replace(case.task, drop_path_rate=0.1))


def vivit_b() -> StepCase:
    return StepCase(model=MODELS["B"], task=task_of(Video(frames=32, tubelet_frames=2), 16, 400))


def ast_b() -> StepCase:
    """1,212 patches, as many as AST's overlapping ones of ten seconds."""
    sound = Audio(clip_seconds=16.16, num_mel_bins=192, channels=1)
    return StepCase(model=replace(MODELS["B"], gelu="erf"), task=task_of(sound, 64, 527, loss="sigmoid", multi_label=True))


@dataclass(frozen=True, kw_only=True)
class SingleTask:
    """A model on one task, and the candidates in the order in which they begin, should time run out."""

    title: str
    case: Callable[[], StepCase]
    candidates: tuple[str, ...]
    unit: str
    tolerance: float = LOSS_TOLERANCE

    def group(self) -> Group:
        """All of them on one batch and from one model's weights."""
        case = self.case()
        trainers = find_trainers(case, PolyViT.from_config(case.config).to(DEVICE))
        return group_of(self.title, case.task.batch, self.unit, {name: trainers[name] for name in self.candidates}, self.tolerance)


def find_trainers(case: StepCase, model: PolyViT) -> dict[str, Callable[[], Trainer]]:
    """All ways to make the step, should the libraries have this model."""
    ours, backend = partial(our_trainer, case.config, model), fastest_backend(case.model, case.task)
    found: dict[str, Callable[[], Trainer]] = {
        OURS: partial(ours, captured=HAS_GPU),
        OURS_EAGER: partial(ours, captured=False),
    }
    for library, build in BUILDS.items():
        for name, pure in ((library, False), (f"{library} {PURE}", True)):
            peer = partial(peer_trainer, case, build, model, backend=backend, pure=pure)
            found[name] = peer
            found[f"{name} {peers.COMPILED}"] = partial(peer, compiled=True)
            found[f"{name} {peers.REDUCED}"] = partial(peer, compiled=True, captured=True)
    return found


@dataclass(frozen=True, kw_only=True)
class CoTraining:
    """One model on all tasks, a step of each after the other, against a model for each."""

    title: str
    model: Model
    tasks: Callable[[], dict[str, Task]]
    candidates = (OURS, APART)

    def group(self) -> Group:
        """Both on the same batches and from the same weights."""
        tasks = self.tasks()
        config = config_of(self.model, tasks)
        shared = PolyViT.from_config(config).to(DEVICE)
        trainers = {
            OURS: partial(our_trainer, config, shared, captured=HAS_GPU),
            APART: partial(our_trainers_apart, config, shared, captured=HAS_GPU),
        }
        # A task's step changes the shared weights for the next, so that losses differ.
        return group_of(self.title, sum(task.batch for task in tasks.values()), "examples", trainers, math.inf)


def nine_tasks() -> dict[str, Task]:
    """Those of PolyViT's nine datasets, with batches so small that a model for each fits into memory with the others."""
    from polyvit_fast.experiments.polyvit_b16 import config

    return {name: replace(task, batch=task.batch // task.micro_batches // 2, micro_batches=1) for name, task in config.tasks.items()}


def three_small_tasks() -> dict[str, Task]:
    return {
        "pictures": task_of(Image(size=96), 8),
        "clips": task_of(Video(size=64, short_side=64, frames=8), 4),
        "sounds": task_of(Audio(clip_seconds=0.64, num_mel_bins=64), 8),
    }


def usual(library: str, *more: str) -> tuple[str, ...]:
    return (OURS, f"{library} {peers.COMPILED}", *more, library, OURS_EAGER)


def images(title: str, case: Callable[[], StepCase], candidates: tuple[str, ...], tolerance: float = LOSS_TOLERANCE) -> SingleTask:
    return SingleTask(title=title, case=case, candidates=candidates, unit="images", tolerance=tolerance)


VIT_B = "ViT-B/16 224, batch 256"
CASES: tuple[SingleTask | CoTraining, ...] = (  # in the order in which they begin, should time run out
    images(VIT_B, partial(vit, "B", 256), usual(TIMM)),
    images(f"{VIT_B}, bf16 residual", partial(vit, "B", 256, "bf16"), usual(f"{TIMM} {PURE}"), math.inf),  # that peer's weights hardly move
    images("ViT-S/16 224, batch 256", partial(vit, "S", 256), usual(TIMM, f"{TIMM} {peers.REDUCED}")),
    images("ViT-L/16 224, batch 128", partial(vit, "L", 128), usual(TIMM)),
    SingleTask(title="ViViT-B 32×224, batch 16", case=vivit_b, candidates=usual(VIVIT), unit="clips"),
    SingleTask(title="AST-B 1212, batch 64", case=ast_b, candidates=usual(AST), unit="sounds"),
    images(f"{VIT_B}, drop path 0.1", vit_with_drop_path, (OURS, f"{TIMM} {peers.COMPILED}"), math.inf),  # each drops other branches
    CoTraining(title="PolyViT-B, nine tasks", model=MODELS["B"], tasks=nine_tasks),
    images("ViT-Ti/16 224, batch 256", partial(vit, "Ti", 256), usual(TIMM, f"{TIMM} {peers.REDUCED}")),
)
ON_A_CPU: tuple[SingleTask | CoTraining, ...] = (
    images("ViT-Ti/16 224, batch 4", partial(vit, "Ti", 4), (OURS, VIT) if machine.IS_TINY else (OURS, VIT, TIMM)),
    CoTraining(
        title="PolyViT-Ti, three tasks", model=replace(MODELS["Ti"], depth=2) if machine.IS_TINY else MODELS["Ti"], tasks=three_small_tasks
    ),
)


GROUPS = {case.title: (case.group, case.candidates) for case in (CASES if HAS_GPU else ON_A_CPU)}


@pytest.mark.parametrize(("group", "candidate"), candidate_params(GROUPS), indirect=["group"])
def test_step(group, candidate, benchmark):
    group.enter(candidate, benchmark)
