"""What can be told without a GPU; test_captured_gpu.py tells the rest."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from recordable import META, recording
from recordable import on_meta as on_meta  # a fixture
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import capture, recordings
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.feed import Slots
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.schedule import make_step_plan
from polyvit_fast.train.step import Step
from tests.train.distributed.test_reducer import Sent


def test_one_recording_for_each_task():
    plan = [("a",), ("b",), ("a",), ("c", "a")]
    assert recordings(plan, is_reduced=False) == [("a", True), ("b", True), ("c", True)]


def test_where_processes_sum_their_gradients_the_last_of_a_step_is_another_recording():
    assert recordings([("a", "b", "c")] * 3, is_reduced=True) == [("a", False), ("b", False), ("c", True)]
    assert recordings([("a", "b"), ("a",), ("b", "a")], is_reduced=True) == [("a", False), ("a", True), ("b", False), ("b", True)]


def test_recomputed_dropout_is_not_recorded_and_that_is_told():
    config = tiny_config(recompute=True)
    config = replace(config, model=replace(config.model, dropout=0.1))
    step, said = Step(PolyViT.from_config(config), config), []
    slots = Slots(config, dict.fromkeys(config.tasks, torch.float32), torch.device("cpu"))
    assert capture(step, slots, make_step_plan(config), said.append) is step
    assert len(said) == 1
    assert "recompute = True with dropout" in said[0]


MODEL = Model(dim=32, depth=2, num_heads=2, mlp_dim=64)
PARTS = {"mixup": 0.4, "micro_batches": 2, "label_smoothing": 0.1, "drop_path_rate": 0.2}
LABELS = [("softmax", False), ("sigmoid", False), ("sigmoid", True)]
STEPS = {
    f"{loss} {'of several' if multi_label else 'of one'} {' '.join(parts)}".rstrip(): {
        "tasks": {"a": tile_task(loss=loss, multi_label=multi_label, **{part: PARTS[part] for part in parts})}
    }
    for (loss, multi_label), parts in product(LABELS, [(), *((part,) for part in PARTS), tuple(PARTS)])
} | {
    "sgd": {"optim": Optim(name="sgd", lr=0.1, weight_decay=0.1, clip_norm=0.0)},
    "sgd ema": {"optim": Optim(name="sgd", lr=0.1, ema_decay=0.9)},
    "adamw ema": {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9)},
    "sgd rest": {"optim": Optim(name="sgd", lr=0.1, absent="rest")},
    "adamw coast": {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9, absent="coast")},
    "summed": {"optim": Optim(accumulate="sum")},
    "mixed with the reversed batch": {"tasks": {"a": tile_task(mixup=0.4, mixup_pairs="reversed", micro_batches=2)}},
    "recompute": {"recompute": True, "tasks": {"a": tile_task(drop_path_rate=0.2)}},
    "dropout adaptors erf": {"model": replace(MODEL, dropout=0.1, num_adaptor_layers=1, gelu="erf")},
}


def step_on_meta(changes) -> tuple[Step, Slots]:
    run = tiny_config(**({"model": MODEL} | changes))
    object.__setattr__(run, "device", "meta")  # which no user may ask for
    return Step(PolyViT.from_config(run).train(), run), Slots(run, dict.fromkeys(run.tasks, torch.uint8), META)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_a_step_can_be_recorded(changes):
    step, slots = step_on_meta(changes)
    with recording():
        step.begin(tuple(step.config.tasks), 0.1, 0)
        for slot in (0, 1):
            for name in step.config.tasks:  # all of one update, as an accumulating schedule has it
                step.forward_backward(name, slots.inputs(name, slot))
            step.update()
        step.refuse()
        step.read_counters()


def test_the_steps_above_have_all_losses_and_optimizers():
    assert {loss for loss, _ in LABELS} == LOSSES.keys()


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("own_clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_over_processes_can_be_recorded(monkeypatch, precision, own_clip_norm):
    sent = Sent(monkeypatch)
    step, slots = step_on_meta({})
    step.reducer = Reducer(step.parameters, precision, own_clip_norm)
    with recording():
        for name, last in (("a", False), ("b", True)):
            step.forward_backward(name, slots.inputs(name, 0), last)
        step.update()
    assert sum(tensor.nbytes for tensor in sent.tensors) == step.parameters.grads.numel() * {"fp32": 4, "bf16": 2}[precision]
