from dataclasses import replace

import pytest
import torch
from tiny_runs import tile_task, tiny_config

from polyvit_fast.data.stream import Batch, Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.step import Step


def fresh(config):
    return Step(PolyViT.from_config(config), config)


def gradient_by_autograd(config, batches):
    """Gradient of the mean over tasks of each task's loss, written in one expression."""
    model = PolyViT.from_config(config)
    losses = []
    for name, batch in batches:
        task = config.tasks[name]
        grid, labels = batch.grid.float(), batch.labels
        if task.mixup:
            grid = batch.mixup_ratio * grid + (1 - batch.mixup_ratio) * grid.flip(0)
            one_hot = torch.nn.functional.one_hot(labels, task.num_classes).float()
            labels = batch.mixup_ratio * one_hot + (1 - batch.mixup_ratio) * one_hot.flip(0)
        losses.append(LOSSES[task.loss](model(grid, name), labels, task.label_smoothing))
    (sum(losses) / len(losses)).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batches": 4}, {"mixup": 0.4}, {"mixup": 0.4, "micro_batches": 2, "label_smoothing": 0.1}], ids=str
)
def test_gradient_is_that_of_the_mean_over_tasks_and_micro_batches(changes):
    config = tiny_config(tasks={"a": tile_task(**changes), "b": tile_task(loss="sigmoid", multi_label=True)})
    batches = [(name, Loader(name, config, train=True).load(3)) for name in config.tasks]
    step = fresh(config)
    for name, batch in batches:
        step.forward_backward(name, batch, 1 / 2)
    for name, gradient in step.parameters.named(step.parameters.grads).items():
        torch.testing.assert_close(gradient, gradient_by_autograd(config, batches)[name], rtol=1e-4, atol=1e-6)


def test_counters_are_means_since_the_last_reading(config):
    step = fresh(config)
    loader = Loader("a", config, train=True)
    losses = []
    for i in range(3):
        batch = loader.load(i)
        with torch.no_grad():
            losses.append(LOSSES["softmax"](step.model(batch.grid, "a"), batch.labels, 0.0).item())
        step.forward_backward("a", batch, 1.0)
        step.update(("a",), 1e-3, i)
    counters = step.read_counters()
    assert counters["a"].loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (counters["a"].steps, counters["b"].steps, counters["a"].skipped) == (3, 0, 0)
    assert step.read_counters()["a"].steps == 0


def test_a_non_finite_batch_is_skipped_and_counted(config):
    step = fresh(config)
    batch = Loader("a", config, train=True).load(0)
    poisoned = Batch(torch.full_like(batch.grid, float("nan")), batch.labels)
    before = step.parameters.values.clone()
    for i, b in enumerate([poisoned, poisoned, batch, poisoned]):
        step.forward_backward("a", b, 1.0)
        step.update(("a",), 0.1 if b is poisoned else 0.0, i)
        assert torch.equal(step.parameters.values, before)
    row = step.read_counters()["a"]
    assert (row.skipped, row.skipped_in_a_row, row.last_skipped_step) == (3, 1, 3)


def test_bf16_autocast_stays_close_and_keeps_fp32_parameters(config):
    batch = Loader("a", config, train=True).load(0)
    exact, rounded = fresh(config), fresh(replace(config, precision="bf16"))
    for step in (exact, rounded):
        step.forward_backward("a", batch, 1.0)
    cosine = torch.nn.functional.cosine_similarity(exact.parameters.grads, rounded.parameters.grads, dim=0)
    assert cosine > 0.98
    assert not torch.equal(exact.parameters.grads, rounded.parameters.grads)
    assert rounded.parameters.values.dtype == torch.float32
