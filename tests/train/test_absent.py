"""What an update does to the heads and tokenizers of absent tasks: they coast or rest (`Optim.absent`)."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from long_forms import mark_long
from processes import run_together
from tiny_runs import Tile, change, tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.process_group import ALONE, World
from polyvit_fast.train.feed import Inputs
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.schedule import LearningRates, make_step_plan
from polyvit_fast.train.step import Step

PLAN = [("a",), ("b",), ("a", "c"), ("a",), ("c",), ("b",), ("a",), ("a", "b")] * 3
OPTIMIZERS = {
    "sgd": Optim(name="sgd", weight_decay=0.1, clip_norm=0.0),
    "adamw": Optim(name="adamw", betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, clip_norm=0.0),
}


class Other(Tile):
    """A second modality."""

    name = "other"


def config(**optim):
    """Three tasks, two of one modality, with adaptors."""
    tasks = {"a": tile_task(batch=4), "b": tile_task(batch=4, modality=Other()), "c": tile_task(batch=4, num_classes=5)}
    model = Model(dim=32, depth=2, num_heads=2, mlp_dim=64, num_adaptor_layers=1)
    return tiny_config(tasks=tasks, model=model, optim=replace(OPTIMIZERS["adamw"], **optim))


def inputs(number: int, world: World = ALONE) -> Inputs:
    """This process's examples of a batch."""
    generator = torch.Generator().manual_seed(number)
    grid, labels = torch.randn(4, 1, 16, 16, 3, generator=generator), torch.randint(3, (4,), generator=generator)
    grid, labels = (whole.chunk(world.size)[world.rank] for whole in (grid, labels))
    return Inputs(grid, labels, torch.ones(()))


def train(of, plan=PLAN, world: World = ALONE) -> Step:
    step = Step(PolyViT.from_config(of), of, world)
    for number, names in enumerate(plan):
        step.begin(names, 0.01 / (1 + number), number)
        for name in names:
            step.forward_backward(name, inputs(number, world), last=name == names[-1])
        if number == 4:
            step.parameters.found_inf.fill_(torch.nan)  # an update that is skipped rests as a whole
        step.update()
    return step


def train_by_torch(of, name: str, *, set_to_none: bool) -> PolyViT:
    """The same by torch's own optimizer, which skips parameters without a gradient."""
    model = PolyViT.from_config(of)
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and n.endswith("weight")]
    others = [p for n, p in model.named_parameters() if not (p.ndim >= 2 and n.endswith("weight"))]
    groups = [{"params": matrices, "weight_decay": of.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=of.optim.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=of.optim.betas, eps=of.optim.eps)
    for p in model.parameters():
        p.grad = None if set_to_none else torch.zeros_like(p)
    for number, names in enumerate(PLAN):
        for task in names:
            batch = inputs(number)
            (torch.nn.functional.cross_entropy(model(batch.grid, task), batch.labels) / len(names)).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        if number != 4:
            optimizer.step()
        optimizer.zero_grad(set_to_none)
    return model


@pytest.mark.parametrize(("name", "absent"), mark_long(product(OPTIMIZERS, ["coast", "rest"]), [("sgd", "coast"), ("adamw", "rest")]))
def test_torch_coasts_by_zero_gradients_and_rests_without(name, absent):
    of = config(**vars(OPTIMIZERS[name]) | {"absent": absent})
    ours, theirs = train(of).model, train_by_torch(of, name, set_to_none=absent == "rest")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    other = train(config(**vars(OPTIMIZERS[name]) | {"absent": {"coast": "rest", "rest": "coast"}[absent]})).model
    assert (other.heads["c"].weight - theirs.heads["c"].weight).abs().max() > 1e-3


def test_fifty_steps_of_two_tasks_follow_the_recurrence_of_the_papers_code():
    """m ← g min(1, c / |g|) + 0.9 m; θ ← θ − lr · lr_scale of the step's task · m, for all parameters in every step."""
    tasks = {"a": tile_task(steps=35, lr_scale=0.5), "b": tile_task(steps=15, lr_scale=2.0, modality=Other(), loss="sigmoid")}
    of = tiny_config(tasks=tasks, optim=Optim(name="sgd", lr=0.05, warmup_steps=5, clip_norm=0.5))
    plan = make_step_plan(of)
    assert len(plan) == 50
    ours, theirs = Step(PolyViT.from_config(of), of), PolyViT.from_config(of)
    momentum = [torch.zeros_like(p) for p in theirs.parameters()]
    for number, (name,) in enumerate(plan):
        ours.begin((name,), LearningRates(of, plan)[number], number)
        ours.forward_backward(name, inputs(number))
        ours.update()
        batch = inputs(number)
        loss = LOSSES[of.tasks[name].loss](theirs(batch.grid, name), batch.labels, 0.0)
        grads = torch.autograd.grad(loss, list(theirs.parameters()), materialize_grads=True)
        factor = min(1.0, 0.5 / float(torch.stack([grad.norm() for grad in grads]).norm()))
        for parameter, grad, moment in zip(theirs.parameters(), grads, momentum, strict=True):
            moment.mul_(0.9).add_(grad * factor)
            parameter.data -= LearningRates(of, plan)[number] * moment
    for a, b in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_rests_keeps_every_bit_of_its_state(name):
    of = config(**vars(OPTIMIZERS[name]) | {"absent": "rest", "ema_decay": 0.9})
    step = train(of)
    state = step.parameters.state_dict(), step.optimizer.state_dict(), step.optimizer.ema_state_dict()
    before = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in state]
    step.begin(("a",), 0.01, 99)
    step.forward_backward("a", inputs(99))
    step.update()
    for tensors, old in zip(state, before, strict=True):
        for key, tensor in tensors.items():
            rests = any(part in key for part in ("heads.b", "heads.c", "tokenizers.other"))
            assert torch.equal(tensor, old[key]) == rests, key
    assert not step.parameters.grads.any()


def test_each_component_counts_its_own_updates_and_restores_them():
    step = train(config(absent="rest"))
    saved = {name: tensor.clone() for name, tensor in step.optimizer.state_dict().items()}
    counts = {name: int(tensor) for name, tensor in saved.items() if name.startswith("count")}
    assert counts == {
        "count": 23,  # of 24, one was skipped
        "count.tokenizers.tile": 17,
        "count.tokenizers.other": 9,
        "count.heads.a": 15,
        "count.heads.b": 9,
        "count.heads.c": 5,
    }
    fresh = Step(PolyViT.from_config(step.config), step.config)
    fresh.optimizer.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.optimizer.state_dict().items())
    with pytest.raises(
        ValueError, match=r"the checkpoint counts the updates of other components, by another optim\.absent: count\.heads\.a, count"
    ):
        Step(PolyViT.from_config(config()), config(absent="coast")).optimizer.load_state_dict(saved)


def test_sgd_coasts_and_adamw_rests_by_default():
    assert {(name, absent): Optim(name=name, absent=absent).rests for name in OPTIMIZERS for absent in ("auto", "coast", "rest")} == {
        ("sgd", "auto"): False,
        ("sgd", "coast"): False,
        ("sgd", "rest"): True,
        ("adamw", "auto"): True,
        ("adamw", "coast"): False,
        ("adamw", "rest"): True,
    }
    usual, resting = (train(config(absent=absent)).parameters.values for absent in ("auto", "rest"))
    assert torch.equal(usual, resting)


def test_one_count_is_all_where_nothing_rests():
    step = train(config(absent="coast"))
    assert [name for name in step.optimizer.state_dict() if name.startswith("count")] == ["count"]
    assert len(step.parameters.groups) == 2


def movement(absent: str, num_tasks: int, weight_decay: float = 0.0, lr: float = 1e-3) -> float:
    """How far AdamW moves a rare task's head for each of its minibatches, in learning rates, when its gradient is always the same.

    One of `num_tasks` updates is the rare task's. With weight decay, only by that, from 1: without a gradient.
    """
    tasks = {"rare": tile_task(), "other": tile_task()}
    of = tiny_config(tasks=tasks, model=Model(dim=8, depth=1, num_heads=1, mlp_dim=8))
    of = replace(of, optim=Optim(name="adamw", absent=absent, clip_norm=0.0, weight_decay=weight_decay))
    step, weights = Step(PolyViT.from_config(of), of), []
    weight = step.model.heads["rare"].weight
    weight.data.fill_(1.0)
    for number in range(num_tasks * (OWN + 1)):
        step.begin(("rare" if number % num_tasks == 0 else "other",), lr, number)
        if number % num_tasks == 0:
            weights.append(float(weight[0, 0].detach()))
            weight.grad.fill_(0.0 if weight_decay else -1.0)
        step.took_part[min(number % num_tasks, 1)] = True
        step.update()
    return (weights[OWN] - weights[OWN // 2]) / (OWN - OWN // 2) / lr


OWN = 6
"""Minibatches of the rare task, of which the second half is measured: moments start at zero."""


@pytest.mark.parametrize("num_tasks", mark_long([2, 9, 100], [2, 9]))
def test_a_rare_head_moves_by_the_root_of_the_number_of_tasks_or_as_if_alone(num_tasks):
    assert movement("rest", num_tasks) == pytest.approx(1, rel=1e-3)
    assert movement("coast", num_tasks) == pytest.approx(num_tasks**0.5, rel=0.1)


@pytest.mark.parametrize("num_tasks", [2, 9])
def test_a_rare_head_decays_in_every_update_or_in_its_own(num_tasks):
    assert movement("rest", num_tasks, weight_decay=0.01) == pytest.approx(-0.01, rel=1e-2)
    assert movement("coast", num_tasks, weight_decay=0.01) == pytest.approx(-0.01 * num_tasks, rel=2e-2)


def of_processes(world: World, changes: dict) -> dict[str, torch.Tensor]:
    step = train(change(config(absent="rest", clip_norm=0.3), **changes), world=world)
    return {**step.parameters.state_dict(), **{f"state.{name}": tensor for name, tensor in step.optimizer.state_dict().items()}}


@pytest.mark.parametrize("changes", mark_long([{}, {"sharded": True}], [{"sharded": True}]), ids=["whole", "sharded"])
def test_several_processes_rest_as_one(changes):
    found, expected = run_together(2, of_processes, changes)[0], of_processes(ALONE, {})
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
