"""The whole training loop with its data: examples a second, MFU, and how much of the time the device waits for data.

Run: pytest benchmarks/bench_train.py. Each task alone, and all of them mixed in one run; from the demo's files, and from batches that were
made once, which shows what the loop itself costs. The numbers are those of the run's own metrics.jsonl, without its first line.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pytest
import torch
from harness import OURS, Row
from machine import DEVICE, HAS_GPU
from torch import Tensor

from polyvit_fast.config import MODELS, DataOptions, Decoder, LogOptions, Modality, Source, Task, Train
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.video.modality import Video
from polyvit_fast.experiments import demo
from polyvit_fast.media import Media, Sample
from polyvit_fast.model.cost import forward_flops
from polyvit_fast.train.loop import train

MIXED, FILES, MADE = "mixed", "files", "made once"
STEPS, LOG_EVERY_STEPS = (40, 10) if HAS_GPU else (4, 2) if machine.IS_TINY else (30, 5)
NUM_FILES = 1024 if HAS_GPU else 64
NUM_VAL_FILES = 12


@dataclass(frozen=True, kw_only=True)
class Made(Source):
    """Grids that are made once for all batches."""

    num_samples: int

    def samples(self, task: Task) -> Sequence[Sample]:
        """Media that name their number, of all classes in turn."""
        return [Sample(Media(f"made:{index}"), (index % task.num_classes,)) for index in range(self.num_samples)]

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: str = "cpu") -> Decoder:
        """Bytes for colours, fp32 for spectrograms."""
        views = 1 if train else task.modality.eval_views
        shape, generator = (batch, views, *task.modality.grid), np.random.default_rng(0)
        if task.modality.name == "audio":
            grids = torch.from_numpy(generator.standard_normal(shape, np.float32))
        else:
            grids = torch.from_numpy(generator.integers(0, 256, shape, np.uint8))

        def decode(media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
            return grids[: len(media)]

        return decode


def large_tasks() -> dict[str, Task]:
    """On the demo's files, in the sizes of ViT-B's usual inputs."""

    def task(name: str, modality: Modality, batch: int) -> Task:
        return replace(demo.config.tasks[name], modality=modality, batch=batch)

    return {
        "shapes": task("shapes", Image(size=224), 256),
        "motion": task("motion", Video(frames=32, stride=1, tubelet_frames=4), 32),
        "tones": task("tones", Audio(clip_seconds=8.0, channels=1), 128),
    }


def config_of(tasks: Mapping[str, Task], data: str, folder: Path, files: Path) -> Train:
    """A run of `STEPS` steps for each task, evaluated on a few samples at its end, as every run is."""

    def source(of: Source, num_samples: int) -> Source:
        return Made(num_samples=num_samples) if data == MADE else replace(of, num_samples=num_samples, root=str(files))  # pyright: ignore[reportCallIssue]

    made = {
        name: replace(task, steps=STEPS, train=source(task.train, NUM_FILES), val=source(task.val, NUM_VAL_FILES))
        for name, task in tasks.items()
    }
    return Train(
        tasks=made,
        model=MODELS["B"] if HAS_GPU else demo.config.model,
        optim=demo.config.optim,
        out=str(folder),
        device=DEVICE.type,
        precision="bf16" if HAS_GPU else "fp32",
        data=DataOptions(num_threads=8 if HAS_GPU else 2),
        log=LogOptions(log_every_steps=LOG_EVERY_STEPS),
    )


@dataclass(frozen=True)
class Speed:
    """Of an interval, or of several: examples, seconds, seconds of these without data, operations."""

    examples: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(*(getattr(self, name) + getattr(other, name) for name in ("examples", "seconds", "waited", "flops")))

    def describe(self) -> dict[str, Any]:
        """What the table says after the rate."""
        note = f"waits for data {self.waited / self.seconds:.1%} of the time"
        return {"mfu": machine.compute_mfu(self.flops, self.seconds), "data_wait_ratio": self.waited / self.seconds, "note": note}


def read_speeds(config: Train, lines: Sequence[Mapping[str, Any]]) -> list[Speed]:
    """Of each line of training in a run's metrics.jsonl but the first, in which everything starts."""
    found = []
    for line in [line for line in lines if line["kind"] == "train"][1:]:
        total = Speed()
        for name, row in line["tasks"].items():
            task = config.tasks[name]
            examples = row["steps"] * task.batch
            seconds = examples / row["examples_per_second"]
            flops = 3 * examples * forward_flops(config.model, task.modality, task.num_classes)
            total += Speed(examples, seconds, row["data_wait_ratio"] * seconds, flops)
        found.append(total)
    return found


TASKS: Callable[[], dict[str, Task]] = large_tasks if HAS_GPU else (lambda: demo.config.tasks)
ALONE = ["shapes", "motion", "tones"]
CASES = [(name, data) for data in (MADE, FILES) for name in (MIXED, *ALONE)]  # in the order in which they begin, should time run out
CASES = CASES[:1] if machine.IS_TINY else CASES


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize(("name", "data"), CASES)
def test_train(benchmark, keep, files, tmp_path, name, data):
    if data == FILES and not machine.is_installed("nvidia.dali"):
        pytest.skip("nvidia.dali is not installed")
    tasks = TASKS()
    config = config_of(tasks if name == MIXED else {name: tasks[name]}, data, tmp_path / "run", files)
    benchmark.group = f"{name}, {data}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(train, (config, "benchmark", []))
    found = read_speeds(config, [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()])
    info = sum(found, Speed()).describe() | {"device": machine.find_name(), "versions": machine.find_versions()}
    benchmark.extra_info.update(candidate=OURS, **info)
    seconds = [one.seconds / one.examples for one in found]
    keep([Row(group=benchmark.group, candidate=OURS, amount=1, unit="examples", seconds=seconds, info=info)])
