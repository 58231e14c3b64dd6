"""The check of captures refuses what a GPU refuses, and lets the rest pass."""

import gluon_samples
import pytest
import torch
from capturable import META, NotCapturableError, check_capturable
from capturable import on_meta as on_meta  # a fixture
from torch.nn import functional

REFUSED = {
    "a number into an element": lambda x: x.__setitem__(0, 1.0),
    "a truth into an element": lambda x: (x > 0).__setitem__((0, 1), True),
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "is_nonzero": lambda x: torch.is_nonzero(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "in": lambda x: 1.0 in x,
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(1.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to the device": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "to the host": lambda x: torch.ones(3, 4).copy_(x),
    "copy_ from the host": lambda x: x.copy_(torch.ones(3, 4)),
    "a number of the host": lambda x: x * torch.ones(()),
    "an index of numbers": lambda x: x[[0, 2]],
    "an index of the host": lambda x: x[torch.arange(2)],
    "a mask": lambda x: x[x > 0],
    "a mask into": lambda x: x.index_put_((x > 0,), torch.ones((), device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
    "in a backward pass": lambda x: functional.linear(Reading.apply(x.requires_grad_()), x).sum().backward(),
}


class Reading(torch.autograd.Function):
    """Looks at its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.max().item()


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_host_is_refused(call):
    with pytest.raises(NotCapturableError), check_capturable():
        call(torch.zeros(3, 4, device=META))


@pytest.mark.usefixtures("on_meta")
def test_a_gluon_kernel_is_not_launched_and_its_descriptors_are_of_the_device():
    x = torch.zeros(2, 70, 64, device=META, dtype=torch.bfloat16)
    with check_capturable():
        assert gluon_samples.copy(x).is_meta
        with pytest.raises(NotCapturableError, match="copy_kernel: a kernel takes a tensor of the host"):
            gluon_samples.copy(torch.zeros(2, 70, 64, dtype=torch.bfloat16))


def test_what_stays_on_the_device_passes():
    x, weight = torch.zeros(3, 4, device=META), torch.zeros(5, 4, device=META, requires_grad=True)
    with check_capturable():
        x[0].fill_(1.0)
        x[1:] = x[:2]
        x += torch.arange(4, device=META) * 0.5
        x[torch.arange(2, device=META)].add_(1)
        torch.where(x > 0, x, 0.0)
        functional.dropout(functional.linear(x, weight), 0.1).logsumexp(1).mean().backward()
    assert weight.grad is not None


def test_only_queued_copies_to_the_device_feed_it():
    x, host = torch.zeros(3, 4, device=META), torch.ones(3, 4)
    with check_capturable(feeds=True):
        x.copy_(host, non_blocking=True)
        host.to(META, non_blocking=True)
    for call in (lambda: x.copy_(host), lambda: host.to(META), lambda: host.copy_(x, non_blocking=True)):
        with pytest.raises(NotCapturableError, match="a copy between host and device"), check_capturable(feeds=True):
            call()
