"""The kernels of updates against `reference.py` in fp64 and against torch's own fused updates."""

import dataclasses

import pytest
import torch
from compare import DEVICE, assert_within_rule
from samples import normal

from polyvit_kernels import reference
from polyvit_kernels.ops.registration import pick_torch
from polyvit_kernels.ops.update import _adamw, _sgd
from polyvit_kernels.tiles import pick
from polyvit_kernels.tiles.table import TABLE
from polyvit_kernels.triton_kernels import update

LR, SCALE, MOMENTUM, WEIGHT_DECAY, EMA_DECAY, BETAS, EPS = 0.03, 0.5, 0.9, 0.1, 0.99, (0.9, 0.999), 1e-8
COUNT = 1000  # torch's update on a GPU computes 1 - beta^count in fp32, which is too inexact for small counts to compare with
NAMES = {"sgd": ("param", "grad", "momentum", "ema"), "adamw": ("param", "grad", "first", "second", "ema")}


def tile(name, **blocks):
    row = pick(f"{name}_update", 90, torch.float32)
    return dataclasses.replace(row, blocks={**row.blocks, **blocks})


def number(value):
    return torch.tensor(float(value), device=DEVICE)


def buffers(name, size, seed=0):
    """As after some updates: the averages of squares are positive."""
    found = {key: normal(size, seed=seed + i) for i, key in enumerate(NAMES[name])}
    return {key: value.square() * 1e-4 if key == "second" else value for key, value in found.items()}


def run(name, form, tensors, *, count=COUNT, ok=True, scale=SCALE, copy=None, **more):
    """Update the tensors by `form`, our launcher or torch's."""
    numbers = (number(LR), number(scale), torch.tensor(ok, device=DEVICE))
    *params, ema = tensors.values()
    if name == "sgd":
        form(*params, ema, copy, *numbers, MOMENTUM, WEIGHT_DECAY, EMA_DECAY, **more)
    else:
        form(*params, ema, copy, number(count), *numbers, *BETAS, EPS, WEIGHT_DECAY, EMA_DECAY, **more)


def ours(name, tensors, **more):
    run(name, {"sgd": update.sgd, "adamw": update.adamw}[name], tensors, **({"tile": tile(name, BLOCK=256)} | more))


def plain(name, tensors, **more):
    run(name, {"sgd": _sgd, "adamw": _adamw}[name], tensors, pick=pick_torch, **more)


def true(name, tensors, count=COUNT):
    param, grad, *moments, ema = (tensor.double() for tensor in tensors.values())
    common = {"lr": LR, "scale": SCALE, "weight_decay": WEIGHT_DECAY}
    if name == "sgd":
        param, *moments = reference.sgd(param, grad, *moments, momentum=MOMENTUM, **common)
    else:
        param, *moments = reference.adamw(param, grad, *moments, count, betas=BETAS, eps=EPS, **common)
    return dict(zip(NAMES[name], (param, torch.zeros_like(grad), *moments, EMA_DECAY * ema + (1 - EMA_DECAY) * param), strict=True))


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_an_update(name, size):
    found, plain_results = buffers(name, size), buffers(name, size)
    expected = true(name, found)
    ours(name, found)
    plain(name, plain_results)
    assert_within_rule(found, plain_results, expected, torch.float32)


@pytest.mark.parametrize("count", [1, 2, 10, 500, 693, 694, 10000])
def test_the_bias_corrections_are_exact_for_every_count(count):
    found = buffers("adamw", 100)
    before, expected = found["param"].double(), true("adamw", found, count)["param"]
    ours("adamw", found, count=count)
    torch.testing.assert_close(found["param"].double() - before, expected - before, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0)])
def test_a_beta_may_be_zero(betas, monkeypatch):
    monkeypatch.setitem(globals(), "BETAS", betas)
    found = buffers("adamw", 100)
    expected = true("adamw", found)
    ours("adamw", found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_holds_the_new_parameters_rounded(name, half):
    found, copy = buffers(name, 300), torch.empty(300, dtype=half, device=DEVICE)
    ours(name, found, copy=copy)
    assert torch.equal(copy, found["param"].to(half))


@pytest.mark.parametrize("name", NAMES)
def test_the_average_and_the_copy_may_be_absent(name):
    found, other = buffers(name, 300), buffers(name, 300)
    ours(name, found)
    ours(name, other | {"ema": None})
    assert all(torch.equal(found[key], other[key]) for key in NAMES[name][:-1])
    assert torch.equal(other["ema"], buffers(name, 300)["ema"])


@pytest.mark.parametrize("scale", [1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_refused_update_changes_no_bit_but_zeroes_the_gradient(name, scale):
    found, copy = buffers(name, 500), normal(500, seed=9).half()
    for tensor in found.values():
        tensor[:5] = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), 1e-42])
    before = {key: tensor.clone() for key, tensor in found.items()} | {"copy": copy.clone()}
    ours(name, found, ok=False, scale=scale, copy=copy)
    assert not found.pop("grad").any()
    found["copy"] = copy
    for key, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_is_updated_alone(name):
    whole = buffers(name, 1000)
    before = {key: tensor.clone() for key, tensor in whole.items()}
    expected = {key: tensor[7:700].clone() for key, tensor in whole.items()}
    ours(name, {key: tensor[7:700] for key, tensor in whole.items()})
    ours(name, expected)
    for key, tensor in whole.items():
        assert torch.equal(tensor[:7], before[key][:7])
        assert torch.equal(tensor[700:], before[key][700:])
        torch.testing.assert_close(tensor[7:700], expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_update(name):
    ours(name, buffers(name, 0))


def test_every_row_of_the_table_has_variants_that_name_all_arguments():
    rows = [row for row in TABLE if row.op in ("sgd_update", "adamw_update")]
    assert {row.op for row in rows} == {"sgd_update", "adamw_update"}
    for row in rows:
        found = list(update.variants(row, "fp32"))
        assert len(found) == 4
        for variant in found:
            assert set(variant.kernel.arg_names) == variant.signature.keys() | variant.constants.keys()
            assert set(variant.divisible) <= variant.signature.keys()
