from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny_config
from torch import nn

from polyvit_fast.config import Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.optim import FlatParameters, Optimizer


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def run(config, steps=50, finite=lambda step: True):
    """Our optimizer and torch's own on equal nets, with the same gradients and rates; gives both nets."""
    ours, theirs = small_net(), small_net()
    flat = FlatParameters(ours)
    optimizer = Optimizer(flat, config)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.name == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        reference = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps)
    for step in range(steps):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
        lr = 0.1 / (1 + step)
        loss = (ours(x) ** 2).mean()
        loss.backward()
        flat.found_inf.add_(loss.detach() * (0.0 if finite(step) else torch.nan))
        optimizer.update(torch.tensor(lr))
        if finite(step):
            (theirs(x) ** 2).mean().backward()
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip_norm)
            for group in reference.param_groups:
                group["lr"] = lr
            reference.step()
            reference.zero_grad(set_to_none=False)
    return ours, theirs, optimizer


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fifty_steps_equal_torch(name, weight_decay, clip_norm):
    ours, theirs, _ = run(Optim(name=name, weight_decay=weight_decay, clip_norm=clip_norm))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_non_finite_steps_leave_no_trace(name):
    ours, theirs, optimizer = run(Optim(name=name), finite=lambda step: step % 5 != 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert optimizer.count.item() == 40


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", [5, -1], ids=["gradient", "found_inf"])
def test_what_is_not_finite_changes_nothing(name, poison, index):
    _, _, optimizer = run(Optim(name=name, ema_decay=0.9), steps=3)
    flat = optimizer.parameters
    buffers = [flat.values, *(flat for flats in optimizer.moments.values() for flat in flats), optimizer.count, *optimizer.ema]
    before = [buffer.clone() for buffer in buffers]
    (flat.found_inf if index == -1 else flat.grads[index]).fill_(poison)
    norm, done = optimizer.update(torch.tensor(0.1))
    assert not norm.isfinite()
    assert not done
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))
    assert not flat.grads.any()
    assert flat.found_inf == 0


def test_the_norm_is_that_of_all_gradients():
    net = small_net()
    flat = FlatParameters(net)
    (net(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))) ** 2).mean().backward()
    expected = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    torch.testing.assert_close(flat.compute_grad_norm(), expected)
    flat.zero_grads()
    assert flat.compute_grad_norm() == 0


def test_moving_average():
    ours, _, optimizer = run(Optim(name="sgd", ema_decay=0.5), steps=1)
    flat = optimizer.parameters
    average, start = optimizer.ema_state_dict(), dict(small_net().named_parameters())
    for name, value in flat.state_dict().items():
        torch.testing.assert_close(average[name], 0.5 * start[name] + 0.5 * value)
    now = ours[0].weight.detach().clone()
    with optimizer.use_ema():
        assert torch.equal(ours[0].weight, average["0.weight"])
        assert not torch.equal(ours[0].weight, now)
    assert torch.equal(ours[0].weight, now)
    fresh = Optimizer(FlatParameters(small_net()), optimizer.config)
    fresh.load_ema(average)
    assert all(torch.equal(t, average[name]) for name, t in fresh.ema_state_dict().items())


def test_without_a_moving_average_there_is_none_to_save_or_restore():
    optimizer = Optimizer(FlatParameters(small_net()), Optim())
    assert optimizer.ema_state_dict() is None
    with optimizer.use_ema():
        pass
    with pytest.raises(ValueError, match="ema_decay = 0"):
        optimizer.load_ema({})


def test_heads_of_absent_tasks_coast_on_their_momentum():
    config = tiny_config()
    model = PolyViT.from_config(config)
    optimizer = Optimizer(FlatParameters(model), Optim(name="sgd", momentum=0.9, clip_norm=0.0))
    lr = torch.tensor(0.1)
    grid = torch.randn(2, 1, 16, 16, 3)
    model(grid, "b").square().sum().backward()
    gradient = model.heads["b"].weight.grad.clone()
    optimizer.update(lr)
    before = model.heads["b"].weight.detach().clone()
    for n in (1, 2):
        model(grid, "a").square().sum().backward()
        optimizer.update(lr)
        after = model.heads["b"].weight.detach().clone()
        torch.testing.assert_close(after - before, -0.1 * 0.9**n * gradient, rtol=1e-4, atol=1e-6)
        before = after


def test_flat_parameters_are_the_models_own_and_aligned():
    model = small_net()
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = FlatParameters(model)
    assert all(torch.equal(p, shadow[name]) for name, p in model.named_parameters())
    assert all(p.data_ptr() % 256 == flat.values.data_ptr() % 256 for p in model.parameters())
    flat.values.fill_(7)
    assert all((p == 7).all() for p in model.parameters())
    assert flat.found_inf.data_ptr() not in {p.grad.data_ptr() for p in model.parameters()}
    flat.found_inf.fill_(3)
    assert flat.compute_grad_norm() == 3
    assert all(not p.grad.any() for p in model.parameters())


def test_weights_are_loaded_by_name():
    flat, other = FlatParameters(small_net()), small_net()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    flat.load_state_dict(dict(other.state_dict()))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in flat.state_dict().items())
    with pytest.raises(ValueError, match=r"0.bias, 0.weight, 1.bias"):
        flat.load_state_dict(dict(nn.Sequential(nn.Linear(5, 8)).state_dict()))


def test_saved_tensors_restore_and_foreign_ones_are_refused():
    _, _, optimizer = run(Optim(name="adamw"), steps=4)
    saved = {name: t.clone() for name, t in optimizer.state_dict().items()}
    fresh = Optimizer(FlatParameters(small_net()), optimizer.config)
    fresh.load_state_dict(saved)
    assert all(torch.equal(t, saved[name]) for name, t in fresh.state_dict().items())
    other = Optimizer(FlatParameters(nn.Sequential(nn.Linear(5, 8))), replace(optimizer.config))
    with pytest.raises(ValueError, match=r"0.bias, 0.weight, 1.bias"):
        other.load_state_dict(saved)


def frozen_net():
    net = small_net()
    net[0].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_have_no_gradient_no_moments_and_no_decay(name):
    net, start = frozen_net(), dict(small_net().named_parameters())
    flat = FlatParameters(net)
    optimizer = Optimizer(flat, Optim(name=name, weight_decay=0.5, ema_decay=0.5, clip_norm=0.0))
    frozen = {"0.weight", "1.bias"}
    assert len(flat.grads) == 64 * (4 + 1)  # four small parameters that are trained, and found_inf
    for step in range(3):
        (net(torch.randn(16, 5, generator=torch.Generator().manual_seed(step))) ** 2).mean().backward()
        optimizer.update(torch.tensor(0.1))
    assert flat.frozen.keys() == frozen
    assert not [moment for moment in optimizer.state_dict() if moment.partition(".")[2] in frozen]
    assert flat.state_dict().keys() == optimizer.ema_state_dict().keys() == start.keys()
    for key, value in flat.state_dict().items():
        same = torch.equal(value, start[key])
        assert same == (key in frozen), key
        assert torch.equal(value, dict(net.named_parameters())[key])
        assert torch.equal(optimizer.ema_state_dict()[key], value) == (key in frozen)
    assert net[0].weight.grad is None


def test_the_norm_that_is_clipped_is_that_of_trained_parameters():
    net = frozen_net()
    flat = FlatParameters(net)
    (net(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))) ** 2).mean().backward()
    whole = small_net()
    (whole(torch.randn(16, 5, generator=torch.Generator().manual_seed(0))) ** 2).mean().backward()
    trained = [dict(whole.named_parameters())[name].grad for name, parameter in net.named_parameters() if parameter.requires_grad]
    torch.testing.assert_close(flat.compute_grad_norm(), torch.stack([gradient.norm() for gradient in trained]).norm())


def test_frozen_parameters_are_saved_and_restored_with_the_others():
    flat = FlatParameters(frozen_net())
    optimizer = Optimizer(flat, Optim(name="adamw", ema_decay=0.9))
    other = FlatParameters(frozen_net())
    other.values.normal_(generator=torch.Generator().manual_seed(1))
    wanted = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    flat.load_state_dict(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in flat.state_dict().items())
    optimizer.load_ema(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in optimizer.ema_state_dict().items())
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight differ"):
        flat.load_state_dict({name: tensor for name, tensor in wanted.items() if name != "0.weight"})
    whole = Optimizer(FlatParameters(small_net()), Optim(name="adamw"))
    with pytest.raises(ValueError, match=r"0\.weight, 1\.bias differ"):
        whole.load_state_dict(optimizer.state_dict())


FACTORS = {"0.weight": 0.25, "0.bias": 0.25, "1.weight": 0.5, "1.bias": 0.5}
"""Of the learning rate; 1 for the last layer."""


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_by_layer_are_those_of_torchs_param_groups(name):
    config = Optim(name=name, weight_decay=0.3, clip_norm=0.0)
    ours, theirs = small_net(), small_net()
    optimizer = Optimizer(flat := FlatParameters(ours, lr_factors=FACTORS), config)
    # Matrices, the first bias, the norm, the last bias: five launches, where one parameter each would take six.
    assert [(group.decays, group.lr_factor) for group in flat.groups] == [
        (True, 0.25),
        (True, 1.0),
        (False, 0.25),
        (False, 0.5),
        (False, 1.0),
    ]
    groups = [
        {"params": [parameter], "factor": FACTORS.get(key, 1.0), "weight_decay": 0.3 * (parameter.ndim == 2)}
        for key, parameter in theirs.named_parameters()
    ]
    reference = torch.optim.SGD(groups, momentum=0.9, lr=1.0) if name == "sgd" else torch.optim.AdamW(groups, lr=1.0)
    for step in range(30):
        x, lr = torch.randn(16, 5, generator=torch.Generator().manual_seed(step)), 0.1 / (1 + step)
        for net in (ours, theirs):
            (net(x) ** 2).mean().backward()
        optimizer.update(torch.tensor(lr))
        for group in reference.param_groups:
            group["lr"] = lr * group["factor"]
        reference.step()
        reference.zero_grad(set_to_none=False)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_by_layer_are_those_of_the_formulas_in_fp64(name):
    """Each parameter by itself, from the same gradients."""
    config = Optim(name=name, weight_decay=0.3, clip_norm=0.0)
    net = small_net()
    flat = FlatParameters(net, lr_factors=FACTORS)
    optimizer = Optimizer(flat, config)
    values = {key: parameter.detach().double() for key, parameter in net.named_parameters()}
    first, second = ({key: torch.zeros_like(value) for key, value in values.items()} for _ in range(2))
    for step in range(1, 11):
        for key, view in flat.unflatten([group.grads for group in flat.groups]).items():
            view.normal_(generator=torch.Generator().manual_seed(step))
            gradient, decay = view.double(), 0.3 * (values[key].ndim == 2)
            rate = 0.01 / step * FACTORS.get(key, 1.0)
            if name == "sgd":
                first[key] = 0.9 * first[key] + gradient + decay * values[key]
                values[key] = values[key] - rate * first[key]
            else:
                first[key] = 0.9 * first[key] + 0.1 * gradient
                second[key] = 0.999 * second[key] + 0.001 * gradient**2
                moved = first[key] / (1 - 0.9**step) / ((second[key] / (1 - 0.999**step)).sqrt() + 1e-8)
                values[key] = values[key] - rate * decay * values[key] - rate * moved
        optimizer.update(torch.tensor(0.01 / step))
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.double(), values[key], rtol=2e-6, atol=2e-7)


def test_layers_of_one_rate_are_one_launch():
    from polyvit_fast.model.parameters import decay_by_layer

    model = PolyViT.from_config(tiny_config())
    flat = FlatParameters(model, lr_factors=decay_by_layer(model, 0.8))
    assert len(flat.groups) == 2 * 4  # tokenizer, two blocks, heads: matrices and others
    assert len(FlatParameters(PolyViT.from_config(tiny_config())).groups) == 2
