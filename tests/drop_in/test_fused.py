import copy

import pytest
import torch
from foreign_models import torchvision_vit

from polyvit_fast import fuse
from polyvit_fast.drop_in.fused import fused_adapter, original


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


def test_a_fused_module_is_known_by_its_adapter():
    model, _ = torchvision_vit()
    assert fused_adapter(model.encoder.ln) is None
    fuse(model)
    adapter = fused_adapter(model.encoder.ln)
    assert adapter
    assert fused_adapter(copy.deepcopy(model).encoder.ln) == adapter
    assert fused_adapter(model.heads) is None
    model.encoder.ln.forward = lambda x: x
    assert fused_adapter(model.encoder.ln) is None
