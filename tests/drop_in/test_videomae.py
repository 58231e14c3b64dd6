"""When VideoMAE's modules, which hold the layers of attention and MLP, are more than that."""

import pytest
import torch
from foreign_models import reasons, tokens_of, videomae
from torch import nn

from polyvit_fast import fuse


class Output(nn.Module):
    """In the position of one of VideoMAE's, which it is not."""

    def __init__(self, old):
        super().__init__()
        self.dense, self.dropout = old.dense, old.dropout

    def forward(self, hidden_states, input_tensor):
        return 2 * self.dense(hidden_states)


def test_modules_of_other_classes_in_their_positions_are_left():
    model, _ = videomae()
    first, second = model.encoder.layer
    first.output = Output(first.output)
    second.attention.output = Output(second.attention.output)
    found = reasons(model)
    assert found["encoder.layer.0"] == "output (Output) is no plain VideoMAEOutput"
    assert found["encoder.layer.1.attention"] == "output (Output) is no plain VideoMAESelfOutput"
    assert found["encoder.layer.1"] == "attention: VideoMAEAttention is left"


def test_a_member_more_is_another_version():
    model, _ = videomae()
    model.encoder.layer[0].intermediate.norm = nn.LayerNorm(128)
    model.encoder.layer[1].attention.attention.register_buffer("mask", torch.ones(5))
    found = reasons(model)
    assert found["encoder.layer.0"] == "another version of the class: it has norm"
    assert found["encoder.layer.1.attention.attention"] == "another version of the class: it has mask"


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"hidden_act": "gelu_pytorch_tanh"}, {"use_mean_pooling": True}], ids=str)
def test_forms_of_the_model(changes):
    model, batch = videomae(**changes)
    assert not fuse(model, verify=batch).left


def test_hooks_on_the_holders_run():
    model, batch = videomae()
    fuse(model.eval())
    expected = tokens_of(model(batch))
    for path in ("intermediate", "output", "attention.output"):
        seen = []
        handle = (
            model.encoder.layer[0].get_submodule(path).register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        )
        torch.testing.assert_close(tokens_of(model(batch)), expected, rtol=1e-4, atol=1e-4)
        handle.remove()
        assert len(seen) == 1
