"""Backward passes of which not every gradient is wanted: of frozen parameters, say."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import polyvit_kernels.flops as _registered  # noqa: F401 - importing it tells torch's counter what our operations cost


def differentiate(form: Callable[..., Tensor], inputs: dict[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], int]:
    """The gradients of the inputs that have one, and the operations of the backward pass. A float input that is not `wanted` wants none."""
    leaves = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    loss = form(**leaves).square().sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, counter.get_total_flops()


def assert_only_the_wanted(form: Callable[..., Tensor], inputs: dict[str, Tensor], costs: dict[str, int]) -> None:
    """Each gradient alone, and all but one, are those of all together; alone they cost what `costs` says."""
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    together, _ = differentiate(form, inputs, names)
    assert together.keys() == set(names)
    found = {}
    for name in names:
        alone, found[name] = differentiate(form, inputs, [name])
        others, _ = differentiate(form, inputs, [other for other in names if other != name])
        assert alone.keys() == {name}
        assert others.keys() == set(names) - {name}
        for key, gradient in (alone | others).items():
            torch.testing.assert_close(gradient, together[key], rtol=1e-6, atol=1e-6)
    assert found == costs
