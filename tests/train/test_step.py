from dataclasses import replace
from itertools import product

import pytest
import torch
from long_forms import mark_long
from tiny_runs import tile_task, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from polyvit_fast.config import Optim
from polyvit_fast.data.stream import Batch, Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.feed import Inputs
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.optim import FlatParameters
from polyvit_fast.train.step import Step, reverse, swap_neighbours


def fresh(config):
    return Step(PolyViT.from_config(config), config)


def one_step(step, names, batches, lr=1e-3, number=0):
    step.begin(names, lr, number)
    for name, batch in zip(names, batches, strict=True):
        step.forward_backward(name, Inputs.from_batch(batch))
    step.update()


def gradient_by_autograd(config, batches):
    """Gradient of the mean over tasks of each task's loss, or of their sum, written in one expression."""
    model = PolyViT.from_config(config)
    losses = []
    for name, batch in batches:
        task = config.tasks[name]
        grid, labels = batch.grid.float(), batch.labels
        if task.mixes:
            reverse = task.mixup_pairs == "reversed"
            partners = [len(labels) - 1 - i if reverse else i + 1 - 2 * (i % 2) for i in range(len(labels))]
            if batch.cutmix_box and any(batch.cutmix_box):
                top, left, bottom, right = batch.cutmix_box
                mixed = grid.clone()
                mixed[:, :, top:bottom, left:right] = grid[partners][:, :, top:bottom, left:right]
                grid = mixed
            else:
                grid = batch.mixup_ratio * grid + (1 - batch.mixup_ratio) * grid[partners]
            one_hot = torch.nn.functional.one_hot(labels, task.num_classes).float()
            labels = batch.mixup_ratio * one_hot + (1 - batch.mixup_ratio) * one_hot[partners]
        losses.append(LOSSES[task.loss](model(grid, name), labels, task.label_smoothing))
    (sum(losses) / (len(losses) if config.optim.accumulate == "mean" else 1)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


TASK_CHANGES = (
    {},
    {"micro_batches": 4},
    {"mixup": 0.4},
    {"mixup": 0.4, "micro_batches": 2, "label_smoothing": 0.1},
    {"mixup": 0.4, "mixup_pairs": "reversed"},
    {"mixup": 0.4, "mixup_pairs": "reversed", "micro_batches": 4},
    {"cutmix": 1.0, "micro_batches": 4, "label_smoothing": 0.1},
    {"cutmix": 1.0, "mixup": 0.4, "mixup_pairs": "reversed"},
)


@pytest.mark.parametrize(
    ("changes", "accumulate"),
    mark_long(product(TASK_CHANGES, ["mean", "sum"]), [({}, "sum"), *((TASK_CHANGES[i], "mean") for i in (3, 5, 6))]),
    ids=str,
)
def test_gradient_is_that_of_the_mean_or_sum_over_tasks_and_micro_batches(changes, accumulate):
    tasks = {"a": tile_task(**changes), "b": tile_task(loss="sigmoid", multi_label=True)}
    config = tiny_config(tasks=tasks, optim=Optim(accumulate=accumulate))
    batches = [(name, Loader(name, config, train=True).load(3)) for name in config.tasks]
    step = fresh(config)
    step.begin(tuple(config.tasks), 0.0, 0)
    for name, batch in batches:
        step.forward_backward(name, Inputs.from_batch(batch))
    for name, gradient in step.parameters.unflatten([group.grads for group in step.parameters.groups]).items():
        torch.testing.assert_close(gradient, gradient_by_autograd(config, batches)[name], rtol=1e-4, atol=1e-6)


def accumulated(config, steps=4):
    """Weights after some updates from all tasks."""
    step = fresh(config)
    loaders = {name: Loader(name, config, train=True) for name in config.tasks}
    for number in range(steps):
        one_step(step, tuple(config.tasks), [loader.load(number) for loader in loaders.values()], lr=0.1 / (1 + number), number=number)
    return step.parameters.values


def accumulated_by_torch(config, steps=4):
    """The same in plain PyTorch."""
    model = PolyViT.from_config(config)
    loaders = {name: Loader(name, config, train=True) for name in config.tasks}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for number in range(steps):
        losses = []
        for name, loader in loaders.items():
            batch = loader.load(number)
            losses.append(LOSSES[config.tasks[name].loss](model(batch.grid, name), batch.labels, 0.0))
        stacked = torch.stack(losses)
        (stacked.mean() if config.optim.accumulate == "mean" else stacked.sum()).backward()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return model


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulate", ["mean", "sum"])
def test_several_updates_from_all_tasks_are_those_of_plain_torch(accumulate, clip_norm):
    config = tiny_config(optim=Optim(name="sgd", accumulate=accumulate, clip_norm=clip_norm))
    model = PolyViT.from_config(config)
    step_values = accumulated(config)
    FlatParameters(model).values.copy_(step_values)
    for ours, theirs in zip(model.parameters(), accumulated_by_torch(config).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_where_clipping_acts_sum_and_mean_move_alike():
    def apart(clip_norm: float) -> float:
        mean, summed = (accumulated(tiny_config(optim=Optim(name="sgd", accumulate=how, clip_norm=clip_norm))) for how in ("mean", "sum"))
        return float((mean - summed).norm() / mean.norm())

    assert apart(0.1) < 1e-5
    assert apart(0.0) > 0.01


def test_a_step_of_one_task_is_the_same_by_sum_and_mean(config):
    batch = Loader("a", config, train=True).load(0)
    steps = [fresh(replace(config, optim=Optim(name="sgd", accumulate=how))) for how in ("mean", "sum")]
    for step in steps:
        one_step(step, ("a",), [batch], lr=0.1)
    assert torch.equal(steps[0].parameters.values, steps[1].parameters.values)


def test_one_process_clips_alike_before_and_after_the_mean(config):
    found = [accumulated(replace(config, optim=Optim(name="sgd", clip_norm=0.1, clip=clip))) for clip in ("mean", "process")]
    assert torch.equal(*found)
    assert not torch.equal(found[0], accumulated(replace(config, optim=Optim(name="sgd", clip_norm=0.0))))


def test_counters_are_means_since_the_last_reading(config):
    step = fresh(config)
    loader = Loader("a", config, train=True)
    losses = []
    for i in range(3):
        batch = loader.load(i)
        with torch.no_grad():
            losses.append(LOSSES["softmax"](step.model(batch.grid, "a"), batch.labels, 0.0).item())
        one_step(step, ("a",), [batch], number=i)
    counters = step.read_counters().wait()
    assert counters["a"].loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (counters["a"].steps, counters["b"].steps, counters["a"].skipped) == (3, 0, 0)
    assert step.read_counters().wait()["a"].steps == 0


def test_a_non_finite_batch_is_skipped_and_counted(config):
    step = fresh(config)
    batch = Loader("a", config, train=True).load(0)
    poisoned = Batch(torch.full_like(batch.grid, float("nan")), batch.labels)
    before = step.parameters.values.clone()
    for i, b in enumerate([poisoned, poisoned, batch, poisoned]):
        one_step(step, ("a",), [b], 0.1 if b is poisoned else 0.0, i)
        assert torch.equal(step.parameters.values, before)
        assert not step.parameters.grads.any()
    row = step.read_counters().wait()["a"]
    assert (row.skipped, row.skipped_in_a_row, row.last_skipped_step) == (3, 1, 3)


def norm_by_autograd(config, batches) -> float:
    gradient = gradient_by_autograd(config, list(batches.items()))
    return float(torch.stack([one.double().square().sum() for one in gradient.values()]).sum().sqrt())


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3, 1e3])
def test_the_norm_is_that_of_the_gradient_before_clipping_and_belongs_to_all_tasks_of_a_step(config, clip_norm):
    config = replace(config, optim=Optim(name="sgd", clip_norm=clip_norm))
    step, poisoned = fresh(config), Batch(torch.full((8, 1, 16, 16, 3), torch.nan), torch.zeros(8, dtype=torch.int64))
    batches = {name: Loader(name, config, train=True).load(0) for name in config.tasks}
    both, alone = norm_by_autograd(config, batches), norm_by_autograd(config, {"a": batches["a"]})
    # At a rate of 0 the weights stay those of the other gradient.
    one_step(step, ("a", "b"), list(batches.values()), lr=0.0, number=0)
    one_step(step, ("a",), [poisoned], lr=0.0, number=1)
    one_step(step, ("a",), [batches["a"]], lr=0.0, number=2)
    rows = step.read_counters().wait()
    assert (rows["a"].steps, rows["a"].updates, rows["b"].updates) == (3, 2, 1)
    assert rows["a"].grad_norm == pytest.approx((both + alone) / 2, rel=1e-4)
    assert rows["b"].grad_norm == pytest.approx(both, rel=1e-4)
    assert [row.clipped for row in rows.values()] == [float(0 < clip_norm < both)] * 2
    assert step.read_counters().wait()["b"] == replace(rows["b"], loss=0.0, matches=0.0, steps=0, updates=0, grad_norm=0.0, clipped=0.0)


def test_the_clipped_fraction_counts_updates(config):
    batch = Loader("a", config, train=True).load(0)
    norm = norm_by_autograd(config, {"a": batch})
    step = fresh(replace(config, optim=Optim(name="sgd", clip_norm=1.5 * norm)))
    for number, weight in enumerate((1.0, 1.0, 2.0, 1.0)):  # of the loss, and so of its gradient
        step.begin(("a",), 0.0, number, (weight,))
        step.forward_backward("a", Inputs.from_batch(batch))
        step.update()
    row = step.read_counters().wait()["a"]
    assert (row.updates, row.clipped) == (4, 0.25)
    assert row.grad_norm == pytest.approx(1.25 * norm, rel=1e-4)


def test_counters_are_watched_without_a_reading(config):
    step, batch = fresh(config), Loader("a", config, train=True).load(0)
    one_step(step, ("a",), [batch])
    watched = step.watch_counters()
    one_step(step, ("a",), [batch])
    assert (watched.wait()["a"].steps, step.read_counters().wait()["a"].steps) == (1, 2)


def test_counters_of_earlier_versions_have_fewer_columns(config):
    step = fresh(config)
    step.load_counters([[1.5, 1.0, 2.0, 7.0, 3.0, 9.0], [0.0] * 6])
    row = step.read_counters().wait()["a"]
    assert (row.loss, row.steps, row.skipped, row.skipped_in_a_row, row.last_skipped_step) == (0.75, 2, 7, 3, 9)
    assert (row.updates, row.grad_norm, row.clipped) == (0, 0.0, 0.0)


def test_bf16_autocast_stays_close_and_keeps_fp32_parameters(config):
    batch = Loader("a", config, train=True).load(0)
    exact, rounded = fresh(config), fresh(replace(config, precision="bf16"))
    for step in (exact, rounded):
        step.begin(("a",), 0.0, 0)
        step.forward_backward("a", Inputs.from_batch(batch))
    cosine = torch.nn.functional.cosine_similarity(exact.parameters.grads, rounded.parameters.grads, dim=0)
    assert cosine > 0.98
    assert not torch.equal(exact.parameters.grads, rounded.parameters.grads)
    assert rounded.parameters.values.dtype == torch.float32


def test_an_accumulating_step_counts_its_skipped_tasks_only(config):
    step = fresh(config)
    batches = {name: Loader(name, config, train=True).load(0) for name in config.tasks}
    poisoned = Batch(torch.full_like(batches["b"].grid, float("inf")), batches["b"].labels)
    one_step(step, ("a", "b"), [batches["a"], poisoned], number=3)
    one_step(step, ("a",), [batches["a"]], number=4)
    rows = step.read_counters().wait()
    assert [(row.skipped, row.skipped_in_a_row, row.last_skipped_step) for row in rows.values()] == [(1, 0, 3), (1, 1, 3)]


@pytest.mark.parametrize(
    "optim", [Optim(name="adamw", lr=1e-3, ema_decay=0.9), Optim(name="sgd", lr=0.1, weight_decay=0.1)], ids=["adamw", "sgd"]
)
def test_a_rehearsal_changes_nothing(config, optim):
    step = fresh(replace(config, optim=optim))
    batch = Loader("a", config, train=True).load(0)
    one_step(step, ("a",), [batch])
    state = (
        {"values": step.parameters.values, "counters": step.counters}
        | step.optimizer.state_dict()
        | (step.optimizer.ema_state_dict() or {})
    )
    before = {name: tensor.clone() for name, tensor in state.items()}
    with step.rehearse():
        step.begin(("a",), 0.1, 7)
        step.forward_backward("a", Inputs.from_batch(batch))
        for _ in range(3):  # an update clears the gradient, and what forbids it with it
            step.skip_update()
        step.forward_backward("a", Inputs.from_batch(batch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert not step.parameters.grads.any()


def test_neighbours_swap_in_pairs():
    assert swap_neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert swap_neighbours(torch.arange(5)).tolist() == [1, 0, 3, 2, 4]
    assert swap_neighbours(torch.arange(1)).tolist() == [0]
    assert swap_neighbours(torch.arange(8).view(4, 2)).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]


def test_a_reversed_batch_pairs_the_first_with_the_last():
    assert reverse(torch.arange(4)).tolist() == [3, 2, 1, 0]
    assert reverse(torch.arange(5)).tolist() == [4, 3, 2, 1, 0]
    assert reverse(torch.arange(4).view(2, 2)).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_what_is_frozen_changes_no_other_gradient(micro_batches):
    tasks = {"a": tile_task(micro_batches=micro_batches), "b": tile_task(loss="sigmoid", multi_label=True)}
    config = tiny_config(tasks=tasks, optim=Optim(freeze=("tokenizers.tile.weight", "blocks.0.attn.*", "*.mlp.fc1.weight", "heads.b.bias")))
    batches = [(name, Loader(name, config, train=True).load(3)) for name in config.tasks]
    step = fresh(config)
    step.begin(tuple(config.tasks), 0.0, 0)
    for name, batch in batches:
        step.forward_backward(name, Inputs.from_batch(batch))
    expected = gradient_by_autograd(config, batches)
    found = step.parameters.unflatten([group.grads for group in step.parameters.groups])
    assert found.keys() | step.parameters.frozen.keys() == expected.keys()
    assert len(step.parameters.frozen) == 1 + 4 + 2 + 1
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_frozen_front_has_no_backward(config):
    config = replace(config, optim=Optim(freeze=("tokenizers.*", "blocks.*")))
    step = fresh(config)
    inputs = Inputs.from_batch(Loader("a", config, train=True).load(0))
    step.begin(("a",), 0.1, 0)
    with FlopCounterMode(display=False) as counter:
        step.forward_backward("a", inputs)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        step.model(inputs.grid, "a")
    # The gradients of the head's weight and of its input, which the last norm needs.
    assert counter.get_total_flops() == forward.get_total_flops() + 2 * (2 * 8 * 32 * 3)


@pytest.mark.parametrize("accumulate", ["mean", "sum"])
def test_loss_weights_and_those_of_a_step_multiply_each_task_s_gradient(accumulate):
    tasks = {"a": tile_task(loss_weight=0.25, micro_batches=2), "b": tile_task(num_classes=4, loss_weight=3.0)}
    config = tiny_config(tasks=tasks, optim=Optim(name="sgd", accumulate=accumulate))
    batches = {name: Loader(name, config, train=True).load(3) for name in config.tasks}
    step, model = fresh(config), PolyViT.from_config(config)
    step.begin(("a", "b"), 0.0, 0, (1.0, 0.5))
    for name, batch in batches.items():
        step.forward_backward(name, Inputs.from_batch(batch))
    losses = {name: LOSSES["softmax"](model(batch.grid, name), batch.labels, 0.0) for name, batch in batches.items()}
    total = 0.25 * losses["a"] + 3.0 * 0.5 * losses["b"]
    (total / 2 if accumulate == "mean" else total).backward()
    found = step.parameters.unflatten([group.grads for group in step.parameters.groups])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    counters = step.read_counters().wait()  # what is logged is the loss itself
    assert {name: row.loss for name, row in counters.items()} == pytest.approx(
        {name: loss.item() for name, loss in losses.items()}, rel=1e-5
    )
