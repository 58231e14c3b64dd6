"""What only a GPU can tell of the captured step: that it is the eager one, waits for nothing, and takes no more memory than it must."""

import gc
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from tiny_runs import change
from torch import nn

from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import Loader, prefetch, request_batches
from polyvit_fast.data.video.modality import Video
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import CapturedStep, capture
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.feed import InputBuffers, feed, pin
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.log import Log
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.schedule import LearningRates, make_step_plan
from polyvit_fast.train.step import Step

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

MODEL = Model(dim=128, depth=3, num_heads=2, mlp_dim=256)
CUDA = torch.device("cuda")


def task(modality, **changes) -> Task:
    sources = {"train": Synthetic(num_samples=100), "val": Synthetic(num_samples=40, seed=1)}
    return Task(**({"modality": modality, "num_classes": 10, "steps": 25, "batch": 16} | sources | changes))


def config(**changes) -> Train:
    tasks = {
        "pictures": task(Image(size=64)),
        "clips": task(Video(size=32, short_side=32, frames=8), batch=8, loss="sigmoid", multi_label=True),
    }
    of = Train(tasks=tasks, model=MODEL, optim=Optim(name="adamw", lr=1e-3), device="cuda", precision="bf16")
    return change(of, **changes)


class Trained:
    """A run without its folder: `go` makes the plan's steps from `done` on."""

    def __init__(self, run: Train, *, captured: bool) -> None:
        self.config, self.plan, self.done = run, make_step_plan(run), 0
        self.rates = LearningRates(run, self.plan)
        self.step = Step(PolyViT.from_config(run).cuda().train(), run)
        self.loaders = {name: Loader(name, run, train=True) for name in run.tasks}
        dtypes = {name: loader.grid_dtype() for name, loader in self.loaders.items()}
        self.buffers = InputBuffers(run, dtypes, CUDA)
        self.steps = CapturedStep(self.step, self.buffers, self.plan) if captured else self.step
        jobs = request_batches(self.loaders, self.plan, 0)
        self.inputs = feed(prefetch(pin(jobs), depth=4, timeout_seconds=60), self.buffers)

    def go(self, num_steps: int) -> None:
        for number in range(self.done, self.done + num_steps):
            names = self.plan[number]
            self.steps.begin(names, self.rates[number], number, self.rates.weigh(number))
            for number, _ in enumerate(names, 1):
                name, inputs = next(self.inputs)
                self.steps.forward_backward(name, inputs, last=number == len(names))
            self.steps.update()
        self.done += num_steps


MIXED = {
    "pictures": task(Image(size=64), cutmix=1.0, mixup=0.4, micro_batches=2, lr_schedule="cosine", warmup_steps=5),
    "clips": task(Video(size=32, short_side=32, frames=8), batch=8, cutmix=1.0, loss_weight=0.5),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp32"},
        {"schedule": "accumulating"},
        {"optim": Optim(name="sgd", lr=0.05, ema_decay=0.9, weight_decay=1e-3)},
        {"optim": Optim(name="adamw", lr=1e-3, ema_decay=0.9, weight_decay=1e-3, absent="coast")},
        {"schedule": "accumulating", "optim": Optim(name="sgd", lr=0.05, accumulate="sum", absent="rest")},
        {"model": replace(MODEL, dropout=0.1, num_adaptor_layers=1)},
        {"recompute": True, "tasks": {"pictures": task(Image(size=64), drop_path_rate=0.3, mixup=0.4, micro_batches=2, steps=50)}},
        {
            "optim": Optim(
                name="adamw", lr=1e-3, ema_decay=0.9, freeze=("tokenizers.video.*", "blocks.0.*", "*.fc1.weight"), layer_decay=0.8
            )
        },
        {"schedule": "accumulating", "tasks": MIXED},
    ],
    ids=[
        "weighted",
        "fp32",
        "accumulating",
        "sgd-ema",
        "adamw-ema-coast",
        "sgd-summed-rest",
        "dropout-adaptors",
        "recompute-drop-path-mixup-micro",
        "frozen-rates-by-layer",
        "accumulating-cutmix-own-schedule",
    ],
)
def test_captured_and_eager_have_the_same_weights_after_fifty_steps(changes):
    run = config(**changes)
    num_steps = min(50, len(make_step_plan(run)))
    eager, captured = (Trained(run, captured=captured) for captured in (False, True))
    eager.go(num_steps)
    captured.go(num_steps)
    start = PolyViT.from_config(run).state_dict()
    for name, ours in captured.step.parameters.state_dict().items():
        assert torch.equal(ours, eager.step.parameters.state_dict()[name]), name
        assert name not in start or torch.equal(ours.cpu(), start[name]) == (name in captured.step.parameters.frozen), name
    ours, theirs = (made.step.read_counters().wait() for made in (captured, eager))
    assert ours == theirs


@pytest.mark.parametrize("captured", [True, False])
def test_ten_steps_wait_for_nothing(captured):
    made = Trained(config(), captured=captured)
    made.go(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.go(10)
        watched = made.step.watch_counters()
        reading = made.step.read_counters()
        made.go(2)
        reading.is_ready(), watched.is_ready()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reading.wait()["pictures"].steps > 0
    assert reading.wait() == watched.wait()


def test_a_non_finite_batch_is_skipped_inside_the_graph_and_counted():
    made = Trained(config(), captured=True)
    made.go(3)
    before = made.step.parameters.values.clone()
    inputs = made.buffers.view("pictures", 0)
    inputs.grid.fill_(torch.nan)
    inputs.labels.zero_()  # for another task's batch may lie there, with classes that this one does not have
    for number in (3, 4):
        made.steps.begin(("pictures",), 0.1, number)
        made.steps.forward_backward("pictures", inputs)
        made.steps.update()
    assert torch.equal(made.step.parameters.values, before)
    assert not made.step.parameters.grads.any()
    row = made.step.read_counters().wait()["pictures"]
    assert (row.skipped, row.skipped_in_a_row, row.last_skipped_step) == (2, 2, 4)
    made.go(2)
    assert not torch.equal(made.step.parameters.values, before)
    assert made.step.parameters.values.isfinite().all()


class Asking(nn.Module):
    """A head that asks the device for a number, as no captured step may."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * (1.0 if x.sum().item() else 0.5)


def test_what_cannot_be_captured_runs_eagerly_after_one_report():
    run = config(model=replace(MODEL, dropout=0.1))
    model = PolyViT.from_config(run)
    model.heads["clips"] = Asking(model.heads["clips"])
    step, said = Step(model.cuda().train(), run), []
    buffers = InputBuffers(run, dict.fromkeys(run.tasks, torch.float32), CUDA)
    before = step.parameters.values.clone()
    assert capture(step, buffers, make_step_plan(run), said.append) is step
    assert len(said) == 1
    assert "task clips" in said[0]
    assert torch.equal(step.parameters.values, before)
    for name in run.tasks:
        step.begin((name,), 1e-3, 0)
        step.forward_backward(name, buffers.view(name, 0))
        step.update()
    assert not torch.equal(step.parameters.values, before)
    assert step.parameters.values.isfinite().all()


def run_folder(run: Train, folder, **changes):
    return train(change(run, out=str(folder), **changes), "test", ["test"])


def test_a_whole_run_is_the_same_with_and_without_capture(tmp_path):
    run = config(log_every_steps=10, save_every_steps=20)
    for name, changes in {"captured": {}, "eager": {"capture": False}}.items():
        assert run_folder(run, tmp_path / name, **changes).step == 50
    folders = [checkpoint.find_newest(tmp_path / name) for name in ("captured", "eager")]
    captured, eager = (found.load_tensors("model") for found in folders if found)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)
    rows = [json.loads(line) for line in (tmp_path / "captured" / "metrics.jsonl").read_text().splitlines()]
    waits = [row["data_wait_ratio"] for line in rows if line["kind"] == "train" for row in line["tasks"].values()]
    assert waits
    assert all(0 <= wait <= 1 for wait in waits)


def test_a_captured_run_resumes_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    run = config(optim=Optim(name="adamw", lr=1e-3, ema_decay=0.9))
    run_folder(run, tmp_path / "straight")
    tick = Log.tick

    def tick_and_stop(log: Log, done: int, names) -> None:
        tick(log, done, names)
        if done == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "tick", tick_and_stop)
    assert run_folder(run, tmp_path / "resumed").step == 20
    monkeypatch.setattr(Log, "tick", tick)
    assert run_folder(run, tmp_path / "resumed").step == 50
    straight, resumed = (checkpoint.find_newest(tmp_path / name) for name in ("straight", "resumed"))
    for kind in ("model", "optimizer", "ema"):
        ours, theirs = resumed.load_tensors(kind), straight.load_tensors(kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def peak_bytes(run: Train) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    made = Trained(run, captured=True)
    made.go(2)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def test_nine_tasks_need_hardly_more_memory_than_the_largest_of_them():
    pictures = Image(size=224)
    tasks = {f"pictures{i}": task(pictures, batch=64 + 8 * i, steps=2, num_classes=100 + i) for i in range(8)}
    tasks["clips"] = task(Video(size=224, frames=16), batch=16, steps=2)
    run = config(tasks=tasks, model=Model(dim=384, depth=6, num_heads=6, mlp_dim=1536))
    largest = max(peak_bytes(replace(run, tasks={name: tasks[name]})) for name in ("pictures7", "clips"))
    assert peak_bytes(run) <= 1.1 * largest


@pytest.fixture
def transport():
    """NCCL with this process alone: sums are what they were, but they travel."""
    torch.distributed.init_process_group(
        "nccl", init_method="tcp://127.0.0.1:29531", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    # NCCL waits for captured graphs with its work in them, which a failed test's traceback would keep.
    for name in ("last_traceback", "last_value", "last_exc", "last_type"):
        vars(sys).pop(name, None)
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_over_processes_can_be_captured(transport, precision):
    run = config(schedule="accumulating")
    alone, made = (Trained(run, captured=False) for _ in range(2))
    made.step.reducer = Reducer(made.step.parameters, precision)
    made.steps = CapturedStep(made.step, made.buffers, made.plan)
    for trained in (alone, made):
        trained.go(3)
    difference = (made.step.parameters.values - alone.step.parameters.values).abs().max()
    assert difference <= (0.0 if precision == "fp32" else 5e-3)
