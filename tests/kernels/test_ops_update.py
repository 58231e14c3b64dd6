"""Updates against torch.optim."""

import pytest
import torch
from samples import normal

import polyvit_kernels as ops


def number(value):
    return torch.tensor(float(value))


UPDATES = {
    "sgd": (1, lambda *buffers, count, **more: ops.sgd_(*buffers, **more, momentum=0.9)),
    "adamw": (2, lambda *buffers, count, **more: ops.adamw_(*buffers, count, **more, betas=(0.8, 0.95), eps=1e-6)),
}


def update(name, buffers, count, *, lr=0.1, scale=1.0, ok=True, weight_decay=0.1):
    common = {"lr": number(lr), "scale": number(scale), "ok": torch.tensor(ok), "weight_decay": weight_decay}
    UPDATES[name][1](*buffers, count=number(count), **common)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_torch_over_fifty_steps(name, weight_decay):
    size, start = 4097, normal(4097)
    param, moments, theirs = start.clone(), torch.zeros(UPDATES[name][0], size), torch.nn.Parameter(start.double())
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for count in range(1, 51):
        grad, lr, scale = normal(size, seed=count), 0.3 / count, 1 / (1 + count % 3)
        update(name, (param, grad.clone(), *moments), count, lr=lr, scale=scale, weight_decay=weight_decay)
        theirs.grad = grad.double() * scale
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(param.double(), theirs.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", UPDATES)
def test_a_refused_update_changes_no_bit(name, scale):
    grad = normal(1000)
    grad[::7], grad[3], grad[5] = -0.0, float("nan"), float("-inf")
    kept = [normal(1000, seed=1), *normal(UPDATES[name][0], 1000, seed=2).abs()]
    for buffer in kept:
        buffer[:4] = torch.tensor([-0.0, 0.0, float("inf"), 1e-42])
    before = [buffer.clone() for buffer in kept]
    update(name, (kept[0], grad, *kept[1:]), 0, scale=scale, ok=False)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(kept, before, strict=True))


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_touches_its_slice_alone(name):
    whole = [normal(300, seed=seed).abs() for seed in range(2 + UPDATES[name][0])]
    before = [buffer.clone() for buffer in whole]
    update(name, [buffer[7:150] for buffer in whole], 1)
    for buffer, old in zip(whole, before, strict=True):
        assert torch.equal(buffer[:7], old[:7])
        assert torch.equal(buffer[150:], old[150:])
    assert not torch.equal(whole[0], before[0])
    update(name, [buffer[300:] for buffer in whole], 1)


@pytest.mark.parametrize("name", UPDATES)
def test_updates_refuse_other_layouts(name):
    moments = torch.zeros(UPDATES[name][0], 4)
    for buffers in ((normal(8)[::2], normal(4), *moments), (normal(4).double(), normal(4), *moments)):
        with pytest.raises(ValueError, match="contiguous flat buffers of one size and dtype"):
            update(name, buffers, 1)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", UPDATES)
def test_updates_refuse_other_sizes(name):
    with pytest.raises(ValueError, match=r"contiguous flat buffers of one size and dtype, not \[4\] torch.float32, \[3\]"):
        update(name, (normal(4), normal(3), *torch.zeros(UPDATES[name][0], 4)), 1)
