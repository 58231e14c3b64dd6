"""Linear layers with GELU by the comparison rule: truth is `reference.py` in fp64, the baseline plain PyTorch at the same dtype."""

from itertools import product

import pytest
import torch
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from long_forms import mark_long, pairs
from partial_gradients import assert_only_the_wanted
from samples import PLAIN_GELU, factors, normal
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {
    "contiguous": ((2, 5, 48), lambda x: x),
    "transposed": ((48, 5, 2), lambda x: x.permute(2, 1, 0)),
    "sliced": ((2, 9, 96), lambda x: x[:, 4:, ::2]),
    "repeated": ((1, 48), lambda x: x.expand(2, 5, -1)),
}


def linear_inputs(x, columns=48):
    return {"x": x, "weight": normal(columns, x.shape[-1], seed=2) / x.shape[-1] ** 0.5, "bias": normal(columns, seed=3)}


def mlp_inputs(x, hidden):
    dim = x.shape[-1]
    weights = {"fc1_weight": normal(hidden, dim, seed=2) / dim**0.5, "fc1_bias": normal(hidden, seed=3)}
    return {"x": x} | weights | {"fc2_weight": normal(dim, hidden, seed=4) / hidden**0.5, "fc2_bias": normal(dim, seed=5)}


def mlp_forms(gelu, view):
    def plain(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        hidden = PLAIN_GELU[gelu](x @ fc1_weight.T + fc1_bias)
        return hidden @ fc2_weight.T + fc2_bias

    def seen(form, *more):
        return lambda x, **weights: form(view(x), *weights.values(), *more)

    return seen(ops.mlp, gelu), seen(plain), seen(reference.mlp, gelu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf", "quick"])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf", "quick"])
@pytest.mark.parametrize("shape", [(48,), (7, 33), (2, 3, 5, 16)], ids=str)
def test_linear_gelu(shape, gelu, dtype):
    assert_as_exact_as_torch(
        lambda **inputs: ops.linear_gelu(**inputs, gelu=gelu),
        lambda **inputs: PLAIN_GELU[gelu](functional.linear(*inputs.values())),
        lambda **inputs: reference.linear_gelu(**inputs, kind=gelu),
        linear_inputs(normal(*shape) * 2, 65),
        dtype,
    )


@pytest.mark.parametrize("wider", [False, True], ids=["residual as x", "residual in fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_add(layout, dtype, wider):
    shape, view = LAYOUTS[layout]

    def residual_of(residual):
        return view(residual.to(torch.promote_types(residual.dtype, torch.float32)) if wider else residual)

    inputs = linear_inputs(normal(*shape)) | {"weight": normal(48, 48), "residual": 10 * normal(*shape, seed=7)}
    assert_as_exact_as_torch(
        lambda x, weight, bias, residual: ops.linear_add(view(x), weight, bias, residual_of(residual)),
        lambda x, weight, bias, residual: residual_of(residual) + functional.linear(view(x), weight, bias),
        lambda x, weight, bias, residual: reference.linear_add(view(x), weight, bias, residual_of(residual)),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("wider", [False, True], ids=["residual as x", "residual in fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "erf", "quick"])
def test_mlp_with_a_residual(gelu, dtype, wider):
    ours, plain, truth = mlp_forms(gelu, lambda x: x)

    def added(form, residual, layers):
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32)) if wider else residual
        return residual + form(**layers)

    def fused(residual, **layers):
        return ops.mlp(**layers, gelu=gelu, residual=residual.float() if wider else residual)

    inputs = mlp_inputs(normal(3, 21, 48) * 2, 80) | {"residual": 10 * normal(3, 21, 48, seed=7)}
    assert_as_exact_as_torch(
        fused,
        lambda residual, **layers: added(plain, residual, layers),
        lambda residual, **layers: added(truth, residual, layers),
        inputs,
        dtype,
    )
    apart = {name: tensor for name, tensor in inputs.items() if name != "residual"}
    torch.testing.assert_close(ops.mlp(**inputs, gelu=gelu), inputs["residual"] + ours(**apart))
    torch.testing.assert_close(reference.mlp(**inputs, kind=gelu), inputs["residual"] + truth(**apart))


@pytest.mark.parametrize("wider", [False, True], ids=["residual as x", "residual in fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear_add", "mlp"])
def test_examples_are_multiplied_by_their_factors(name, dtype, wider):
    some = factors(5)

    def ours(x, residual, **layers):
        residual = residual.float() if wider else residual
        if name == "mlp":
            return ops.mlp(x, **layers, gelu="tanh", residual=residual, factors=some)
        return ops.linear_add(x, layers["weight"], layers["bias"], residual, some)

    def by_hand(x, residual, **layers):
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32)) if wider else residual
        branch = plain_mlp(x, **layers) if name == "mlp" else x @ layers["weight"].T + layers["bias"]
        return residual + (some.to(torch.promote_types(x.dtype, torch.float32))[:, None, None] * branch).to(residual.dtype)

    def plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        return functional.gelu(x @ fc1_weight.T + fc1_bias, approximate="tanh") @ fc2_weight.T + fc2_bias

    x = normal(5, 21, 48)
    inputs = (mlp_inputs(x, 80) if name == "mlp" else linear_inputs(x)) | {"residual": 10 * normal(5, 21, 48, seed=7)}
    assert_as_exact_as_torch(ours, by_hand, by_hand, inputs, dtype)


def test_references_take_factors():
    inputs, residual, some = mlp_inputs(normal(5, 3, 48), 80), normal(5, 3, 48, seed=7), factors(5)
    expected = residual + some[:, None, None] * reference.mlp(**inputs, kind="erf")
    torch.testing.assert_close(reference.mlp(**inputs, kind="erf", residual=residual, factors=some), expected)


def test_factors_that_do_not_fit():
    inputs, residual = mlp_inputs(normal(2, 5, 48), 80), normal(2, 5, 48)
    layer = (normal(48, 48), normal(48))
    with pytest.raises(
        ValueError, match=r"factors are \[3\] torch.float32, but \[2\] torch.float32, one for each example of a stream \[2, 5, 48\]"
    ):
        ops.linear_add(inputs["x"], *layer, residual, factors(3))
    with pytest.raises(ValueError, match=r"factors are \[2\] torch.float16, but \[2\] torch.float32"):
        ops.mlp(**inputs, gelu="erf", residual=residual, factors=factors(2).half())
    with pytest.raises(ValueError, match="factors multiply what is added to a residual, but there is none"):
        ops.mlp(**inputs, gelu="erf", factors=factors(2))
    with pytest.raises(ValueError, match="one for each example"):
        ops.linear_add(normal(48), *layer, normal(48), factors(48))


@pytest.mark.parametrize("gelu", ["tanh", "erf", "quick"])
def test_linear_gelu_is_the_first_half_of_mlp(gelu):
    inputs = mlp_inputs(normal(2, 65, 48), 80)
    hidden = ops.linear_gelu(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], gelu)
    assert torch.equal(functional.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"]), ops.mlp(**inputs, gelu=gelu))


def test_gradients_are_the_same_in_every_run():
    call = (lambda **inputs: ops.mlp(**inputs, gelu="tanh"), mlp_inputs(normal(4, 65, 64), 128))
    first, second = (outputs_and_gradients(*call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def factors_for(residual):
    return factors(len(residual)).to(torch.promote_types(residual.dtype, torch.float32))


OPERATIONS = {
    "linear_gelu": (lambda **inputs: ops.linear_gelu(**inputs, gelu="erf"), lambda x: linear_inputs(x)),
    "linear_add": (ops.linear_add, lambda x: linear_inputs(x) | {"residual": normal(*x.shape, seed=7).to(x)}),
    "mlp": (lambda **inputs: ops.mlp(**inputs, gelu="tanh"), lambda x: mlp_inputs(x, 80)),
    "mlp with a residual": (
        lambda **inputs: ops.mlp(**inputs, gelu="erf"),
        lambda x: mlp_inputs(x, 80) | {"residual": normal(*x.shape, seed=7).to(x)},
    ),
    "linear_add with factors": (
        lambda **inputs: ops.linear_add(**inputs, factors=factors_for(inputs["residual"])),
        lambda x: linear_inputs(x) | {"residual": normal(*x.shape, seed=7).to(x)},
    ),
    "mlp with factors": (
        lambda **inputs: ops.mlp(**inputs, gelu="erf", factors=factors_for(inputs["residual"])),
        lambda x: mlp_inputs(x, 80) | {"residual": normal(*x.shape, seed=7).to(x)},
    ),
}


def leaves(name, x, dtype=torch.float32):
    inputs = OPERATIONS[name][1](x)
    return {key: tensor.detach().to(dtype).requires_grad_() for key, tensor in inputs.items()}


@pytest.mark.parametrize("layout", ["transposed", "sliced", "repeated"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_that_arrive_in_every_layout(name, layout):
    shape, view = LAYOUTS[layout]
    inputs = leaves(name, normal(2, 5, 48), torch.float64)
    output = OPERATIONS[name][0](**inputs)
    upstream = view(normal(*shape, seed=9).double())
    found, expected = (torch.autograd.grad(output, [*inputs.values()], g, retain_graph=True) for g in (upstream, upstream.contiguous()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_batch(name):
    inputs = leaves(name, normal(0, 5, 48))
    output = OPERATIONS[name][0](**inputs)
    assert output.shape == (0, 5, 48)
    gradients = torch.autograd.grad(output.sum(), [*inputs.values()])
    for gradient, leaf in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(name):
    inputs = leaves(name, normal(2, 5, 48))
    expected = dict(zip(inputs, torch.autograd.grad(OPERATIONS[name][0](**inputs).sum(), [*inputs.values()]), strict=True))
    weights = {key for key in inputs if key.endswith(("weight", "bias"))}
    for trained in (*({key} for key in inputs), weights, set(inputs) - weights):
        some = {key: leaf.detach().requires_grad_(key in trained) for key, leaf in inputs.items()}
        OPERATIONS[name][0](**some).sum().backward()
        for key, leaf in some.items():
            assert torch.equal(leaf.grad, expected[key]) if key in trained else leaf.grad is None


def test_of_hidden_tensors_the_activation_and_the_slope_are_kept():
    inputs = leaves("mlp", normal(2, 5, 48))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = ops.mlp(**inputs, gelu="erf", residual=normal(2, 5, 48))
    assert sorted(map(list, (tensor.shape for tensor in kept))) == [[2, 5, 48], [10, 80], [10, 80], [48, 80], [80, 48]]
    activation, slope = (tensor for tensor in kept if tensor.shape == (10, 80))
    pre = functional.linear(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"]).flatten(0, 1)
    torch.testing.assert_close(activation, functional.gelu(pre))
    torch.testing.assert_close(slope, torch.ops.aten.gelu_backward(torch.ones_like(pre), pre))
    with torch.no_grad():
        assert torch.equal(ops.mlp(**inputs, gelu="erf", residual=normal(2, 5, 48)), output)
        assert [tensor.numel() for tensor in torch.ops.polyvit.mlp(*inputs.values(), None, None, "erf", False)[1:]] == [0, 0]


OPCHECKED = [("transposed", torch.float32), ("contiguous", torch.bfloat16)]


@pytest.mark.parametrize(("layout", "dtype"), mark_long(product([*LAYOUTS, "empty"], DTYPES), OPCHECKED), ids=str)
@pytest.mark.usefixtures("unchecked_types")
def test_opcheck(layout, dtype):
    shape, view = (LAYOUTS | {"empty": ((0, 5, 48), lambda x: x)})[layout]

    def leaf(tensor):
        return tensor.detach().requires_grad_()

    x, residual = (leaf(view(normal(*shape, seed=seed).to(dtype))) for seed in (0, 7))
    layers = [leaf(tensor.to(dtype)) for name, tensor in mlp_inputs(normal(1, 48), 80).items() if name != "x"]
    calls = {
        "linear_gelu": (x, *layers[:2], "erf", True),
        "linear_add": (x, leaf(normal(48, 48).to(dtype)), layers[3], residual, factors(len(x))),
        "mlp": (x, *layers, leaf(view(normal(*shape))), factors(len(x)), "tanh", True),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.polyvit, name).default, arguments)
    x, residual, *layers = (tensor.detach() for tensor in (x, residual, *layers))
    torch.library.opcheck(torch.ops.polyvit.mlp.default, (x, *layers, None, None, "erf", False))
    torch.library.opcheck(torch.ops.polyvit.linear_gelu.default, (x, *layers[:2], "quick", True))
    rows = x.shape[:-1].numel()
    activation, slope = (normal(rows, 80, seed=seed).to(dtype) for seed in (8, 9))
    d_hidden = view(normal(*shape)).flatten(0, 1)[:, :1].expand(rows, 80).to(dtype).view(*x.shape[:-1], 80)
    backward = {
        "linear_gelu_backward": (d_hidden, x, layers[0], slope, [True, True, True]),
        "linear_add_backward": (residual.float(), x, normal(48, 48).to(dtype), factors(len(x)), [False, True, True]),
        "mlp_backward": (residual, x, layers[0], activation, slope, layers[2], None, [True, True, False, True, True]),
    }
    for name, arguments in backward.items():
        torch.library.opcheck(getattr(torch.ops.polyvit, name).default, arguments)


@pytest.mark.parametrize(("name", "autocast"), pairs(OPERATIONS, (False, True)))
@pytest.mark.usefixtures("unchecked_types")
def test_compiled_whole_it_is_the_same(name, autocast):
    inputs = leaves(name, normal(2, 5, 48))
    torch.compiler.reset()  # or the cases before count as compiled too often

    def run(**inputs):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return OPERATIONS[name][0](**inputs)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (outputs_and_gradients(form, inputs) for form in (compiled, run))
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_torchs_own_dtypes_and_values(residual_dtype):
    inputs = leaves("mlp", normal(2, 5, 48))
    x, *layers = inputs.values()
    residual = normal(2, 5, 48, seed=7).to(residual_dtype).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        hidden = functional.gelu(functional.linear(x, *layers[:2]))
        expected = [hidden, functional.linear(hidden, *layers[2:]), residual + functional.linear(x, layers[0][:48], layers[3])]
        expected.append(residual + expected[1])
        found = [
            ops.linear_gelu(x, *layers[:2], "erf"),
            ops.mlp(*inputs.values(), "erf"),
            ops.linear_add(x, layers[0][:48], layers[3], residual),
            ops.mlp(*inputs.values(), "erf", residual),
        ]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    wanted = [*inputs.values(), residual]
    gradients, plain = (torch.autograd.grad(tensors[3].sum(), wanted) for tensors in (found, expected))
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in wanted]
    torch.testing.assert_close(gradients, plain, rtol=2e-2, atol=5e-2)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(("layout", "gelu"), pairs(LAYOUTS, PLAIN_GELU))
def test_the_kernels_that_the_tile_table_chooses(layout, gelu):
    shape, view = LAYOUTS[layout]

    def chained(linear_gelu, linear_add, mlp):
        def run(x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
            hidden = linear_gelu(view(x), fc1_weight, fc1_bias, gelu)
            y = linear_add(hidden, fc2_weight, fc2_bias, view(residual))
            return mlp(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gelu, view(residual)).transpose(0, 1)

        return run

    def plain_gelu(x, weight, bias, gelu):
        return PLAIN_GELU[gelu](functional.linear(x, weight, bias))

    def plain_add(x, weight, bias, residual):
        return residual + functional.linear(x, weight, bias)

    def plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gelu, residual):
        return plain_add(plain_gelu(x, fc1_weight, fc1_bias, gelu), fc2_weight, fc2_bias, residual)

    inputs = {"x": normal(*shape), "residual": normal(*shape, seed=7)}
    inputs |= {name: tensor for name, tensor in mlp_inputs(normal(1, 48), 80).items() if name != "x"}
    assert_as_exact_as_torch(
        chained(ops.linear_gelu, ops.linear_add, ops.mlp),
        chained(plain_gelu, plain_add, plain_mlp),
        chained(reference.linear_gelu, reference.linear_add, reference.mlp),
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc1_weight": (80, 47)}, r"fc1_weight \[80, 47\] and fc1_bias \[80\] meet an input of \[48\] features"),
        ({"fc1_bias": (79,)}, r"fc1_bias \[79\]"),
        ({"fc2_weight": (48, 81)}, r"fc2_weight \[48, 81\] and fc2_bias \[48\] meet an input of \[80\] features"),
        ({"fc2_weight": (48,)}, r"but \[out, in\], \[out\] and \[in\] are needed"),
        ({"residual": (2, 5, 1)}, r"the residual has the shape \[2, 5, 1\], but \[2, 5, 48\]"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_types")
def test_sizes_that_do_not_fit_are_told(changes, message):
    inputs = mlp_inputs(normal(2, 5, 48), 80) | {name: normal(*shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        ops.mlp(**inputs, gelu="erf")


@pytest.mark.usefixtures("unchecked_types")
def test_other_mistakes_are_told():
    inputs = linear_inputs(normal(2, 5, 48))
    with pytest.raises(ValueError, match="gelu is 'relu', but 'tanh', 'erf', 'quick' are what there is"):
        ops.linear_gelu(**inputs, gelu="relu")
    with pytest.raises(ValueError, match=r"x is torch.float32, weight torch.bfloat16 and bias torch.float32, but one dtype is needed"):
        ops.linear_gelu(**inputs | {"weight": inputs["weight"].bfloat16()}, gelu="erf")
    with pytest.raises(ValueError, match=r"an input of \[\] features"):
        ops.linear_gelu(**inputs | {"x": torch.tensor(1.0)}, gelu="erf")
    with pytest.raises(ValueError, match="must be on one device"):
        ops.linear_add(**inputs, residual=inputs["x"].to("meta"))
    with pytest.raises(ValueError, match=r"residual is torch.int64, but a floating-point dtype is needed"):
        ops.linear_add(**inputs, residual=inputs["x"].long())


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_no_floating_point_ones_are_told(dtype, autocast):
    small = linear_inputs(normal(2, 5, 48)) | {"residual": normal(2, 5, 48)}
    large = mlp_inputs(normal(2, 5, 48), 80) | {"residual": normal(2, 5, 48)}
    calls = [(ops.linear_add, small, {}), (ops.mlp, large, {"gelu": "erf"})]
    calls.append((ops.linear_gelu, {name: small[name] for name in ("x", "weight", "bias")}, {"gelu": "erf"}))
    for call, inputs, more in calls:
        for name in inputs:
            with (
                torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast),
                pytest.raises(ValueError, match=f"{name} is {dtype}, but a floating-point dtype is needed"),
            ):
                call(**inputs | {name: inputs[name].to(dtype)}, **more)


MULTIPLIED = 2 * 10 * 48 * 80
"""The operations of one product of the MLP below."""
PARTIAL = {
    "mlp": {"x": 2, "fc1_weight": 2, "fc1_bias": 1, "fc2_weight": 1, "fc2_bias": 0},
    "mlp and residual": {"x": 2, "fc1_weight": 2, "fc1_bias": 1, "fc2_weight": 1, "fc2_bias": 0, "residual": 0},
    "linear_gelu": {"x": 1, "weight": 1, "bias": 0},
    "linear_add": {"x": 1, "weight": 1, "bias": 0, "residual": 0},
}


@pytest.mark.parametrize("path", ["registered", "on_kernels"])
@pytest.mark.parametrize("name", mark_long(PARTIAL, ["mlp", "linear_add"]))
def test_a_gradient_that_nobody_wants_costs_nothing(name, path, request):
    request.getfixturevalue(path)
    x, residual = normal(2, 5, 48), {"residual": normal(2, 5, 80, seed=7)}
    forms = {
        "mlp": (lambda **given: ops.mlp(**given, gelu="erf"), mlp_inputs(x, 80)),
        "mlp and residual": (lambda **given: ops.mlp(**given, gelu="erf"), mlp_inputs(x, 80) | {"residual": normal(2, 5, 48, seed=7)}),
        "linear_gelu": (lambda **given: ops.linear_gelu(**given, gelu="erf"), linear_inputs(x, 80)),
        "linear_add": (ops.linear_add, linear_inputs(x, 80) | residual),
    }
    assert_only_the_wanted(*forms[name], {key: products * MULTIPLIED for key, products in PARTIAL[name].items()})
