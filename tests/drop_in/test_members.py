"""What is asked about the members of foreign modules."""

import pytest
import torch
from foreign_models import hugging_face_vit, normal, reasons, timm_vit
from torch import nn

from polyvit_fast import fuse
from polyvit_fast.drop_in.members import (
    first_argument,
    full_name,
    hugging_face_input,
    not_identity,
    read_scale,
    unfit_scales,
    unknown_members,
)


@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu"])
def test_hugging_face_gelus_in_their_three_forms(activation):
    model, batch = hugging_face_vit(hidden_act=activation, num_hidden_layers=1)
    report = fuse(model, verify=batch)
    assert not report.left


@pytest.mark.parametrize("activation", ["gelu_10", "relu", "silu"])
def test_other_activations_of_hugging_face_are_left(activation):
    model, _ = hugging_face_vit(hidden_act=activation)
    assert "is no GELU that fuse knows" in reasons(model)["layers.0.mlp"]


def test_another_version_of_a_class_is_left():
    model, _ = timm_vit()
    model.blocks[0].attn.sink = nn.Parameter(torch.zeros(4))
    model.blocks[1].extra = nn.Linear(2, 2)
    model.blocks[1].mlp.drop1 = nn.Dropout2d(0.1)
    del model.blocks[0].mlp.drop2
    found = reasons(model)
    assert found["blocks.0.attn"] == "another version of the class: it has sink"
    assert found["blocks.0.mlp"] == "another version of the class: it lacks drop2"
    assert found["blocks.1"] == "another version of the class: it has extra"
    assert found["blocks.1.mlp"] == "drop1 (Dropout2d) is no plain dropout"


def test_members_are_counted_under_each_of_their_names():
    module = nn.Module()
    module.a = module.b = nn.Identity()
    module.c = None
    assert unknown_members(module, "a b") == ""
    assert unknown_members(module, "a", "b") == ""
    assert unknown_members(module, "a b c") == "another version of the class: it lacks c"
    assert unknown_members(module, "a") == "another version of the class: it has b"


def test_an_identity_is_no_member_that_computes():
    module = nn.Sequential(nn.Identity(), nn.Identity(), nn.ReLU())
    assert not_identity(module, "scaled", "0", "absent") == ""
    assert not_identity(module, "scaled", "0", "2") == "scaled (2 is a ReLU)"
    module[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert not_identity(module, "scaled", "1") == "scaled (1 is a Identity)"


def test_layer_scales_are_read_from_modules_and_parameters():
    from timm.layers import LayerScale

    module = nn.Module()
    module.ls, module.none, module.same, module.gamma = LayerScale(8), None, nn.Identity(), nn.Parameter(torch.ones(8))
    assert read_scale(module, "ls") is module.ls.gamma
    assert read_scale(module, "gamma") is module.gamma
    assert all(read_scale(module, name) is None for name in ("none", "same", "absent"))
    assert unfit_scales(module, "ls", "none", "same", "gamma", "absent") == ""
    module.ls.register_forward_hook(lambda module, args, output: 2 * output)
    assert unfit_scales(module, "gamma", "ls") == "ls (LayerScale) is no plain LayerScale"
    module.ls = nn.Linear(8, 8)
    assert unfit_scales(module, "ls") == "ls (Linear) is no plain LayerScale"


def test_hidden_states_may_be_given_by_name():
    x = normal(2)
    assert hugging_face_input(None, (), {"hidden_states": x, "attention_mask": None, "output_hidden_states": True}) is x
    assert hugging_face_input(None, (x,), {"attention_mask": None}) is x
    assert hugging_face_input(None, (), {"hidden_states": x, "is_causal": True}) is None
    assert hugging_face_input(None, (x,), {"hidden_states": x}) is None


def test_a_call_is_about_its_first_argument_unless_another_asks_for_something():
    x = normal(2)
    assert first_argument(None, (x,), {}) is x
    assert first_argument(None, (x, None), {"mask": None, "causal": False}) is x
    assert first_argument(None, (x, x), {}) is None
    assert first_argument(None, (x,), {"mask": x}) is None
    assert first_argument(None, (), {"x": x}) is None


def test_full_names():
    assert full_name(normal(1)) == "torch.Tensor"
    assert full_name(torch.nn.LayerNorm(2)) == "torch.nn.modules.normalization.LayerNorm"
