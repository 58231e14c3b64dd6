import copy

import pytest
import torch
from foreign_models import FAMILIES, hugging_face_vit, is_zero, long, normal, timm_vit, tokens_of
from torch import nn

from polyvit_fast import fuse
from polyvit_fast.drop_in.fused import fused_adapter
from polyvit_fast.drop_in.verify import LEGEND, Comparison, table
from polyvit_kernels import ops


@pytest.mark.parametrize("precision", ["fp32", *long("autocast")])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_on_its_own_batch(name, precision, capsys):
    model, batch = FAMILIES[name]()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        report = fuse(model, verify=batch)
    assert {found.path for found in report.comparisons} == {"(the model)", *(entry.path for entry in report.replaced)}
    assert max(found.used for found in report.comparisons) <= 1
    assert min(found.cosine for found in report.comparisons if not is_zero(f"{found.path}.{found.tensor.split()[-1]}")) > 0.99
    printed = capsys.readouterr().out
    assert printed.startswith(table(report.comparisons) + "\n")
    # Autocast rounds VideoMAE's tokens: its last norm then gives another dtype on a CPU than on a GPU, so it is left to torch.
    rounded = "VideoMAE" in name and precision == "autocast"
    assert [entry.path for entry in report.replaced if "not run" in entry.why] == (["layernorm"] if rounded else [])


def test_the_model_is_not_disturbed():
    model, batch = timm_vit(drop_path_rate=0.2, proj_drop_rate=0.1)
    model.norm.eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
    model(batch).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fuse(model, verify=batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert not model.blocks[0]._forward_hooks
    assert batch.grad is None


def test_batches_of_every_form():
    model, batch = timm_vit()
    first = fuse(model, verify=batch).comparisons
    assert fuse(model, verify=(batch,)).comparisons == first
    assert fuse(model, verify={"x": batch}).comparisons == first
    with torch.inference_mode():
        assert fuse(model, verify=normal(2, 3, 32, 32)).comparisons == first
    model, batch = hugging_face_vit()
    labels = {"pixel_values": batch, "output_hidden_states": True}
    assert any(found.path == "(the model)" for found in fuse(model, verify=labels).comparisons)


def test_frozen_models_are_compared_without_their_gradients():
    model, batch = timm_vit()
    model.requires_grad_(False)
    names = {found.tensor for found in fuse(model, verify=batch).comparisons}
    assert names == {"output", "gradient of input 0"}
    model.blocks[1].mlp.fc2.bias.requires_grad_()
    names = {found.tensor for found in fuse(model, verify=batch).comparisons if found.path == "blocks.1"}
    assert names == {"output", "gradient of input 0", "gradient of mlp.fc2.bias"}


def wrong_values(function):
    return lambda *args: function(*args) * 1.0001


def wrong_row(function):
    """One token in forty is off by a hundredth, as at the edge of a tile."""

    def call(*args):
        output = function(*args)
        return torch.cat([output[:1] * torch.tensor([1.0] * (output.shape[1] - 1) + [1.01])[:, None], output[1:]])

    return call


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat([gradient[:, :, :1] * 1.001, gradient[:, :, 1:]], 2)


def wrong_gradient(function):
    """The output is right and the queries' gradient is not."""
    return lambda qkv, backend: function(WrongGradient.apply(qkv), backend)


@pytest.mark.parametrize(
    ("name", "fault", "where"),
    [
        ("mlp", wrong_values, "blocks.0: output"),
        ("mlp", wrong_row, "blocks.0: output"),
        ("linear_add", wrong_values, "blocks.0: output"),
        ("layer_norm", wrong_values, "blocks.0.norm1: output"),
        ("attention", wrong_gradient, "blocks.0: gradient of attn.qkv.weight"),
    ],
)
def test_a_wrong_operation_is_found_named_and_undone(name, fault, where, monkeypatch):
    model, batch = timm_vit()
    before = tokens_of(model(batch))
    monkeypatch.setattr(ops, name, fault(getattr(ops, name)))
    with pytest.raises(RuntimeError, match="which has been restored") as caught:
        fuse(model, verify=batch)
    assert where in str(caught.value)
    assert "worst tensor" in str(caught.value)
    assert not any(fused_adapter(module) for module in model.modules())
    assert torch.equal(tokens_of(model(batch)), before)


def test_gradients_that_layer_scale_makes_tiny_are_seen(monkeypatch):
    model, batch = timm_vit(init_values=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1e-5)
            block.ls2.gamma.fill_(1e-5)
    assert fuse(copy.deepcopy(model), verify=batch).comparisons
    monkeypatch.setattr(ops, "attention", wrong_gradient(ops.attention))
    with pytest.raises(RuntimeError, match=r"blocks\.0: gradient of attn\.qkv\.weight"):
        fuse(model, verify=batch)


def test_an_operation_that_gives_nan_is_refused(monkeypatch):
    model, batch = timm_vit()
    monkeypatch.setattr(ops, "attention", lambda qkv, backend: qkv[:, :, 0] * torch.nan)
    with pytest.raises(RuntimeError, match=r"blocks\.0: output"):
        fuse(model, verify=batch)


def test_a_batch_that_the_model_cannot_take_leaves_it_as_it_was():
    model, _ = timm_vit()
    with pytest.raises(AssertionError):
        fuse(model, verify=normal(2, 3, 48, 48))
    assert not any(fused_adapter(module) for module in model.modules())


def test_parts_that_the_batch_does_not_reach_are_not_compared():
    model, batch = timm_vit()
    model.extra = nn.LayerNorm(64)
    report = fuse(model, verify=batch)
    assert "extra" in {entry.path for entry in report.replaced}
    assert "extra" not in {found.path for found in report.comparisons}


def test_table_has_the_worst_tensor_of_each_outermost_module():
    comparisons = [
        Comparison("blocks.1", "output", 1e-6, 1e-6, 0.5, 1.0, 1.0),
        Comparison("blocks.1.mlp", "gradient of fc1.weight", 3e-6, 1e-6, 0.75, 0.99999951, 1.0000004),
        Comparison("blocks.10", "output", 2e-6, 1e-6, 0.1, 1.0, 1.0),
        Comparison("norm", "output", 2e-6, 1e-6, 31784.4, 0.5, 2.0),
    ]
    assert table(comparisons).splitlines() == [
        LEGEND,
        "module     worst tensor                error  original  of allowed  cosine    norm ratio",
        "blocks.1   mlp gradient of fc1.weight  3e-06  1e-06     75%         1.000000  1.000000",
        "blocks.10  output                      2e-06  1e-06     10%         1.000000  1.000000",
        "norm       output                      2e-06  1e-06     31,784×     0.500000  2.000000",
    ]
