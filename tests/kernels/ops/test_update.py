"""Updates against torch.optim."""

import pytest
import torch
from compare import DEVICE
from samples import normal

import polyvit_kernels as ops
from polyvit_kernels import reference
from polyvit_kernels.ops.update import _adamw, _sgd
from polyvit_kernels.tiles import lookup


def number(value):
    return torch.tensor(float(value), device=DEVICE)


def yes(value=True):
    return torch.tensor(value, device=DEVICE)


UPDATES = {
    "sgd": (1, lambda *buffers, count, **more: ops.sgd_(*buffers, **more, momentum=0.9)),
    "adamw": (2, lambda *buffers, count, **more: ops.adamw_(*buffers, count, **more, betas=(0.8, 0.95), eps=1e-6)),
}


def zeros(name, size):
    """The moments of an optimizer that has not begun."""
    return torch.zeros(UPDATES[name][0], size, device=DEVICE)


def update(name, buffers, count, *, lr=0.1, scale=1.0, ok=True, weight_decay=0.1, **more):
    common = {"lr": number(lr), "scale": number(scale), "ok": yes(ok), "weight_decay": weight_decay}
    UPDATES[name][1](*buffers, count=number(count), **common, **more)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_torch_over_fifty_steps(name, weight_decay):
    size, start = 4097, normal(4097)
    param, moments, theirs = start.clone(), zeros(name, size), torch.nn.Parameter(start.double())
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


@pytest.mark.parametrize("name", UPDATES)
def test_the_moving_average_and_the_copy_follow(name):
    param, moments = normal(1000), zeros(name, 1000)
    ema, copy = normal(1000, seed=1), torch.empty(1000, dtype=torch.bfloat16, device=DEVICE)
    expected = ema.double()
    for count in range(1, 6):
        update(name, (param, normal(1000, seed=count), *moments), count, ema=ema, ema_decay=0.9, copy=copy)
        expected = 0.9 * expected + 0.1 * param.double()
        assert torch.equal(copy, param.bfloat16())
    torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", UPDATES)
def test_a_refused_update_changes_no_bit(name, scale):
    grad = normal(1000)
    grad[::7], grad[3], grad[5] = -0.0, float("nan"), float("-inf")
    kept = [normal(1000, seed=1), *normal(UPDATES[name][0], 1000, seed=2).abs(), normal(1000, seed=3), normal(1000, seed=4).half()]
    for buffer in kept:
        buffer[:4] = torch.tensor([-0.0, 0.0, float("inf"), 1e-42])
    before = [buffer.clone() for buffer in kept]
    update(name, (kept[0], grad, *kept[1:-2]), 0, scale=scale, ok=False, ema=kept[-2], ema_decay=0.5, copy=kept[-1])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(kept, before, strict=True))
    assert not grad.any()


@pytest.mark.parametrize("name", UPDATES)
def test_the_gradient_is_zero_afterwards(name):
    grad = normal(100)
    update(name, (normal(100), grad, *zeros(name, 100)), 1)
    assert not grad.any()


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


def sgd_by_formula(param, grad, buffer, momentum, scale):
    return reference.sgd(param, grad, buffer, lr=0.1, scale=scale, momentum=momentum, weight_decay=0.1)


def step_of_sgd(param, grad, buffer, momentum, scale, ok=True):
    numbers = {"lr": number(0.1), "scale": number(scale), "ok": yes(ok)}
    ops.sgd_(param, grad, buffer, **numbers, momentum=momentum, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_its_formula_with_and_without_momentum(momentum, dtype):
    param, grad, buffer = (normal(70, seed=seed).to(dtype) for seed in range(3))
    expected = sgd_by_formula(param.double(), grad.double(), buffer.double(), momentum, 0.5)
    before = [param.clone(), buffer.clone()]
    step_of_sgd(param, grad.clone(), buffer, momentum, 0.5, ok=False)
    assert torch.equal(param, before[0])
    assert torch.equal(buffer, before[1])
    step_of_sgd(param, grad, buffer, momentum, 0.5)
    torch.testing.assert_close([param.double(), buffer.double()], list(expected), rtol=1e-6, atol=1e-6)
    assert not grad.any()


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_on_kernels(momentum):
    test_sgd_by_its_formula_with_and_without_momentum(momentum, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_numbers_may_have_any_floating_point_dtype(name, dtype):
    values = {"count": 3, "lr": 0.25, "scale": 0.5}
    runs = []
    for kind in (torch.float32, dtype):
        buffers = [normal(50, seed=seed).abs() for seed in range(2 + UPDATES[name][0])]
        UPDATES[name][1](*buffers, **{key: number(value).to(kind) for key, value in values.items()}, ok=yes(), weight_decay=0.1)
        runs.append(buffers)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


LAST = {"sgd": "momentum_buffer", "adamw": "exp_avg_sq"}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, lambda x: normal(8)[::2]), r"param has the shape \[4\] and the strides \[2\], but a contiguous flat buffer is needed"),
        ((1, lambda x: normal(2, 2)), r"grad has the shape \[2, 2\] and the strides \[2, 1\], but a contiguous flat buffer"),
        ((1, lambda x: normal(3)), "grad has 3 elements and param 4, but buffers of one size are needed"),
        ((-1, lambda x: x.double()), "LAST is torch.float64 and param torch.float32, but one dtype is needed"),
        ((-1, lambda x: x.int()), "LAST is torch.int32, but a floating-point dtype is needed"),
        ((0, lambda x: x.to(torch.float8_e4m3fn)), "param is torch.float8_e4m3fn, but a floating-point dtype is needed"),
        ((1, lambda x: x.to("meta")), "on one device, not param on (cpu|cuda:0), grad on meta"),
        ({"ema": normal(4).half()}, "ema is torch.float16 and param torch.float32, but one dtype is needed"),
        ({"ema": normal(5)}, "ema has 5 elements and param 4"),
        ({"ema": torch.ones(4, device="meta")}, "on one device, not .*, ema on meta"),
        ({"copy": normal(8).half()[::2]}, r"copy has the shape \[4\] and the strides \[2\], but"),
        ({"copy": normal(3).half()}, "copy has 3 elements and param 4"),
        ({"copy": normal(4)}, "copy is torch.float32, but torch.float16 or torch.bfloat16 is needed"),
    ],
)
@pytest.mark.parametrize("name", UPDATES)
def test_updates_name_the_buffer_that_does_not_fit(name, change, message):
    buffers, more = [normal(4, seed=seed) for seed in range(2 + UPDATES[name][0])], {}
    if isinstance(change, tuple):
        buffers[change[0]] = change[1](buffers[change[0]])
    else:
        more = change
    with pytest.raises(ValueError, match=message.replace("LAST", LAST[name])):
        update(name, buffers, 1, **more)


def sharing_cases(name):
    """Buffers of which two overlap in memory, and the names of those."""
    size, moments = 8, list(zeros(name, 8))
    param, grad, whole = normal(size), normal(size), normal(12)
    yield (param, param, *moments), {}, "param and grad"
    yield (param, grad, *moments[:-1], grad), {}, f"grad and {LAST[name]}"
    yield (whole[4:], whole[:8], *moments), {}, "param and grad"
    yield (param, grad, *moments), {"ema": param}, "param and ema"
    yield (param, grad, *moments), {"copy": grad.view(torch.float16)[8:]}, "grad and copy"


@pytest.mark.parametrize("name", UPDATES)
def test_updates_refuse_buffers_that_share_memory(name):
    for buffers, more, names in sharing_cases(name):
        before = [buffer.clone() for buffer in buffers]
        with pytest.raises(ValueError, match=f"{names} overlap in memory, but each buffer needs its own"):
            update(name, buffers, 1, **more)
        assert all(torch.equal(buffer, old) for buffer, old in zip(buffers, before, strict=True))
    whole = normal(4 * 8).abs().view(4, 8)
    update(name, whole[: 2 + UPDATES[name][0]], 1)
    update(name, [whole[0, :0]] * (2 + UPDATES[name][0]), 1)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", UPDATES)
def test_kernels_refuse_buffers_that_share_memory(name):
    test_updates_refuse_buffers_that_share_memory(name)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", ["lr", "scale", "ok", "count"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, "is a float, but a tensor of one number on DEVICE is needed"),
        (1, "is an int, but a tensor of one number on DEVICE is needed"),
        (True, "is a bool, but a tensor of one number on DEVICE is needed"),
        (torch.ones(1), r"is \[1\] on cpu, but a tensor of one number on DEVICE, of the shape \[\], is needed"),
        (torch.ones((), device="meta"), r"is \[\] on meta, but a tensor of one number on DEVICE, of the shape \[\], is needed"),
        (torch.ones((), device=DEVICE, dtype=torch.int32), "is torch.int32, but (a floating-point dtype|torch.bool) is needed"),
    ],
    ids=str,
)
def test_updates_name_the_number_that_does_not_fit(name, value, message):
    common = {"count": number(1), "lr": number(1), "scale": number(1), "ok": yes(), "weight_decay": 0.1} | {name: value}
    with pytest.raises(ValueError, match=f"{name} {message.replace('DEVICE', '(cpu|cuda:0)')}"):
        UPDATES["adamw"][1](*(normal(4) for _ in range(4)), **common)


def arguments(name, dtype=torch.float32, follow=True):
    """Of the registered operation."""
    param, grad, first, second, ema = (normal(70, seed=seed).to(dtype) for seed in range(5))
    copy = normal(70).half()
    followers, numbers = (ema, copy) if follow else (None, None), (number(0.1), number(0.5), yes())
    if name == "sgd":
        return (param, grad, first, *followers, *numbers, 0.9, 0.1, 0.99)
    return (param, grad, first, second.abs(), *followers, number(3), *numbers, 0.9, 0.99, 1e-8, 0.1, 0.99)


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("name", UPDATES)
def test_ops_are_registered_as_torch_wants_them(name, follow):
    torch.library.opcheck(getattr(torch.ops.polyvit, f"{name}_"), arguments(name, follow=follow))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", UPDATES)
def test_compiled_as_one_graph_the_values_are_the_same(name):
    def step(buffers, ema, lr):
        common = {"lr": lr * 0.5, "scale": lr * 2, "ok": lr > 0, "weight_decay": 0.1}
        UPDATES[name][1](*buffers, count=lr + 1, **common, ema=ema, ema_decay=0.9)
        return buffers[0].sum()

    runs = []
    for form in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        buffers, ema = [normal(50, seed=seed).abs() for seed in range(2 + UPDATES[name][0])], normal(50)
        runs.append([form(buffers, ema, number(0.1)), *buffers, ema])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_the_implementation_for_gpus_gives_what_torchs_gives(name, dtype, monkeypatch):
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)
    found, expected = arguments(name, dtype), arguments(name, dtype)
    {"sgd": _sgd, "adamw": _adamw}[name](*found, lookup.pick_for)
    getattr(torch.ops.polyvit, f"{name}_")(*expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
