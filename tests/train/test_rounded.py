"""Parameters that each update writes in bf16 too: a step that uses them is one that rounds them itself, to the bit."""

import pytest
import torch
from interpreted import registered as registered  # a fixture
from long_forms import pairs
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Optim, Train
from polyvit_fast.data.stream import Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.evaluate import average_logits
from polyvit_fast.train.feed import Inputs
from polyvit_fast.train.step import Step
from polyvit_kernels.ops import weights
from tests.train.distributed.test_reducer import Sent

STEPS = 20


@pytest.fixture
def kept(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(Train, "keeps_rounded", property(lambda config: config.precision == "bf16"))


def rounding_step(**changes) -> Step:
    config = tiny_config(**({"precision": "bf16", "tasks": {"a": tile_task(), "b": tile_task(num_classes=4)}} | changes))
    return Step(PolyViT.from_config(config).train(), config)


def train(step: Step, steps=range(STEPS), meanwhile=lambda step, number: None) -> list[float]:
    """The losses of steps that take turns; `meanwhile` is called before each."""
    names, losses = list(step.config.tasks), []
    loaders = {name: Loader(name, step.config, train=True) for name in names}
    for number in steps:
        meanwhile(step, number)
        name = names[number % len(names)]
        step.begin((name,), 1e-2, number)
        step.forward_backward(name, Inputs.from_batch(loaders[name].load(number)))
        step.update()
        losses.append(step.read_counters().wait()[name].loss)
    return losses


def assert_same(step: Step, other: Step) -> None:
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, other.model.get_parameter(name)), name
    for ours, theirs in zip(step.optimizer.ema or (), other.optimizer.ema or (), strict=True):
        assert torch.equal(ours, theirs)


CHANGES = {
    "as it is": {},
    "sgd, average": {"optim": Optim(name="sgd", lr=0.1, ema_decay=0.9)},
    "micro-batches, mixup": {"tasks": {"a": tile_task(micro_batches=2, mixup=0.4), "b": tile_task(num_classes=4, loss="sigmoid")}},
    "drop path, recomputed": {"recompute": True, "tasks": {"a": tile_task(drop_path_rate=0.3), "b": tile_task()}},
    "a bf16 residual": {"residual": "bf16"},
    "frozen, rates by layer": {"optim": Optim(name="adamw", freeze=("blocks.0.*", "*.fc1.weight"), layer_decay=0.7, ema_decay=0.9)},
}


PATHS = ("torch's", "registered")


@pytest.mark.parametrize(("name", "path"), pairs(CHANGES, PATHS))
def test_training_is_the_same_to_the_bit(name, path, monkeypatch, request):
    if path == "registered":
        request.getfixturevalue("registered")
    plain = rounding_step(**CHANGES[name])
    expected = train(plain)
    request.getfixturevalue("kept")
    step = rounding_step(**CHANGES[name])
    assert train(step) == expected
    assert_same(step, plain)
    assert all(weights.is_attached(parameter) for parameter in step.model.parameters())
    assert torch.equal(step.parameters.rounded.rounded, step.parameters.values.bfloat16())


@torch.no_grad()
def write_directly(step, number):
    if number == 3:
        for parameter in step.model.parameters():
            parameter.mul_(0.5)


def load_state(step, number):
    if number == 3:
        step.model.load_state_dict({name: 0.5 * tensor for name, tensor in step.model.state_dict().items()})


def load_checkpoint(step, number):
    if number == 3:
        step.parameters.load_state_dict({name: 0.5 * tensor for name, tensor in step.parameters.state_dict().items()})


def restore_everything(step, number):
    if number == 3:
        saved = {name: tensor.clone() for name, tensor in step.optimizer.state_dict().items()}
        step.optimizer.load_state_dict(saved)
        load_checkpoint(step, number)


def skip_a_step(step, number):
    if number == 3:
        step.skip_update()


def look_at_the_average(step, number):
    if number == 3:
        with step.optimizer.use_ema():
            logits(step.model, step.config)


def logits(model, config):
    return average_logits(model, "a", Loader("a", config, train=False).load(0).grid[:, None], "bf16")


MEANWHILE = [write_directly, load_state, load_checkpoint, restore_everything, skip_a_step, look_at_the_average]


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_whoever_writes_to_the_parameters_is_heeded(meanwhile, request):
    changes = {"optim": Optim(name="adamw", lr=0.1, ema_decay=0.9)}
    plain = rounding_step(**changes)
    expected = train(plain, range(6), meanwhile)
    request.getfixturevalue("kept")
    step = rounding_step(**changes)
    assert train(step, range(6), meanwhile) == expected
    assert_same(step, plain)


@pytest.mark.usefixtures("kept")
def test_the_average_is_evaluated_and_then_the_parameters_again():
    step = rounding_step(optim=Optim(name="adamw", lr=0.1, ema_decay=0.5))
    train(step, range(4))
    other = PolyViT.from_config(step.config)
    for now in (step.optimizer.use_ema(), step.rehearse()):
        with now:
            other.load_state_dict({name: tensor.clone() for name, tensor in step.model.state_dict().items()})
            assert torch.equal(logits(step.model, step.config), logits(other, step.config))
    assert not torch.equal(step.optimizer.ema[0], step.parameters.groups[0].values)


@pytest.mark.usefixtures("kept")
def test_the_model_is_saved_without_them():
    step, plain = rounding_step(), PolyViT.from_config(tiny_config())
    assert step.model.state_dict().keys() == rounding_step(precision="fp32").model.state_dict().keys()
    assert step.parameters.state_dict().keys() == dict(step.model.named_parameters()).keys()
    assert not any(weights.is_attached(parameter) for parameter in plain.parameters())


def test_a_cpu_keeps_none():
    assert rounding_step().parameters.rounded is None
    assert all(group.rounded is None for group in rounding_step().parameters.groups)


def test_where_they_are_kept():
    assert Train.keeps_rounded.fget(tiny_config(precision="bf16", device="cuda"))
    for changes in ({"precision": "fp32"}, {"device": "cpu"}, {"sharded": True}):
        assert not tiny_config(**({"precision": "bf16", "device": "cuda"} | changes)).keeps_rounded


@pytest.mark.usefixtures("kept")
def test_every_parameter_tells_the_reducer_once_that_its_gradient_is_there(monkeypatch):
    step, sent = rounding_step(), Sent(monkeypatch)
    step.reducer = Reducer(step.parameters, "fp32")
    arrived = []
    for name, parameter in step.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: arrived.append((name, parameter.grad.dtype)))
    train(step, range(1))
    assert sorted(arrived) == sorted((name, torch.float32) for name in step.used["a"])
    assert sum(tensor.numel() for tensor in sent.tensors) == step.parameters.grads.numel()
