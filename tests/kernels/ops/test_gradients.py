"""What a backward pass attaches to its gradient is used by the next one as long as the tensor is the same, unchanged."""

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

COPY, SUMS = 2, 3
"""What `AttachWrong` multiplies by, so that the gradients of a weight and of a bias show whether the attached tensors were used."""


class AttachWrong(torch.autograd.Function):
    """Passes its gradient on with a copy and column sums attached that are wrong, as the use of right ones would not show."""

    @staticmethod
    def forward(ctx, x, copy_dtype=torch.bfloat16):
        ctx.copy_dtype = copy_dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        copy, sums = (COPY * grad).to(ctx.copy_dtype), SUMS * grad.flatten(0, -2).sum(0)
        return gradients.attach(grad.clone(), copy=copy, sums=sums), None


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


def assert_used(found, plain, copy=COPY, sums=SUMS):
    torch.testing.assert_close(found["residual"], plain["residual"])
    for name, factor in (("x", copy), ("weight", copy), ("bias", sums)):
        torch.testing.assert_close(found[name], factor * plain[name], rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_attached_is_used(layer):
    assert_used(gradients_of(AttachWrong.apply, layer), gradients_of(lambda y: y, layer))


def attach_twice(y):
    y = AttachWrong.apply(y)
    y.register_hook(lambda grad: None)
    return AttachWrong.apply(y)


STILL_TRUE = {
    "a hook that looks": lambda y: (y.register_hook(lambda grad: None), AttachWrong.apply(y))[1],
    "attached twice": attach_twice,
    "checkpointed": lambda y: checkpoint(AttachWrong.apply, y, use_reentrant=False),
}


@pytest.mark.parametrize("use", STILL_TRUE.values(), ids=STILL_TRUE)
def test_it_is_used_where_the_tensor_is_passed_on(use):
    assert_used(gradients_of(use), gradients_of(lambda y: y))


def with_hook(hook):
    def use(y):
        y.register_hook(hook)
        return AttachWrong.apply(y)

    return use


class InPlace(torch.autograd.Function):
    """Changes its gradient, and hands on the very tensor."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


NO_LONGER = {  # and the same without attaching
    "added after": (lambda y: AttachWrong.apply(y) + y, lambda y: y + y),
    "added before": (lambda y: y + AttachWrong.apply(y), lambda y: y + y),
    "two attach": (lambda y: AttachWrong.apply(y) + AttachWrong.apply(y), lambda y: y + y),
    "three consumers": (lambda y: AttachWrong.apply(y) + 2 * y + 3 * y, lambda y: y + 2 * y + 3 * y),
    "replaced by a hook": (with_hook(lambda grad: grad * 2), lambda y: (y.register_hook(lambda grad: grad * 2), y * 1)[1]),
    "changed by a hook": (with_hook(lambda grad: grad.mul_(2)), lambda y: (y.register_hook(lambda grad: grad * 2), y * 1)[1]),
    "changed on the way": (
        lambda y: AttachWrong.apply(InPlace.apply(AttachWrong.apply(InPlace.apply(y)))),
        lambda y: InPlace.apply(InPlace.apply(y)),
    ),
    "a view": (lambda y: AttachWrong.apply(y.flatten(0, 1)), lambda y: y.flatten(0, 1)),
    "a part": (lambda y: AttachWrong.apply(y[:1]), lambda y: y[:1]),
    "cast": (lambda y: AttachWrong.apply(y.double()), lambda y: y.double()),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NO_LONGER)
def test_what_is_no_longer_true_is_not_used(name, layer):
    use, plain = NO_LONGER[name]
    assert_used(gradients_of(use, layer), gradients_of(plain, layer), copy=1, sums=1)


def test_a_copy_in_another_dtype_is_not_used():
    assert_used(gradients_of(lambda y: AttachWrong.apply(y, torch.float16)), gradients_of(lambda y: y), copy=1)


def test_sums_are_not_widened():
    grad = gradients.attach(normal(3, 5), sums=normal(5, seed=1).bfloat16())
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32), grad.sum(0))
    assert torch.equal(gradients.sum_columns(grad, 5, torch.bfloat16), normal(5, seed=1).bfloat16())


def test_sums_are_given_away_once():
    grad = gradients.attach(normal(3, 5), sums=normal(5, seed=1))
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32), normal(5, seed=1))
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32), grad.sum(0))


def test_attached_tensors_that_were_changed_are_not_used():
    copy, sums = normal(3, 5, seed=1).bfloat16(), normal(5, seed=2)
    grad = gradients.attach(normal(3, 5), copy=copy, sums=sums)
    assert gradients.cast_gradient(grad, torch.bfloat16) is copy
    copy.add_(1)
    assert torch.equal(gradients.cast_gradient(grad, torch.bfloat16), grad.bfloat16())
    sums.add_(1)
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32), grad.sum(0))


def test_sums_have_the_columns_that_are_asked_for():
    grad = normal(2, 4, 3, 2, 5)
    assert torch.equal(gradients.sum_columns(grad, 30, torch.float32), grad.sum((0, 1)).flatten())
    gradients.attach(grad, sums=normal(3, 2, 5))
    assert torch.equal(gradients.sum_columns(grad, 30, torch.float32), normal(3, 2, 5).flatten())


def test_empty_tensors_count_as_none():
    grad = gradients.attach(normal(3, 5), copy=torch.empty(0, dtype=torch.bfloat16), sums=torch.empty(0))
    assert torch.equal(gradients.cast_gradient(grad, torch.bfloat16), grad.bfloat16())
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32), grad.sum(0))


def test_two_biases_that_meet_the_same_sums_have_a_gradient_each():
    biases = [torch.zeros(24, requires_grad=True) for _ in range(2)]
    outs = [ops.linear_add(normal(4, 16), normal(24, 16), bias, torch.zeros(4, 24)) for bias in biases]
    grad = gradients.attach(normal(4, 24), sums=normal(4, 24).sum(0))
    torch.autograd.backward(outs, [grad, grad])
    biases[0].grad.zero_()
    torch.testing.assert_close(biases[1].grad, grad.sum(0))


def test_attached_tensors_are_freed_with_the_gradient():
    copy = normal(3, 5).bfloat16()
    grad, alive = gradients.attach(normal(3, 5), copy=copy), weakref.ref(copy)
    del copy
    assert alive() is not None
    del grad
    gc.collect()
    assert alive() is None


def test_with_factors_it_belongs_to_the_product_and_to_the_same_factors():
    some, others = factors(3), factors(3)
    grad = gradients.attach(normal(3, 2, 5), copy=normal(3, 2, 5, seed=1).bfloat16(), sums=normal(5, seed=2), factors=some)
    for who in (None, others):
        expected = grad if who is None else grad * who[:, None, None]
        assert torch.equal(gradients.cast_gradient(grad, torch.bfloat16, who), expected.bfloat16())
        assert torch.equal(gradients.sum_columns(grad, 5, torch.float32, who), expected.sum((0, 1)))
    assert torch.equal(gradients.cast_gradient(grad, torch.bfloat16, some), normal(3, 2, 5, seed=1).bfloat16())
    assert torch.equal(gradients.cast_gradient(grad, torch.float16, some), (grad * some[:, None, None]).half())
    assert torch.equal(gradients.sum_columns(grad, 5, torch.float32, some), normal(5, seed=2))
    plain = gradients.attach(normal(3, 2, 5), copy=normal(3, 2, 5, seed=1).bfloat16(), sums=normal(5, seed=2))
    assert torch.equal(gradients.cast_gradient(plain, torch.bfloat16, some), (plain * some[:, None, None]).bfloat16())


def test_factors_are_found_on_the_stream_that_they_were_kept_with():
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
def attached(monkeypatch):
    """What norms attach to their gradients, in order."""
    calls, attach = [], gradients.attach
    monkeypatch.setattr(gradients, "attach", lambda grad, **known: calls.append(known) or attach(grad, **known))
    return calls


def forbid_attaching(monkeypatch):
    monkeypatch.setattr(gradients, "can_attach", lambda grad: False)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_stream_learns_the_same(recompute, attached, monkeypatch):
    def run(x, weights):
        return checkpoint(block, x, weights, use_reentrant=False) if recompute else block(x, weights)

    found = stream(run)
    assert len([known for known in attached if known["sums"].numel()]) == 6  # of the six norms
    forbid_attaching(monkeypatch)
    for ours, plain in zip(found, stream(run), strict=True):
        assert torch.equal(ours, plain)


def test_a_whole_stream_with_factors_learns_the_same_without_a_pass_more(attached, monkeypatch):
    some, others, products = factors(2), 2 * factors(2), []
    multiply = gradients.multiply

    def run(x, weights):
        return block(x, weights, some, others)

    monkeypatch.setattr(gradients, "multiply", lambda x, factors: products.append(factors) or multiply(x, factors))
    found = stream(run)
    assert [known["factors"] for known in attached if "copy" in known] == [some, others, some, others, some, None]
    # The last layer's, which no norm follows; the others' by norms, in their own pass.
    assert [factors for factors in products if factors is not None] == [others, some, others, some, others, some]
    forbid_attaching(monkeypatch)
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
def test_nothing_is_attached_in_a_compiled_graph(monkeypatch):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = stream(compiled)
    forbid_attaching(monkeypatch)
    for ours, plain in zip(found, stream(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_add_layer_norm_attaches_too(attached):
    x, residual = normal(3, 16).requires_grad_(), normal(3, 16, seed=1).requires_grad_()
    total, out = kernels.add_layer_norm(x, residual, torch.ones(16), torch.zeros(16), out_dtype=torch.bfloat16)
    (total.sum() + out.float().square().sum()).backward()
    [known] = attached
    assert torch.equal(known["copy"], x.grad.bfloat16())
    torch.testing.assert_close(known["sums"], x.grad.sum(0).bfloat16())


@pytest.mark.parametrize(
    ("stream", "autocast", "out", "copy"),
    [
        (torch.float32, True, torch.bfloat16, torch.bfloat16),
        (torch.float32, True, torch.float32, torch.bfloat16),
        (torch.float32, False, torch.bfloat16, torch.bfloat16),
        (torch.float32, False, torch.float32, None),
        (torch.bfloat16, True, torch.float32, None),
        (torch.bfloat16, False, torch.bfloat16, None),
    ],
)
def test_the_copy_has_the_dtype_that_products_read(stream, autocast, out, copy, attached):
    x = normal(3, 16).to(stream).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        residual, normed = ops.layer_norm_residual(x, torch.ones(16), torch.zeros(16), out_dtype=out)
    (residual.float().square().sum() + normed.float().sum()).backward()
    [known] = attached
    assert known["sums"].dtype is (copy or stream)
    assert known["copy"].dtype is copy if copy else not known["copy"].numel()
