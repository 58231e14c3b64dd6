"""Grids to tokens by the comparison rule: truth is `reference.py` in fp64, the baseline plain PyTorch at the same dtype."""

from itertools import product

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from long_forms import mark_long
from partial_gradients import assert_only_the_wanted
from samples import normal
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]


GRIDS = {
    "image": ((2, 1, 32, 48, 3), (1, 16, 16)),
    "clip": ((2, 6, 16, 24, 3), (2, 8, 8)),
    "spectrogram": ((2, 1, 64, 32, 1), (1, 16, 16)),
}


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def patch_embed_inputs(grid, tubelet, channels):
    num_tokens = 1 + grid.shape[1] * grid.shape[2] * grid.shape[3] // (tubelet[0] * tubelet[1] * tubelet[2])
    fan_in = tubelet[0] * tubelet[1] * tubelet[2] * channels
    weights = {"weight": normal(40, *tubelet, channels, seed=2) / fan_in**0.5, "bias": normal(40, seed=3)}
    return {"grid": grid} | weights | {"cls_token": normal(1, 1, 40, seed=4), "pos_embed": normal(1, num_tokens, 40, seed=5)}


def plain_patch_embed(grid, weight, bias, cls_token, pos_embed, mean, std):
    normalised = ((grid.to(torch.promote_types(weight.dtype, torch.float32)) - mean) / std).to(weight.dtype)
    tubelet = weight.shape[1:4]
    embedded = functional.conv3d(normalised.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), bias, stride=tubelet)
    return torch.cat([cls_token.repeat(len(grid), 1, 1), embedded.flatten(2).transpose(1, 2)], 1) + pos_embed


def assert_patch_embed_obeys(inputs, dtype, mean, std, view=lambda grid: grid):
    forms = (
        lambda grid, f=f, **more: f(view(grid), **more, mean=mean, std=std)
        for f in (ops.patch_embed, plain_patch_embed, reference.patch_embed)
    )
    assert_as_exact_as_torch(*forms, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_patch_embed_of_bytes(name, dtype):
    shape, tubelet = GRIDS[name]
    mean, std = numbers(123.7, 116.3, 103.5)[: shape[4]], numbers(58.4, 57.1, 57.4)[: shape[4]]
    assert_patch_embed_obeys(patch_embed_inputs(bytes_of(*shape), tubelet, shape[4]), dtype, mean, std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((2, 1, 64, 32, 3), lambda grid: grid),
        ((2, 1, 64, 32, 1), lambda grid: grid.expand(-1, -1, -1, -1, 3)),
        ((2, 3, 1, 64, 32), lambda grid: grid.permute(0, 2, 3, 4, 1)),
        ((3, 1, 70, 64, 4), lambda grid: grid[1:, :, 6:, ::2, :3]),
    ],
    ids=["as it lies", "one channel three times", "channels first", "sliced"],
)
def test_patch_embed_of_numbers_in_every_layout(shape, view, dtype):
    inputs = patch_embed_inputs(torch.empty(2, 1, 64, 32, 3), (1, 16, 16), 3) | {"grid": normal(*shape) * 4 - 5}
    assert_patch_embed_obeys(inputs, dtype, numbers(-4.27, -4, 1), numbers(9.14, 9, 2), view)


def test_patch_embed_normalises_before_it_rounds_to_bf16():
    even = torch.full((1, 1, 16, 16, 3), 124, dtype=torch.uint8, device=DEVICE)
    inputs = patch_embed_inputs(even, (1, 16, 16), 3)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("bias", "cls_token", "pos_embed")}
    assert_patch_embed_obeys(inputs, torch.bfloat16, numbers(123.7, 123.7, 123.7), numbers(58.4, 58.4, 58.4))


def test_patch_embed_leaves_the_grid_alone():
    grid = normal(2, 1, 16, 16, 3)
    before = grid.clone()
    ops.patch_embed(**patch_embed_inputs(grid, (1, 16, 16), 3), mean=numbers(1, 1, 1), std=numbers(2, 2, 2))
    assert torch.equal(grid, before)


def test_tokens_stand_in_the_order_frames_rows_columns():
    grid = numbers(*range(2 * 4 * 6)).view(1, 2, 4, 6, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    weight = numbers(1, 0, 0, 0).view(1, 1, 2, 2, 1)
    parameters = {"bias": numbers(0), "cls_token": numbers(-1).view(1, 1, 1), "pos_embed": torch.zeros(1, 49, 1, device=DEVICE)}
    tokens = ops.patch_embed(grid, weight, **parameters, mean=numbers(0), std=numbers(1))
    assert tokens.flatten().tolist() == list(range(-1, 48))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32, but a floating-point dtype is needed"),
        ({"grid": normal(1, 16, 16, 3)}, r"\[1, 16, 16, 3\], but \[batch, frames, rows, columns, channels\] is needed"),
        ({"grid": normal(1, 1, 16, 20, 3)}, r"\(frames, rows, columns\) = \[1, 16, 20\] does not divide into tubelets of \[1, 8, 8\]"),
        ({"grid": normal(1, 1, 16, 16, 1)}, "the grid has 1 channels and the weight 3"),
        ({"grid": normal(1, 1, 32, 16, 3)}, r"\[1, 32, 16\] in tubelets of \[1, 8, 8\] makes 9 tokens, but there are 5 positions"),
        ({"pos_embed": normal(5, 40)}, r"makes 5 tokens, but there are positions of the shape \[5, 40\]"),
        (
            {"weight": normal(40, 8, 8, 3)},
            r"the weight has the shape \[40, 8, 8, 3\], but \[dim, frames, rows, columns, channels\] is needed",
        ),
        ({"bias": normal(39)}, r"bias has the shape \[39\], but \[40\] is needed"),
        ({"cls_token": normal(1, 40)}, r"cls_token has the shape \[1, 40\], but \[1, 1, 40\] is needed"),
        ({"pos_embed": normal(1, 5, 41)}, r"pos_embed has the shape \[1, 5, 41\], but \[1, 5, 40\] is needed"),
        ({"std": numbers(1)}, r"std has the shape \[1\], but \[3\] is needed"),
        ({"mean": numbers(1, 1, 1).requires_grad_()}, "mean and std are constants here"),
        ({"weight": normal(40, 1, 0, 8, 3)}, r"the weight has the shape \[40, 1, 0, 8, 3\], but sizes of at least 1 are needed"),
        ({"weight": normal(0, 1, 8, 8, 3)}, r"the weight has the shape \[0, 1, 8, 8, 3\], but sizes of at least 1 are needed"),
        ({"grid": bytes_of(1, 1, 16, 16, 3).int()}, "the grid is torch.int32, but torch.uint8 or a floating-point dtype is needed"),
        (
            {"grid": normal(1, 1, 16, 16, 3).to(torch.float8_e4m3fn)},
            "the grid is torch.float8_e4m3fn, but torch.uint8 or a floating-point dtype is needed",
        ),
        ({"weight": normal(40, 1, 8, 8, 3).int()}, "weight is torch.int32, but a floating-point dtype is needed"),
        ({"bias": normal(40).int()}, "bias is torch.int32, but a floating-point dtype is needed"),
        ({"cls_token": normal(1, 1, 40).int()}, "cls_token is torch.int32, but a floating-point dtype is needed"),
        ({"pos_embed": normal(1, 5, 40).int()}, "pos_embed is torch.int32, but a floating-point dtype is needed"),
        ({"mean": numbers(0, 0, 0).int()}, "mean is torch.int32, but a floating-point dtype is needed"),
        ({"std": numbers(1, 1, 1).int()}, "std is torch.int32, but a floating-point dtype is needed"),
        ({"bias": torch.empty(40, device="meta")}, "on one device, not grid on .*, bias on meta"),
    ],
)
def test_patch_embed_names_the_sizes_that_disagree(change, message):
    inputs = patch_embed_inputs(normal(1, 1, 16, 16, 3), (1, 8, 8), 3)
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**(inputs | {"mean": numbers(0, 0, 0), "std": numbers(1, 1, 1)} | change))


def test_gradients_are_the_same_in_every_run():
    inputs = patch_embed_inputs(normal(4, 1, 64, 64, 3), (1, 8, 8), 3)
    call = (lambda **inputs: ops.patch_embed(**inputs, mean=numbers(0, 0, 0), std=numbers(1, 1, 1)), inputs)
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def normalised(**inputs):
    return ops.patch_embed(**inputs, mean=numbers(0.1, 0.2, 0.3), std=numbers(1, 2, 3))


GRADIENTS = {
    "transposed": lambda: normal(40, 5, 2).permute(2, 1, 0),
    "sliced": lambda: normal(2, 7, 80)[:, 2:, ::2],
    "one number": lambda: normal(1, 1, 1).expand(2, 5, 40),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_may_arrive_in_every_layout(name):
    leaves = {key: t.requires_grad_() for key, t in patch_embed_inputs(normal(2, 1, 16, 16, 3), (1, 8, 8), 3).items()}
    tokens, grad = normalised(**leaves), GRADIENTS[name]()
    found = torch.autograd.grad(tokens, list(leaves.values()), grad, retain_graph=True)
    expected = torch.autograd.grad(tokens, list(leaves.values()), grad.contiguous())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_add_up_in_place_stay_apart():
    leaves = {key: t.requires_grad_() for key, t in patch_embed_inputs(normal(2, 1, 16, 16, 3), (1, 8, 8), 3).items()}
    for _ in range(3):
        normalised(**leaves).sum().backward()
    torch.testing.assert_close(leaves["cls_token"].grad, torch.full((1, 1, 40), 6.0, device=DEVICE))
    torch.testing.assert_close(leaves["pos_embed"].grad, torch.full((1, 5, 40), 6.0, device=DEVICE))


def test_no_examples():
    leaves = {key: t.requires_grad_() for key, t in patch_embed_inputs(normal(0, 1, 16, 16, 3), (1, 8, 8), 3).items()}
    tokens = normalised(**leaves)
    tokens.sum().backward()
    assert tokens.shape == (0, 5, 40)
    assert not any(leaf.grad.any() for leaf in leaves.values())


def test_autocast_multiplies_in_its_dtype_and_leaves_the_positions_alone():
    inputs = patch_embed_inputs(normal(2, 1, 16, 16, 3), (1, 8, 8), 3)
    leaves = {key: t.clone().requires_grad_() for key, t in inputs.items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        tokens = normalised(**leaves)
    assert tokens.dtype == torch.float32
    rounded = normalised(**(inputs | {"weight": inputs["weight"].bfloat16()}))
    assert torch.equal(tokens, rounded)
    tokens.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    assert (tokens - normalised(**inputs)).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tokens_may_be_rounded_as_they_are_written(dtype):
    inputs = patch_embed_inputs(normal(2, 1, 16, 16, 3), (1, 8, 8), 3)
    leaves = {key: t.clone().requires_grad_() for key, t in inputs.items()}
    tokens, grad = normalised(**leaves, out_dtype=dtype), normal(2, 5, 40).to(dtype)
    assert torch.equal(tokens, normalised(**inputs).to(dtype))
    found = torch.autograd.grad(tokens, list(leaves.values()), grad)
    expected = torch.autograd.grad(normalised(**leaves), list(leaves.values()), grad.float())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("on_kernels")
def test_tokens_may_be_rounded_as_kernels_write_them():
    test_tokens_may_be_rounded_as_they_are_written(torch.float16)  # Triton's interpreter cuts bf16 off


OP_GRIDS = {
    "bytes": lambda: bytes_of(2, 1, 16, 16, 3),
    "numbers": lambda: normal(2, 1, 16, 16, 3).requires_grad_(),
    "channels first": lambda: normal(2, 3, 1, 16, 16).permute(0, 2, 3, 4, 1),
    "one channel three times": lambda: normal(2, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3),
    "none": lambda: bytes_of(0, 1, 16, 16, 3),
}


OPCHECKED = [("channels first", torch.float32), ("bytes", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), mark_long(product(OP_GRIDS, DTYPES), OPCHECKED), ids=str)
def test_ops_are_registered_as_torch_wants_them(name, dtype):
    inputs = patch_embed_inputs(OP_GRIDS[name](), (1, 8, 8), 3)
    grid, *parameters = inputs.values()
    weight, *others = (tensor.detach().requires_grad_() for tensor in parameters)
    weight = weight.detach().to(dtype).requires_grad_()
    statistics = (numbers(0.1, 0.2, 0.3), numbers(1, 2, 3))
    torch.library.opcheck(torch.ops.polyvit.patch_embed, (grid, weight, *others, *statistics, torch.bfloat16))
    grad = normal(len(grid), 5, 40)
    # opcheck itself cannot copy tensors without elements that do not lie in order.
    layouts = (grad, grad.transpose(0, 2).contiguous().transpose(0, 2), grad[:, :, :1].expand(-1, -1, 40))
    some = layouts if len(grid) and dtype == torch.float32 else layouts[:1]
    for layout, mask in zip(some, ([True, True], [True, False], [False, True]), strict=False):
        torch.library.opcheck(torch.ops.polyvit.patch_embed_backward, (layout, grid.detach(), weight.detach(), *statistics, mask))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_as_one_graph_the_values_are_the_same(autocast):
    def embed(**inputs):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return normalised(**inputs)

    for grid in (bytes_of(2, 1, 16, 16, 3), normal(2, 1, 16, 16, 3)):
        inputs = patch_embed_inputs(grid, (1, 8, 8), 3)
        compiled = outputs_and_gradients(torch.compile(embed, fullgraph=True, backend="aot_eager"), inputs)
        for name, value in outputs_and_gradients(embed, inputs).items():
            torch.testing.assert_close(compiled[name], value)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", GRIDS)
def test_on_kernels(name):
    test_patch_embed_of_bytes(name, torch.float32)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", OP_GRIDS)
def test_on_kernels_in_every_layout(name):
    grid = OP_GRIDS[name]().detach()
    if len(grid):
        assert_patch_embed_obeys(patch_embed_inputs(grid, (1, 8, 8), 3), torch.float32, numbers(0.1, 0.2, 0.3), numbers(100, 90, 80))
    else:
        test_no_examples()


@pytest.mark.usefixtures("on_kernels")
def test_what_no_row_is_for_is_done_by_torch():
    inputs = {key: t.double() for key, t in patch_embed_inputs(normal(2, 1, 16, 16, 3), (1, 8, 8), 3).items()}
    truth = reference.patch_embed(**inputs, mean=numbers(0.1, 0.2, 0.3).double(), std=numbers(1, 2, 3).double())
    torch.testing.assert_close(normalised(**inputs), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["registered", "on_kernels"])
def test_a_gradient_that_nobody_wants_costs_nothing(path, request):
    request.getfixturevalue(path)
    inputs = patch_embed_inputs(bytes_of(2, 1, 16, 24, 3), (1, 8, 8), 3)
    costs = dict.fromkeys(["weight", "bias", "cls_token", "pos_embed"], 0) | {"weight": 2 * 2 * 6 * (8 * 8 * 3) * 40}
    assert_only_the_wanted(normalised, inputs, costs)
