"""A tiny run on real files of all modalities, trained once: one task with pictures, one with clips, two with sounds."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import polyvit_fast as pf
from polyvit_fast import experiments
from polyvit_fast.config import Train
from polyvit_fast.config.model import Model
from polyvit_fast.experiments.demo import CLIP
from polyvit_fast.media import Sample

NUM_VAL = 14  # no multiple of a batch


@dataclass(frozen=True)
class TinyRun:
    folder: Path
    config: Train

    def samples(self, task: str) -> list[Sample]:
        """The validation samples of a task."""
        record = self.config.tasks[task]
        return list(record.val.samples(record))

    def files(self, task: str) -> list[str]:
        """Their paths."""
        return [sample.media.path for sample in self.samples(task)]


def tiny_demo(files: Path) -> Train:
    """The demo with few files and steps, three views of a clip, and a moving average of the weights."""
    demo, tasks = experiments.load("demo"), {}
    for name in ("shapes", "motion", "tones", "chords"):
        task = demo.tasks[name]
        sources = {
            split: replace(getattr(task, split), num_samples=number, root=str(files)) for split, number in (("train", 24), ("val", NUM_VAL))
        }
        tasks[name] = replace(task, **sources, steps=3, batch=8, micro_batches=2)
    tasks["motion"] = replace(tasks["motion"], modality=replace(CLIP, eval_crops=3, flip=True))
    optim = replace(demo.optim, warmup_steps=0, ema_decay=0.9)
    return replace(
        demo, tasks=tasks, model=Model(dim=32, depth=2, num_heads=2, mlp_dim=64), optim=optim, out="", device="cpu", precision="fp32"
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> TinyRun:
    """The run, trained from Python."""
    home = tmp_path_factory.mktemp("tiny")
    config = tiny_demo(home / "files")
    outcome = pf.train(config, out=home / "run")
    assert (outcome.step, outcome.signal) == (12, 0)
    return TinyRun(home / "run", config)


@pytest.fixture(scope="session")
def model(run) -> pf.TrainedModel:
    """Its model."""
    return pf.load(run.folder)
