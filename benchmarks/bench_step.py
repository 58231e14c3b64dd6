"""A whole training step on one batch: forward, loss, backward, update; ours against timm's ViT and Hugging Face's ViT, ViViT and AST.

Run: pytest benchmarks/bench_step.py. All start from the same weights (asserted: logits, and the losses of two steps), have AdamW and no
clipping, and get their batch on the device: ours as bytes, the others normalised. Peers have torch's fused AdamW and SDPA with the
backend pinned that is fastest for this attention. Ours is recorded as a CUDA graph unless it is called eager, and so is the model of a peer
that is compiled to reduce overhead, which the smallest models, whose launches take as long as their kernels, are held against; on a CPU all
run eagerly. A residual stream of bf16 is held against a peer that is all in bf16: its weights and moments too, and so it loses updates that
are smaller than a weight's rounding. MFU counts what is computed: ours computes the last block for the class token alone, which is all that
the head reads. Memory is what the process takes from the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import peers
import pytest
import twins
from card import DEVICE, HAS_GPU
from problem import OURS, STEP
from steps import FURTHEST_LOSS, Case, Contest, Trainer, apart, fastest_backend, our_trainer, peer_trainer, run_of
from twins import Build

from polyvit_fast.config import MODELS, Modality, Model, Task
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.video.modality import Video
from polyvit_fast.model.polyvit import PolyViT

OURS_EAGER = "ours eager"
TIMM, VIT, VIVIT, AST, APART = "timm", "HF ViT", "HF ViViT", "HF AST", "each task alone"
PURE = "all in bf16"
BUILDS: dict[str, Build] = {
    TIMM: twins.timm_vit,
    VIT: twins.hugging_face_vit,
    VIVIT: twins.hugging_face_vivit,
    AST: twins.hugging_face_ast,
}
NOT_ON_A_CPU = "left out on a CPU"


def task_of(modality: Modality, batch: int, num_classes: int = 1000, **changes) -> Task:
    """A task whose files nobody reads."""
    return Task(modality=modality, train=Synthetic(), val=Synthetic(), num_classes=num_classes, steps=1, batch=batch, **changes)


def vit(size: str, batch: int, residual: Literal["fp32", "bf16"] = "fp32") -> Case:
    return Case(model=replace(MODELS[size], gelu="erf"), task=task_of(Image(size=224), batch), residual=residual)


def vivit_b() -> Case:
    return Case(model=MODELS["B"], task=task_of(Video(frames=32, tubelet_frames=2), 16, 400))


def ast_b() -> Case:
    """1,212 patches, as many as AST's overlapping ones of ten seconds."""
    sound = Audio(clip_seconds=16.16, num_mel_bins=192, channels=1)
    return Case(model=replace(MODELS["B"], gelu="erf"), task=task_of(sound, 64, 527, loss="sigmoid", multi_label=True))


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """A model, and who is compared, in the order in which they begin, should time run out."""

    title: str
    case: Callable[[], Case]
    contenders: tuple[str, ...]
    unit: str
    furthest: float = FURTHEST_LOSS

    def contest(self) -> Contest:
        """All of them on one batch and from one model's weights."""
        case = self.case()
        ways = ways_of(case, PolyViT.from_config(case.config).to(DEVICE))
        chosen = {name: ways[name] if HAS_GPU or name in (OURS, *BUILDS) else NOT_ON_A_CPU for name in self.contenders}
        amount = case.task.batch
        return Contest(title=self.title, amount=amount, unit=self.unit, contenders=chosen, furthest=self.furthest)


def ways_of(case: Case, model: PolyViT) -> dict[str, Callable[[], Trainer]]:
    """All ways to make the step, should the libraries have this model."""
    ours, backend = partial(our_trainer, case.config, model), fastest_backend(case.model, case.task)
    ways: dict[str, Callable[[], Trainer]] = {
        OURS: partial(ours, captured=HAS_GPU),
        OURS_EAGER: partial(ours, captured=False),
    }
    for library, build in BUILDS.items():
        for name, pure in ((library, False), (f"{library} {PURE}", True)):
            peer = partial(peer_trainer, case, build, model, backend=backend, pure=pure)
            ways[name] = partial(peer, compiled=False)
            ways[f"{name} {peers.COMPILED}"] = partial(peer, compiled=True)
            ways[f"{name} {peers.RECORDED}"] = partial(peer, compiled=True, recorded=True)
    return ways


@dataclass(frozen=True, kw_only=True)
class CoTraining:
    """One model on all tasks, a step of each after the other, against a model for each."""

    title: str
    model: Model
    tasks: Callable[[], dict[str, Task]]
    contenders = (OURS, APART)

    def contest(self) -> Contest:
        """Both on the same batches and from the same weights."""
        tasks = self.tasks()
        config = run_of(self.model, tasks)
        shared = PolyViT.from_config(config).to(DEVICE)
        return Contest(
            title=self.title,
            amount=sum(task.batch for task in tasks.values()),
            unit="examples",
            contenders={
                OURS: partial(our_trainer, config, shared, captured=HAS_GPU),
                APART: partial(apart, config, shared, captured=HAS_GPU),
            },
            furthest=math.inf,  # here a task's step changes the weights for the next
        )


def nine_tasks() -> dict[str, Task]:
    """Those of PolyViT's nine datasets, with batches so small that a model for each fits beside the others."""
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


def vits(size: str, batch: int, contenders: tuple[str, ...]) -> Rivals:
    title = f"ViT-{size}/16 224, batch {batch}"
    return Rivals(title=title, case=partial(vit, size, batch), contenders=contenders, unit="images")


def narrow_vit() -> Rivals:
    title, library = "ViT-B/16 224, batch 256, bf16 residual", f"{TIMM} {PURE}"
    case = partial(vit, "B", 256, "bf16")
    return Rivals(title=title, case=case, contenders=usual(library), unit="images", furthest=math.inf)  # the peer's weights hardly move


def dropping_vit() -> Rivals:
    def case() -> Case:
        usual_case = vit("B", 256)
        model, task = replace(usual_case.model, rescale_drop_path=True), replace(usual_case.task, drop_path_rate=0.1)
        return replace(usual_case, model=model, task=task)

    contenders = (OURS, f"{TIMM} {peers.COMPILED}")
    # Each drops other branches, so losses differ.
    return Rivals(title="ViT-B/16 224, batch 256, drop path 0.1", case=case, contenders=contenders, unit="images", furthest=math.inf)


ON_A_GPU: tuple[Rivals | CoTraining, ...] = (  # in the order in which they begin, should time run out
    vits("B", 256, usual(TIMM)),
    narrow_vit(),
    vits("S", 256, usual(TIMM, f"{TIMM} {peers.RECORDED}")),
    vits("L", 128, usual(TIMM)),
    Rivals(title="ViViT-B 32×224, batch 16", case=vivit_b, contenders=usual(VIVIT), unit="clips"),
    Rivals(title="AST-B 1212, batch 64", case=ast_b, contenders=usual(AST), unit="sounds"),
    dropping_vit(),
    CoTraining(title="PolyViT-B, nine tasks", model=MODELS["B"], tasks=nine_tasks),
    vits("Ti", 256, usual(TIMM, f"{TIMM} {peers.RECORDED}")),
)
ON_A_CPU: tuple[Rivals | CoTraining, ...] = (
    vits("Ti", 4, (OURS, VIT, TIMM)),
    CoTraining(title="PolyViT-Ti, three tasks", model=MODELS["Ti"], tasks=three_small_tasks),
)
ENTRIES = [
    pytest.param(rivals, contender, id=f"{rivals.title}, {contender}")
    for rivals in (ON_A_GPU if HAS_GPU else ON_A_CPU)
    for contender in rivals.contenders
]


@pytest.mark.parametrize(("rivals", "contender"), ENTRIES)
def test_step(report, rivals, contender):
    report(STEP, contender, rivals.contest)
