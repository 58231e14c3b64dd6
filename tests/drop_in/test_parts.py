import copy

import pytest
import torch
from foreign_models import normal, torchvision_vit

from polyvit_fast import fuse
from polyvit_fast.drop_in.parts import full_name, fused_row, original


def test_original_is_the_unfused_model_for_a_while():
    model, batch = torchvision_vit()
    expected = model.eval()(batch)
    fuse(model)
    with original(model):
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(model(batch), expected)
    assert "forward" in model.encoder.ln.__dict__
    with pytest.raises(KeyError), original(model):
        raise KeyError
    assert "forward" in model.encoder.ln.__dict__


def test_a_fused_module_is_known_by_its_row():
    model, _ = torchvision_vit()
    assert fused_row(model.encoder.ln) is None
    fuse(model)
    row = fused_row(model.encoder.ln)
    assert row
    assert fused_row(copy.deepcopy(model).encoder.ln) == row
    assert fused_row(model.heads) is None
    model.encoder.ln.forward = lambda x: x
    assert fused_row(model.encoder.ln) is None


def test_full_names():
    assert full_name(normal(1)) == "torch.Tensor"
    assert full_name(torch.nn.LayerNorm(2)) == "torch.nn.modules.normalization.LayerNorm"
