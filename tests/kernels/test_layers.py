"""Whether a layer's parameters may be read or the layer has to run, and that both give the same."""

from types import SimpleNamespace

import pytest
import torch
from compare import DEVICE
from low_rank import LowRank
from samples import factors, normal
from torch import nn

from polyvit_kernels import ops
from polyvit_kernels.layers import add_branch, add_linear, has_hooks, is_plain, is_untouched, norm_residual, project


def linear(features_in=6, features_out=8):
    torch.manual_seed(0)
    return nn.Linear(features_in, features_out).to(DEVICE)


def hooked(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)
    return module


@pytest.fixture
def called(monkeypatch):
    """The operations that were called, in their order."""
    names = []
    for name in ("linear", "linear_add", "layer_norm_residual"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, function=function: (names.append(name), function(*args))[1])
    return names


def test_what_a_plain_linear_layer_is():
    assert is_plain(nn.Linear(2, 3))
    assert is_plain(nn.MultiheadAttention(4, 2).out_proj)
    assert not is_plain(nn.Linear(2, 3, bias=False))
    assert not is_plain(LowRank(nn.Linear(2, 3)))
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    assert not is_plain(nn.LazyLinear(3))
    with_hook, replaced = nn.Linear(2, 3), nn.Linear(2, 3)
    handle = with_hook.register_forward_pre_hook(lambda module, args: None)
    replaced.forward = lambda x: x
    assert not is_plain(with_hook)
    assert not is_plain(replaced)
    assert has_hooks(with_hook)
    assert not has_hooks(replaced)
    assert not is_untouched(replaced)
    handle.remove()
    assert is_plain(with_hook)
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert not is_plain(with_hook)
    everywhere.remove()
    assert is_plain(with_hook)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind_are_seen(kind):
    module = nn.Linear(2, 3)
    getattr(module, f"register_{kind}_hook")(lambda *_: None)
    assert has_hooks(module)


def test_a_projection_has_the_shape_that_is_asked_for(called):
    layer, x = linear(), normal(3, 5, 6)
    for shape in [(-1,), (2, 4), (2, 2, -1)]:
        expected = layer(x).view(3, 5, *torch.empty(8).view(shape).shape)
        torch.testing.assert_close(project(layer, x, shape), expected)
    assert called == ["linear"] * 3
    torch.testing.assert_close(project(hooked(layer), x, (2, 4)), 2 * project(linear(), x, (2, 4)))
    assert called == ["linear"] * 4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("has_hook", [False, True])
def test_a_linear_layer_is_added_to_a_residual(has_hook, scaled, called):
    layer, x, residual, scale = linear(), normal(5, 3, 6), normal(5, 3, 8, seed=1), factors(5) if scaled else None
    branch = (1 + has_hook) * layer(x)
    expected = residual + (branch if scale is None else scale.view(5, 1, 1) * branch)
    torch.testing.assert_close(add_linear(hooked(layer) if has_hook else layer, x, residual, scale), expected)
    assert called == ([] if has_hook else ["linear_add"])


def test_dropout_comes_before_the_residual():
    layer, x, residual = linear(), normal(50, 3, 6), normal(50, 3, 8, seed=1)
    torch.manual_seed(1)
    added = add_linear(layer, x, residual, factors(50), 0.5) - residual
    torch.manual_seed(1)
    dropped = add_linear(layer, x, dropout=0.5)
    assert 0.4 < (dropped == 0).double().mean() < 0.6
    torch.testing.assert_close(added, factors(50).view(50, 1, 1) * dropped, rtol=1e-5, atol=1e-6)


def test_factors_need_a_residual_of_as_many_examples():
    layer, x, residual = linear(), normal(5, 3, 6), normal(5, 3, 8)
    with pytest.raises(ValueError, match="factors multiply what is added to a residual, but there is none"):
        add_linear(layer, x, None, factors(5))
    with pytest.raises(ValueError, match=r"factors are \[3\] torch.float32, but \[5\]"):
        add_branch(residual, residual, factors(3))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_branch_in_half_precision_leaves_a_residual_in_full_precision(scaled):
    residual, branch, scale = normal(5, 3, 8), normal(5, 3, 8, seed=1).bfloat16(), factors(5) if scaled else None
    expected = residual + (1 if scale is None else scale.view(5, 1, 1)) * branch.float()
    found = add_branch(residual, branch, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_norm_that_has_to_run_is_called(called):
    class Norm(nn.LayerNorm):
        def forward(self, x, out_dtype):
            return super().forward(x).to(out_dtype)

    x, values = normal(2, 3, 8), SimpleNamespace(weight=normal(8), bias=normal(8, seed=1), eps=1e-3)
    norm = Norm(8, 1e-3).to(DEVICE)
    norm.load_state_dict({"weight": values.weight, "bias": values.bias})
    expected = norm(x, torch.bfloat16)
    for plain in (values, norm):
        residual, y = norm_residual(plain, x, torch.bfloat16)
        assert torch.equal(residual, x)
        assert torch.equal(y, expected)
    assert called == ["layer_norm_residual"] * 2
    assert torch.equal(norm_residual(hooked(norm), x, torch.bfloat16)[1], 2 * expected)
    assert called == ["layer_norm_residual"] * 2
