from dataclasses import replace
from functools import cache

import pytest
import torch
from processes import run_together
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import Loader
from polyvit_fast.model.parameters import decay_by_layer, freeze
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.fsdp import ShardedParameters
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.evaluate import evaluate
from polyvit_fast.train.optim import FlatParameters, Optimizer

SIZE, BATCH, STEPS, SKIPPED = 2, 8, 4, 2
LR = torch.tensor(0.05)


def config():
    """Two modalities with an adaptor block each, and heads that do not divide by two."""
    tasks = {"a": tile_task(batch=2), "b": tile_task(num_classes=5, modality=Other(), val=Synthetic(num_samples=3))}
    model = Model(dim=32, depth=3, num_heads=2, mlp_dim=64, num_adaptor_layers=1)
    return tiny_config(tasks=tasks, model=model, optim=Optim(name="sgd", weight_decay=0.1, ema_decay=0.5), sharded=True)


class Other(Tile):
    name = "other"


def train(model, parameters, optimizer, world: World, precision: str) -> list[bool]:
    """Steps of one task, the other, or both; one of them is poisoned on the last process alone."""
    done = []
    for step in range(STEPS):
        for task in (("a",), ("b",), ("a", "b"), ("b", "a"))[step]:
            grid = torch.randn(BATCH, 1, 16, 16, 3, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(grid.chunk(world.size)[world.rank], task, recompute=step % 2 == 1)
            weight = 1 if parameters.averages_grads else 1 / world.size
            (logits.float().square().mean() * weight).backward()
        if step == SKIPPED and world.rank == world.size - 1:
            parameters.found_inf.add_(torch.nan)
        done.append(bool(optimizer.update(LR)[1]))
    return done


def sharded(world: World) -> dict[str, dict[str, object]]:
    """All that is to be looked at, of both precisions, in one call."""
    return {precision: sharded_in(world, precision) for precision in ("fp32", "bf16")}


def sharded_in(world: World, precision: str) -> dict[str, object]:
    model = PolyViT.from_config(config())
    parameters = ShardedParameters(model, world, "cpu", precision)
    optimizer = Optimizer(parameters, config().optim)
    found: dict[str, object] = {"elements": sum(len(group.values) for group in parameters.groups)}
    found["done"] = train(model, parameters, optimizer, world, precision)
    found["saved"] = saved = {"model": parameters.state_dict(), "optimizer": optimizer.state_dict(), "ema": optimizer.ema_state_dict()}
    with torch.no_grad(), optimizer.use_ema():
        found["averaged"] = model(torch.ones(1, 1, 16, 16, 3), "a")
    validation = {name: Loader(name, config(), train=False) for name in config().tasks}
    found["metrics"] = evaluate(model, config(), validation, lambda *_: None, world)
    saved = world.broadcast(saved)
    fresh = PolyViT.from_config(replace(config(), seed=1))
    parameters = ShardedParameters(fresh, world, "cpu", precision)
    optimizer = Optimizer(parameters, config().optim)
    parameters.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    optimizer.load_ema(saved["ema"])
    found["again"] = {"model": parameters.state_dict(), "optimizer": optimizer.state_dict(), "ema": optimizer.ema_state_dict()}
    with torch.no_grad():
        found["logits"] = [net(torch.ones(1, 1, 16, 16, 3), "b") for net in (model, fresh)]
    try:
        parameters.load_state_dict(saved["ema"] | {"heads.a.bias": torch.zeros(7)})
    except ValueError as error:
        found["refused"] = str(error)
    return found


def of_one_process() -> dict[str, object]:
    model = PolyViT.from_config(config())
    parameters = FlatParameters(model)
    optimizer = Optimizer(parameters, config().optim)
    done = []
    for step in range(STEPS):
        for task in (("a",), ("b",), ("a", "b"), ("b", "a"))[step]:
            grid = torch.randn(BATCH, 1, 16, 16, 3, generator=torch.Generator().manual_seed(step))
            model(grid, task).square().mean().backward()
        parameters.found_inf.fill_(torch.nan if step == SKIPPED else 0.0)
        done.append(bool(optimizer.update(LR)[1]))
    with torch.no_grad(), optimizer.use_ema():
        averaged = model(torch.ones(1, 1, 16, 16, 3), "a")
    validation = {name: Loader(name, config(), train=False) for name in config().tasks}
    metrics = evaluate(model, config(), validation, lambda *_: None)
    tensors = {"model": parameters.state_dict(), "optimizer": optimizer.state_dict(), "ema": optimizer.ema_state_dict()}
    return {"saved": tensors, "averaged": averaged, "done": done, "metrics": metrics}


@cache
def of_processes() -> list[dict[str, dict[str, object]]]:
    return run_together(SIZE, sharded)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_together_are_one_model(precision):
    found, expected = [one[precision] for one in of_processes()], of_one_process()
    first = found[0]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
    assert all(one["done"] == expected["done"] == [True, True, False, True] for one in found)
    for group, tensors in expected["saved"].items():
        assert first["saved"][group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(first["saved"][group][name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(first["saved"][group][name], first["again"][group][name])
    whole = sum(p.numel() for p in PolyViT.from_config(config()).parameters())
    assert sum(one["elements"] for one in found) == whole + SIZE  # each parameter once, and found_inf of each process
    assert max(one["elements"] for one in found) < 0.7 * whole
    for one in found:
        torch.testing.assert_close(one["averaged"], expected["averaged"], **tolerance)
        assert torch.equal(one["logits"][0], one["logits"][1])
        assert one["refused"] == "the checkpoint's tensors are not this model's: heads.a.bias differ"
        assert one["metrics"].keys() == {"a", "b"}
        for task, row in expected["metrics"].items():
            assert one["metrics"][task] == first["metrics"][task]
            assert one["metrics"][task]["num_examples"] == row["num_examples"]
            assert one["metrics"][task]["loss"] == pytest.approx(row["loss"], rel=1e-4 if precision == "fp32" else 0.05)


def test_one_process_cannot_be_sharded():
    with pytest.raises(ValueError, match="sharded = True spreads the model over processes, but there is one"):
        ShardedParameters(PolyViT.from_config(config()), World(), "cpu", "fp32")


def tune(world: World | None) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors after steps with frozen blocks and rates by layer; without a world of one process, whole."""
    model = PolyViT.from_config(config())
    freeze(model, ["blocks.0.*", "tokenizers.tile.*"])
    factors = decay_by_layer(model, 0.5)
    parameters = ShardedParameters(model, world, "cpu", "fp32", lr_factors=factors) if world else FlatParameters(model, lr_factors=factors)
    optimizer = Optimizer(parameters, config().optim)
    train(model, parameters, optimizer, world or World(), "fp32")
    saved = {"model": parameters.state_dict(), "optimizer": optimizer.state_dict(), "ema": optimizer.ema_state_dict()}
    if world:
        whole = world.broadcast(saved)
        parameters.load_state_dict(whole["model"])
        optimizer.load_ema(whole["ema"])
        again = {"model": parameters.state_dict(), "ema": optimizer.ema_state_dict()}
        assert all(torch.equal(tensor, saved[kind][name]) for kind, tensors in again.items() for name, tensor in tensors.items())
    return saved


def test_frozen_parameters_and_rates_by_layer_are_those_of_one_process():
    found, expected = run_together(SIZE, tune)[0], tune(None)
    start = PolyViT.from_config(config()).state_dict()
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[kind][name], tensor, rtol=1e-4, atol=1e-5)
    frozen = [name for name in start if name.startswith(("blocks.0.", "tokenizers.tile."))]
    assert all(torch.equal(found[kind][name], start[name]) for name in frozen for kind in ("model", "ema"))
    assert not [name for name in found["optimizer"] if name.partition(".")[2] in frozen]
