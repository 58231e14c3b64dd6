"""What a backward pass tells the next one about a gradient is believed as long as it is true of that very tensor."""

import gc
import weakref

import pytest
import torch
from compare import DEVICE
from samples import factors, normal
from torch.utils.checkpoint import checkpoint

import polyvit_kernels as kernels
from polyvit_kernels import ops
from polyvit_kernels.ops import gradients

LOW, SUMS = 2, 3
"""What `Telling` multiplies by, so that it shows in the gradients of a weight and of a bias who believed it."""


class Telling(torch.autograd.Function):
    """Hands its gradient on with a rounded form and sums that are wrong, as nobody would notice right ones."""

    @staticmethod
    def forward(ctx, x, low_dtype=torch.bfloat16):
        ctx.low_dtype = low_dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        low, sums = (LOW * grad).to(ctx.low_dtype), SUMS * grad.flatten(0, -2).sum(0)
        return gradients.attach(grad.clone(), low=low, sums=sums), None


def linear_add(leaves):
    return ops.linear_add(leaves["x"], leaves["weight"], leaves["bias"], leaves["residual"])


def mlp(leaves):
    return ops.mlp(
        leaves["x"], torch.eye(16).bfloat16(), torch.zeros(16).bfloat16(), leaves["weight"], leaves["bias"], "erf", leaves["residual"]
    )


LAYERS = {"linear_add": linear_add, "mlp": mlp}


def gradients_of(use, layer="linear_add"):
    """Of a bf16 layer on an fp32 residual, by what `use` makes of its output."""
    made = {"x": normal(2, 3, 16), "weight": normal(24, 16), "bias": normal(24)}
    leaves = {name: tensor.bfloat16().requires_grad_() for name, tensor in made.items()}
    leaves["residual"] = normal(2, 3, 24, seed=1).requires_grad_()
    use(LAYERS[layer](leaves)).square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_believed(found, plain, low=LOW, sums=SUMS):
    torch.testing.assert_close(found["residual"], plain["residual"])
    for name, factor in (("x", low), ("weight", low), ("bias", sums)):
        torch.testing.assert_close(found[name], factor * plain[name], rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_told_is_taken(layer):
    assert_believed(gradients_of(Telling.apply, layer), gradients_of(lambda y: y, layer))


def twice_told(y):
    y = Telling.apply(y)
    y.register_hook(lambda grad: None)
    return Telling.apply(y)


STILL_TRUE = {
    "a hook that looks": lambda y: (y.register_hook(lambda grad: None), Telling.apply(y))[1],
    "told twice": twice_told,
    "checkpointed": lambda y: checkpoint(Telling.apply, y, use_reentrant=False),
}


@pytest.mark.parametrize("use", STILL_TRUE.values(), ids=STILL_TRUE)
def test_it_is_taken_where_the_tensor_is_handed_on(use):
    assert_believed(gradients_of(use), gradients_of(lambda y: y))


def with_hook(hook):
    def use(y):
        y.register_hook(hook)
        return Telling.apply(y)

    return use


class InPlace(torch.autograd.Function):
    """Changes its gradient, and hands on the very tensor."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


NO_LONGER = {  # and the same without a word
    "added after": (lambda y: Telling.apply(y) + y, lambda y: y + y),
    "added before": (lambda y: y + Telling.apply(y), lambda y: y + y),
    "two tell": (lambda y: Telling.apply(y) + Telling.apply(y), lambda y: y + y),
    "three consumers": (lambda y: Telling.apply(y) + 2 * y + 3 * y, lambda y: y + 2 * y + 3 * y),
    "replaced by a hook": (with_hook(lambda grad: grad * 2), lambda y: (y.register_hook(lambda grad: grad * 2), y * 1)[1]),
    "changed by a hook": (with_hook(lambda grad: grad.mul_(2)), lambda y: (y.register_hook(lambda grad: grad * 2), y * 1)[1]),
    "changed on the way": (
        lambda y: Telling.apply(InPlace.apply(Telling.apply(InPlace.apply(y)))),
        lambda y: InPlace.apply(InPlace.apply(y)),
    ),
    "a view": (lambda y: Telling.apply(y.flatten(0, 1)), lambda y: y.flatten(0, 1)),
    "a part": (lambda y: Telling.apply(y[:1]), lambda y: y[:1]),
    "cast": (lambda y: Telling.apply(y.double()), lambda y: y.double()),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NO_LONGER)
def test_what_is_no_longer_true_is_not_taken(name, layer):
    use, plain = NO_LONGER[name]
    assert_believed(gradients_of(use, layer), gradients_of(plain, layer), low=1, sums=1)


def test_a_rounded_form_in_another_dtype_is_not_taken():
    assert_believed(gradients_of(lambda y: Telling.apply(y, torch.float16)), gradients_of(lambda y: y), low=1)


def test_sums_are_not_widened():
    grad = gradients.attach(normal(3, 5), sums=normal(5, seed=1).bfloat16())
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32), grad.sum(0))
    assert torch.equal(gradients.column_sums(grad, 5, torch.bfloat16), normal(5, seed=1).bfloat16())


def test_sums_are_given_away_once():
    grad = gradients.attach(normal(3, 5), sums=normal(5, seed=1))
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32), normal(5, seed=1))
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32), grad.sum(0))


def test_what_was_told_may_not_be_changed_either():
    low, sums = normal(3, 5, seed=1).bfloat16(), normal(5, seed=2)
    grad = gradients.attach(normal(3, 5), low=low, sums=sums)
    assert gradients.low_form(grad, torch.bfloat16) is low
    low.add_(1)
    assert torch.equal(gradients.low_form(grad, torch.bfloat16), grad.bfloat16())
    sums.add_(1)
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32), grad.sum(0))


def test_sums_have_the_columns_that_are_asked_for():
    grad = normal(2, 4, 3, 2, 5)
    assert torch.equal(gradients.column_sums(grad, 30, torch.float32), grad.sum((0, 1)).flatten())
    gradients.attach(grad, sums=normal(3, 2, 5))
    assert torch.equal(gradients.column_sums(grad, 30, torch.float32), normal(3, 2, 5).flatten())


def test_empty_tensors_tell_nothing():
    grad = gradients.attach(normal(3, 5), low=torch.empty(0, dtype=torch.bfloat16), sums=torch.empty(0))
    assert torch.equal(gradients.low_form(grad, torch.bfloat16), grad.bfloat16())
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32), grad.sum(0))


def test_two_biases_that_meet_the_same_sums_have_a_gradient_each():
    biases = [torch.zeros(24, requires_grad=True) for _ in range(2)]
    outs = [ops.linear_add(normal(4, 16), normal(24, 16), bias, torch.zeros(4, 24)) for bias in biases]
    grad = gradients.attach(normal(4, 24), sums=normal(4, 24).sum(0))
    torch.autograd.backward(outs, [grad, grad])
    biases[0].grad.zero_()
    torch.testing.assert_close(biases[1].grad, grad.sum(0))


def test_it_goes_when_the_gradient_goes():
    low = normal(3, 5).bfloat16()
    grad, alive = gradients.attach(normal(3, 5), low=low), weakref.ref(low)
    del low
    assert alive() is not None
    del grad
    gc.collect()
    assert alive() is None


def test_with_factors_it_is_of_the_product_and_for_who_has_the_same():
    some, others = factors(3), factors(3)
    grad = gradients.attach(normal(3, 2, 5), low=normal(3, 2, 5, seed=1).bfloat16(), sums=normal(5, seed=2), factors=some)
    for who in (None, others):
        expected = grad if who is None else grad * who[:, None, None]
        assert torch.equal(gradients.low_form(grad, torch.bfloat16, who), expected.bfloat16())
        assert torch.equal(gradients.column_sums(grad, 5, torch.float32, who), expected.sum((0, 1)))
    assert torch.equal(gradients.low_form(grad, torch.bfloat16, some), normal(3, 2, 5, seed=1).bfloat16())
    assert torch.equal(gradients.low_form(grad, torch.float16, some), (grad * some[:, None, None]).half())
    assert torch.equal(gradients.column_sums(grad, 5, torch.float32, some), normal(5, seed=2))
    plain = gradients.attach(normal(3, 2, 5), low=normal(3, 2, 5, seed=1).bfloat16(), sums=normal(5, seed=2))
    assert torch.equal(gradients.low_form(plain, torch.bfloat16, some), (plain * some[:, None, None]).bfloat16())


def test_factors_are_found_beside_the_stream_that_they_were_kept_with():
    some, x = factors(3), normal(3, 2, 5)
    assert gradients.find_factors(gradients.keep_factors(x, None)) is None
    assert gradients.find_factors(gradients.keep_factors(x, some)) is some
    assert gradients.find_factors(x[:, :1]) is gradients.find_factors(x + 0) is None


def block(x, weights, mixed_factors=None, mlp_factors=None):
    """A residual stream through both kinds of layers and norms; `weights` in bf16 but the norms'."""
    scale, shift, qkv, qkv_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = weights
    x, normed = ops.layer_norm_residual(x, scale, shift, out_dtype=torch.bfloat16, factors=gradients.find_factors(x))
    mixed = ops.attention(ops.linear(normed, qkv, qkv_bias, (3, 2, -1))).flatten(2)
    x = ops.linear_add(mixed, proj, proj_bias, x, mixed_factors)
    x, normed = ops.layer_norm_residual(x, scale, shift, out_dtype=torch.bfloat16, factors=mixed_factors)
    return gradients.keep_factors(ops.mlp(normed, fc1, fc1_bias, fc2, fc2_bias, "erf", x, mlp_factors), mlp_factors)


def stream(run=block):
    shapes = [(32,), (32,), (96, 32), (96,), (32, 32), (32,), (64, 32), (64,), (32, 64), (32,)]
    weights = [
        (normal(*shape, seed=seed) / shape[-1] ** 0.5).to(torch.bfloat16 if seed > 1 else torch.float32)
        for seed, shape in enumerate(shapes)
    ]
    leaves = [tensor.requires_grad_() for tensor in (*weights, normal(2, 7, 32, seed=20))]
    x = leaves[-1]
    for _ in range(3):
        x = run(x, leaves[:-1])
    return torch.autograd.grad(x.square().sum(), leaves)


@pytest.fixture
def told(monkeypatch):
    """What norms say about their gradients, as it is said."""
    said, attach = [], gradients.attach
    monkeypatch.setattr(gradients, "attach", lambda grad, **known: said.append(known) or attach(grad, **known))
    return said


def without_a_word(monkeypatch):
    monkeypatch.setattr(gradients, "can_attach", lambda grad: False)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_stream_learns_the_same(recompute, told, monkeypatch):
    def run(x, weights):
        return checkpoint(block, x, weights, use_reentrant=False) if recompute else block(x, weights)

    found = stream(run)
    assert len([known for known in told if known["sums"].numel()]) == 6  # of the six norms
    without_a_word(monkeypatch)
    for ours, plain in zip(found, stream(run), strict=True):
        assert torch.equal(ours, plain)


def test_a_whole_stream_with_factors_learns_the_same_without_a_pass_more(told, monkeypatch):
    some, others, products = factors(2), 2 * factors(2), []
    multiply = gradients.multiply

    def run(x, weights):
        return block(x, weights, some, others)

    monkeypatch.setattr(gradients, "multiply", lambda x, factors: products.append(factors) or multiply(x, factors))
    found = stream(run)
    assert [known["factors"] for known in told if "low" in known] == [some, others, some, others, some, None]
    # The last layer's, which no norm follows; the others' by norms, in their own pass.
    assert [factors for factors in products if factors is not None] == [others, some, others, some, others, some]
    without_a_word(monkeypatch)
    for ours, plain in zip(found, stream(run), strict=True):
        assert torch.equal(ours, plain)
    assert not torch.equal(found[-1], stream()[-1])


def test_gradients_that_are_wanted_twice_are_the_same():
    x, scale, shift = normal(4, 16).requires_grad_(), torch.ones(16), torch.zeros(16)
    weight, bias = normal(16, 16).bfloat16().requires_grad_(), normal(16).bfloat16().requires_grad_()
    y = ops.linear_add(normal(4, 16).bfloat16(), weight, bias, x)
    loss = sum(part.square().sum() for part in ops.layer_norm_residual(y, scale, shift, out_dtype=torch.bfloat16))
    runs = [torch.autograd.grad(loss, (x, weight, bias), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("unchecked_types")
def test_nothing_is_told_in_a_compiled_graph(monkeypatch):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = stream(compiled)
    without_a_word(monkeypatch)
    for ours, plain in zip(found, stream(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_add_layer_norm_tells_too(told):
    x, residual = normal(3, 16).requires_grad_(), normal(3, 16, seed=1).requires_grad_()
    total, out = kernels.add_layer_norm(x, residual, torch.ones(16), torch.zeros(16), out_dtype=torch.bfloat16)
    (total.sum() + out.float().square().sum()).backward()
    [known] = told
    assert torch.equal(known["low"], x.grad.bfloat16())
    torch.testing.assert_close(known["sums"], x.grad.sum(0).bfloat16())


@pytest.mark.parametrize(
    ("stream", "autocast", "out", "low"),
    [
        (torch.float32, True, torch.bfloat16, torch.bfloat16),
        (torch.float32, True, torch.float32, torch.bfloat16),
        (torch.float32, False, torch.bfloat16, torch.bfloat16),
        (torch.float32, False, torch.float32, None),
        (torch.bfloat16, True, torch.float32, None),
        (torch.bfloat16, False, torch.bfloat16, None),
    ],
)
def test_the_rounded_form_is_what_products_read(stream, autocast, out, low, told):
    x = normal(3, 16).to(stream).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        residual, normed = ops.layer_norm_residual(x, torch.ones(16), torch.zeros(16), out_dtype=out)
    (residual.float().square().sum() + normed.float().sum()).backward()
    [known] = told
    assert known["sums"].dtype is (low or stream)
    assert known["low"].dtype is low if low else not known["low"].numel()
