"""What `fuse` and `unfuse` say: to wrong arguments, of models that they do not know, and of modules that did not run."""

import copy
import io
from collections import UserDict

import numpy as np
import pytest
import torch
from foreign_models import hugging_face_vit, normal, timm_vit, torchvision_vit
from torch import nn

from polyvit_fast import fuse, unfuse
from polyvit_fast.drop_in.fused import MARK, fused_adapter
from polyvit_fast.drop_in.verify import LEGEND
from polyvit_fast.model.modules import Attention, Mlp
from polyvit_kernels import ops

NOTHING_KNOWN = "nothing here that fuse knows: it replaces layer norms, attention, MLPs and blocks of Vision Transformers"
UNLESS = "its own forward runs unless query, key and value are one tensor and need_weights=False"


def fused_modules(model):
    return [
        path for path, module in model.named_modules() if fused_adapter(module) or MARK in module.__dict__ or "forward" in module.__dict__
    ]


class WithAttention(nn.Module):
    """Torch's attention after a norm; with `weights` it asks for them."""

    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attn, self.weights = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True), weights

    def forward(self, x):
        x = self.norm(x)
        return self.attn(x, x, x, need_weights=self.weights)[0]


# Arguments


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("model", ["vit", None, nn.LayerNorm])
def test_what_is_no_model_is_refused(model):
    kind = type(model).__name__
    with pytest.raises(TypeError, match=rf"^fuse needs a model \(torch\.nn\.Module\), not {kind}$"):
        fuse(model)
    with pytest.raises(TypeError, match=rf"^unfuse needs a model \(torch\.nn\.Module\), not {kind}$"):
        unfuse(model)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("batch", ["batch", np.zeros((2, 3, 32, 32), np.float32), True, False, [normal(2, 3, 32, 32)], 3], ids=range(6))
def test_what_is_no_batch_is_refused(batch):
    model, _ = timm_vit()
    with pytest.raises(TypeError, match=rf"^verify must be a tensor, a tuple of .* or a dict of .*, not {type(batch).__name__}$"):
        fuse(model, verify=batch)
    assert not fused_modules(model)


def test_mappings_are_batches_too():
    model, batch = hugging_face_vit()
    assert fuse(model, verify=UserDict(pixel_values=batch)).comparisons == fuse(model, verify={"pixel_values": batch}).comparisons


@pytest.mark.parametrize("batch", [normal(2, 3, 48, 48), normal(2, 3), {"pixels": normal(2, 3, 32, 32)}, {}, ()], ids=range(5))
def test_a_model_that_fails_on_the_batch_says_so_and_is_restored(batch):
    model, _ = timm_vit()
    with pytest.raises((AssertionError, TypeError, RuntimeError, ValueError)) as caught:
        fuse(model, verify=batch)
    assert caught.value.__notes__ == ["the model itself failed on the batch given as verify"]
    assert not fused_modules(model)


def test_data_parallel_is_refused():
    model, _ = timm_vit()
    for wrapped in (nn.DataParallel(model), nn.Sequential(nn.DataParallel(model))):
        with pytest.raises(ValueError, match=r"is a torch\.nn\.DataParallel, .*: fuse its \.module"):
            fuse(wrapped)
    assert not fused_modules(model)


@pytest.mark.parametrize("num_heads", [0, -2])
def test_attention_without_heads_is_refused(num_heads):
    with pytest.raises(ValueError, match=f"num_heads = {num_heads}, but attention takes one head or more"):
        Attention(10, num_heads)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("gelu", ["relu", None])
def test_unknown_forms_of_gelu_are_refused(gelu):
    with pytest.raises(ValueError, match=f"gelu = {gelu!r} is none of 'tanh', 'erf', 'quick'"):
        Mlp(8, 16, gelu=gelu)


# Values that cannot be judged


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_on_which_the_model_is_not_finite_is_refused(value, monkeypatch):
    model, batch = timm_vit()
    monkeypatch.setattr(ops, "mlp", lambda *args: args[0] * 0)
    batch[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"the model's own output of blocks\.0 is not finite on this batch: verify cannot judge"):
        fuse(model, verify=batch)
    assert not fused_modules(model)


class AfterNorm(nn.Module):
    """A norm, and a function of what it gives."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.function = nn.LayerNorm(64), function

    def forward(self, x):
        return self.function(self.norm(x))


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"the model's own gradient of .* is not finite on this batch"):
        fuse(AfterNorm(lambda x: (x * 0).abs().sqrt()), verify=normal(2, 5, 64))


def test_an_output_of_the_model_alone_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the model's own output is not finite on this batch"):
        fuse(AfterNorm(lambda x: (x, torch.full((3,), torch.inf))), verify=normal(2, 5, 64))


# Wrapped forwards


def close_over(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


@pytest.mark.parametrize("path", ["", "blocks.1.mlp"])
def test_a_closure_around_a_fused_forward_must_go_before_unfuse(path):
    model, _ = timm_vit()
    model = model if path else model.blocks[0]
    fuse(model)
    fused, module = fused_modules(model), model.get_submodule(path)
    inner = module.forward
    module.forward = close_over(inner)
    for call in (unfuse, fuse):
        with pytest.raises(ValueError, match=f"the forward of {path or 'the model'} was wrapped after fuse"):
            call(model)
        assert fused_modules(model) == fused
    module.forward = inner
    unfuse(model)
    assert not fused_modules(model)


def test_a_forward_that_is_gone_needs_no_unfuse():
    model, _ = timm_vit()
    fuse(model)
    del model.blocks[0].mlp.forward
    unfuse(model)
    assert not fused_modules(model)


def test_copies_and_files_can_be_unfused_and_a_wrapper_is_seen_there():
    model, batch = timm_vit()
    expected, names = model.eval()(batch), list(model.state_dict())
    fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        inner, other.norm.forward = other.norm.forward, close_over(other.norm.forward)
        with pytest.raises(ValueError, match="the forward of norm was wrapped"):
            unfuse(other)
        other.norm.forward = inner
        unfuse(other)
        assert list(other.state_dict()) == names
        assert torch.equal(other(batch), expected)
    assert fused_adapter(model.norm)


# The report


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())], ids=["linear", "cnn"])
def test_a_model_in_which_nothing_is_known(model, capsys):
    report = fuse(model, verify=normal(2, 3) if isinstance(model, nn.Linear) else normal(2, 3, 8, 8))
    assert str(report) == NOTHING_KNOWN
    assert report.comparisons == ()
    assert capsys.readouterr().out == "verify compares nothing, as nothing has been replaced\n"


def test_blocks_of_other_models_are_named_below():
    class ConvBlock(nn.Sequential):
        pass

    lines = str(fuse(nn.Sequential(ConvBlock(nn.ReLU())))).splitlines()
    assert lines[:2] == [NOTHING_KNOWN, "left: 1 modules"]
    assert "fuse does not know" in lines[2]
    assert NOTHING_KNOWN not in str(fuse(Mlp(8, 16)))


def test_rates_of_one_kind_are_on_one_line():
    model, _ = timm_vit(depth=4)
    for rate, block in zip((0.0, 0.02, 0.1, 0.05), model.blocks, strict=True):
        block.attn.proj_drop.p = rate
    lines = [line.split(maxsplit=4) for line in str(fuse(model)).splitlines() if line.split()[0] == "blocks.*"]
    assert sorted((line[1], *line[4:]) for line in lines) == [
        ("1",),
        ("3", "its own forward runs in training, where it drops with up to 0.1"),
    ]


def test_what_torch_s_attention_needs_is_said():
    (entry,) = fuse(nn.MultiheadAttention(64, 4, batch_first=True)).replaced
    assert entry.why == UNLESS
    (entry,) = fuse(nn.MultiheadAttention(64, 4, batch_first=True, dropout=0.1)).replaced
    assert entry.why == "its own forward runs in training, where it drops with up to 0.1, and " + UNLESS.removeprefix(
        "its own forward runs "
    )


def test_modules_that_the_batch_did_not_run_are_named(capsys):
    model, batch = timm_vit()
    model.extra = nn.LayerNorm(64)
    report = fuse(model, verify=batch)
    assert {entry.path: entry.why for entry in report.replaced if entry.why} == {"extra": "not run by this batch"}
    assert capsys.readouterr().out.endswith("not run by this batch: 1 modules\n  extra    1 × LayerNorm\n")
    assert all(module.forward.func is model.norm.forward.func for module in model.modules() if fused_adapter(module))


@pytest.mark.parametrize("weights", [True, False])
def test_attention_that_is_asked_for_its_weights_did_not_run(weights):
    report = fuse(WithAttention(weights), verify=normal(2, 5, 64))
    expected = f"{UNLESS}; not run by this batch" if weights else UNLESS
    assert {entry.path: entry.why for entry in report.replaced} == {"norm": "", "attn": expected}


@pytest.mark.parametrize("build", [torchvision_vit, lambda: hugging_face_vit(attn_implementation="eager")], ids=["torchvision", "eager"])
def test_parts_that_a_block_computes_for_them_ran(build):
    model, batch = build()
    assert "not run by this batch" not in str(fuse(model, verify=batch))


def test_torch_s_attention_is_compared_by_itself(monkeypatch):
    wrong = ops.attention
    monkeypatch.setattr(ops, "attention", lambda qkv, backend: wrong(qkv, backend) * 1.001)
    with pytest.raises(RuntimeError, match="It differs in attn: output"):
        fuse(WithAttention(False), verify=normal(2, 5, 64))


def test_a_model_that_is_one_fused_module_has_a_name_in_the_table(capsys):
    report = fuse(timm_vit()[0].blocks[0], verify=normal(2, 5, 64))
    assert all(found.path for found in report.comparisons)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == LEGEND
    assert any(line.startswith("(the model)  ") for line in lines)
