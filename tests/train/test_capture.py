"""What can be tested without a GPU; test_captured_gpu.py tests the rest."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from capturable import META, check_capturable
from capturable import on_meta as on_meta  # a fixture
from long_forms import every
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import capture, list_graphs
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.feed import InputBuffers
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.schedule import make_step_plan
from polyvit_fast.train.step import Step
from tests.train.distributed.test_reducer import Sent


def test_one_graph_for_each_task():
    plan = [("a",), ("b",), ("a",), ("c", "a")]
    assert list_graphs(plan, is_reduced=False) == [("a", True), ("b", True), ("c", True)]


def test_where_processes_sum_their_gradients_the_last_of_a_step_is_another_graph():
    assert list_graphs([("a", "b", "c")] * 3, is_reduced=True) == [("a", False), ("b", False), ("c", True)]
    assert list_graphs([("a", "b"), ("a",), ("b", "a")], is_reduced=True) == [("a", False), ("a", True), ("b", False), ("b", True)]


def test_recomputed_dropout_is_not_captured_and_that_is_reported():
    config = tiny_config(recompute=True)
    config = replace(config, model=replace(config.model, dropout=0.1))
    step, said = Step(PolyViT.from_config(config), config), []
    buffers = InputBuffers(config, dict.fromkeys(config.tasks, torch.float32), torch.device("cpu"))
    assert capture(step, buffers, make_step_plan(config), said.append) is step
    assert len(said) == 1
    assert "recompute = True with dropout" in said[0]


MODEL = Model(dim=32, depth=2, num_heads=2, mlp_dim=64)
OPTIONS = {"mixup": 0.4, "cutmix": 1.0, "micro_batches": 2, "label_smoothing": 0.1, "drop_path_rate": 0.2}
LABELS = [("softmax", False), ("sigmoid", False), ("sigmoid", True)]
STEPS = {
    f"{loss} {'of several' if multi_label else 'of one'} {' '.join(options)}".rstrip(): {
        "tasks": {"a": tile_task(loss=loss, multi_label=multi_label, **{option: OPTIONS[option] for option in options})}
    }
    for (loss, multi_label), options in product(LABELS, [(), *((option,) for option in OPTIONS), tuple(OPTIONS)])
} | {
    "sgd": {"optim": Optim(name="sgd", lr=0.1, weight_decay=0.1, clip_norm=0.0)},
    "sgd ema": {"optim": Optim(name="sgd", lr=0.1, ema_decay=0.9)},
    "adamw ema": {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9)},
    "sgd rest": {"optim": Optim(name="sgd", lr=0.1, absent="rest")},
    "adamw coast": {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9, absent="coast")},
    "frozen front": {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9, freeze=("tokenizers.*", "blocks.0.*"))},
    "frozen in between": {"optim": Optim(name="sgd", lr=0.1, freeze=("*.attn.*", "norm.*", "tokenizers.tile.weight"))},
    "rates by layer": {"optim": Optim(name="adamw", lr=0.1, layer_decay=0.8)},
    "summed": {"optim": Optim(accumulate="sum")},
    "mixed with the reversed batch": {"tasks": {"a": tile_task(mixup=0.4, mixup_pairs="reversed", micro_batches=2)}},
    "recompute": {"recompute": True, "tasks": {"a": tile_task(drop_path_rate=0.2)}},
    "dropout adaptors erf": {"model": replace(MODEL, dropout=0.1, num_adaptor_layers=1, gelu="erf")},
}


def step_on_meta(changes) -> tuple[Step, InputBuffers]:
    run = tiny_config(**({"model": MODEL} | changes))
    object.__setattr__(run, "device", "meta")  # which no user may ask for
    return Step(PolyViT.from_config(run).train(), run), InputBuffers(run, dict.fromkeys(run.tasks, torch.uint8), META)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("changes", every(2, STEPS.values()), ids=STEPS)
def test_a_step_can_be_captured(changes):
    step, buffers = step_on_meta(changes)
    with check_capturable():
        step.begin(tuple(step.config.tasks), 0.1, 0)
        for index in (0, 1):
            for name in step.config.tasks:  # all of one update, as an accumulating schedule has it
                step.forward_backward(name, buffers.view(name, index))
            step.update()
        step.skip_update()
        step.watch_counters()
        step.read_counters()


def test_the_steps_above_have_all_losses_and_optimizers():
    assert {loss for loss, _ in LABELS} == LOSSES.keys()


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("own_clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_over_processes_can_be_captured(monkeypatch, precision, own_clip_norm):
    sent = Sent(monkeypatch)
    step, buffers = step_on_meta({})
    step.reducer = Reducer(step.parameters, precision, own_clip_norm)
    with check_capturable():
        for name, last in (("a", False), ("b", True)):
            step.forward_backward(name, buffers.view(name, 0), last)
        step.update()
    assert sum(tensor.nbytes for tensor in sent.tensors) == step.parameters.grads.numel() * {"fp32": 4, "bf16": 2}[precision]
