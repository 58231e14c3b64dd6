"""The public operations by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import jaxtyping
import pytest
import torch
from compare import assert_as_exact_as_torch, outputs_and_gradients
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 16, 63, 64, 65, 197, 256, 257, 401, 1569]


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_holds_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unchecked_types():
    """As in production, where no annotation is checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(*shape):
    """As inside trained ViTs: each channel has its own offset, and a few are a hundred times the others."""
    scale = torch.ones(shape[-1])
    scale[::31] = 100
    return (normal(*shape) + normal(shape[-1], seed=1)) * scale


def plain_attention(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def assert_attention_obeys(qkv, dtype, view=lambda qkv: qkv):
    """`view` is what the operations see of the leaf `qkv`."""
    forms = (lambda qkv, f=f: f(view(qkv)) for f in (ops.attention, plain_attention, reference.attention))
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_at_every_length(tokens, dtype):
    assert_attention_obeys(normal(1 if tokens > 1000 else 2, tokens, 3, 2, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_at_every_width(head_dim, dtype):
    assert_attention_obeys(normal(2, 65, 3, 2, head_dim), dtype)


VIEWS = {
    "heads before tokens": ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
    "batch last": ((65, 3, 2, 32, 2), lambda leaf: leaf.permute(4, 0, 1, 2, 3)),
    "inside a wider buffer": ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
    "every second token": ((2, 130, 3, 2, 32), lambda leaf: leaf[:, ::2]),
    "one example repeated": ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_attention_in_every_layout(name, dtype):
    shape, view = VIEWS[name]
    assert_attention_obeys(normal(*shape), dtype, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_activations_with_large_scores(dtype):
    assert_attention_obeys(activations(2, 197, 3, 2, 64) / 30, dtype)


def mlp_inputs(x, hidden):
    dim = x.shape[-1]
    weights = {"fc1_weight": normal(hidden, dim, seed=2) / dim**0.5, "fc1_bias": normal(hidden, seed=3)}
    return {"x": x} | weights | {"fc2_weight": normal(dim, hidden, seed=4) / hidden**0.5, "fc2_bias": normal(dim, seed=5)}


def mlp_forms(gelu, view):
    approximate = {"tanh": "tanh", "erf": "none"}[gelu]

    def plain(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        hidden = functional.gelu(x @ fc1_weight.T + fc1_bias, approximate=approximate)
        return hidden @ fc2_weight.T + fc2_bias

    def seen(form, *more):
        return lambda x, **weights: form(view(x), *weights.values(), *more)

    return seen(ops.mlp, gelu), seen(plain), seen(reference.mlp, gelu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("tokens", [1, 63, 197, 257])
def test_mlp_at_every_length(tokens, gelu, dtype):
    assert_as_exact_as_torch(*mlp_forms(gelu, lambda x: x), mlp_inputs(normal(2, tokens, 48) * 2, 80), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "view"),
    [((48, 65, 2), lambda x: x.permute(2, 1, 0)), ((2, 70, 96), lambda x: x[:, 5:, ::2]), ((1, 48), lambda x: x.expand(9, -1))],
    ids=["transposed", "sliced", "repeated"],
)
def test_mlp_in_every_layout(shape, view, dtype):
    inputs = mlp_inputs(normal(2, 3, 48), 80) | {"x": normal(*shape)}
    assert_as_exact_as_torch(*mlp_forms("tanh", view), inputs, dtype)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_linear_gelu_is_the_first_half_of_mlp(gelu):
    inputs = mlp_inputs(normal(2, 65, 48), 80)
    hidden = ops.linear_gelu(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], gelu)
    assert torch.equal(functional.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"]), ops.mlp(**inputs, gelu=gelu))


LAYER_NORM_VIEWS = {
    "as it lies": ((2, 65, 96), lambda x: x),
    "transposed": ((96, 65, 2), lambda x: x.permute(2, 1, 0)),
    "first token": ((4, 65, 96), lambda x: x[:, 0]),
    "every second channel": ((3, 192), lambda x: x[:, ::2]),
    "repeated": ((1, 96), lambda x: x.expand(7, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER_NORM_VIEWS)
def test_layer_norm(name, dtype):
    shape, view = LAYER_NORM_VIEWS[name]
    forms = (lambda x, weight, bias, f=f: f(view(x), weight, bias, 1e-6) for f in (ops.layer_norm, plain_layer_norm, reference.layer_norm))
    inputs = {"x": activations(*shape), "weight": normal(96, seed=2), "bias": normal(96, seed=3)}
    assert_as_exact_as_torch(*forms, inputs, dtype)


def plain_layer_norm(x, weight, bias, eps):
    return functional.layer_norm(x, (len(weight),), weight, bias, eps)


GRIDS = {
    "image": ((2, 1, 32, 48, 3), (1, 16, 16)),
    "clip": ((2, 6, 16, 24, 3), (2, 8, 8)),
    "spectrogram": ((2, 1, 64, 32, 1), (1, 16, 16)),
}


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
    grid = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([123.7, 116.3, 103.5])[: shape[4]], torch.tensor([58.4, 57.1, 57.4])[: shape[4]]
    assert_patch_embed_obeys(patch_embed_inputs(grid, tubelet, shape[4]), dtype, mean, std)


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
    assert_patch_embed_obeys(inputs, dtype, torch.tensor([-4.27, -4, 1]), torch.tensor([9.14, 9, 2]), view)


def test_patch_embed_normalises_before_it_rounds_to_bf16():
    even = torch.full((1, 1, 16, 16, 3), 124, dtype=torch.uint8)
    inputs = patch_embed_inputs(even, (1, 16, 16), 3)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("bias", "cls_token", "pos_embed")}
    assert_patch_embed_obeys(inputs, torch.bfloat16, torch.full((3,), 123.7), torch.full((3,), 58.4))


def test_patch_embed_leaves_the_grid_alone():
    grid = normal(2, 1, 16, 16, 3)
    before = grid.clone()
    ops.patch_embed(**patch_embed_inputs(grid, (1, 16, 16), 3), mean=torch.ones(3), std=torch.full((3,), 2.0))
    assert torch.equal(grid, before)


def test_tokens_stand_in_the_order_frames_rows_columns():
    grid = torch.arange(2 * 4 * 6).float().view(1, 2, 4, 6, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    inputs = {"weight": torch.zeros(1, 1, 2, 2, 1), "bias": torch.zeros(1), "cls_token": torch.full((1, 1, 1), -1.0)}
    inputs["weight"][..., 0, 0, :] = 1
    tokens = ops.patch_embed(grid, **inputs, pos_embed=torch.zeros(1, 49, 1), mean=torch.zeros(1), std=torch.ones(1))
    assert tokens.flatten().tolist() == list(range(-1, 48))


@pytest.mark.parametrize("operation", ["attention", "patch_embed", "layer_norm", "mlp"])
def test_gradients_are_the_same_in_every_run(operation):
    calls = {
        "attention": (ops.attention, {"qkv": normal(4, 65, 3, 4, 32)}),
        "patch_embed": (
            lambda **inputs: ops.patch_embed(**inputs, mean=torch.zeros(3), std=torch.ones(3)),
            patch_embed_inputs(normal(4, 1, 64, 64, 3), (1, 8, 8), 3),
        ),
        "layer_norm": (ops.layer_norm, {"x": normal(4, 65, 64), "weight": normal(64), "bias": normal(64)}),
        "mlp": (lambda **inputs: ops.mlp(**inputs, gelu="tanh"), mlp_inputs(normal(4, 65, 64), 128)),
    }
    first, second = (outputs_and_gradients(*calls[operation]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": normal(1, 16, 16, 3)}, r"\[1, 16, 16, 3\], but \[batch, frames, rows, columns, channels\] is needed"),
        ({"grid": normal(1, 1, 16, 20, 3)}, r"\(frames, rows, columns\) = \[1, 16, 20\] does not divide into tubelets of \[1, 8, 8\]"),
        ({"grid": normal(1, 1, 16, 16, 1)}, "the grid has 1 channels and the weight 3"),
        ({"grid": normal(1, 1, 32, 16, 3)}, r"\[1, 32, 16\] in tubelets of \[1, 8, 8\] makes 9 tokens, but there are 5 positions"),
    ],
)
def test_patch_embed_names_the_sizes_that_disagree(change, message):
    inputs = patch_embed_inputs(normal(1, 1, 16, 16, 3), (1, 8, 8), 3)
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**(inputs | change), mean=torch.zeros(3), std=torch.ones(3))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 4, 8)])
def test_attention_names_the_shape_it_needs(shape):
    with pytest.raises(ValueError, match=r"attention needs \[batch, tokens, 3, heads, head_dim\]"):
        ops.attention(normal(*shape))


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
