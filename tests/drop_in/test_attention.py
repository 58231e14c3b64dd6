"""Which attention modules are computed here, and why the others are left."""

import pytest
import torch
from foreign_models import hugging_face_vit, normal, reasons, timm_vit, videomae
from torch import nn

from polyvit_fast import fuse
from polyvit_fast.drop_in.attention import packs
from polyvit_kernels import ops


@pytest.fixture
def calls_of_layer_norm(monkeypatch):
    """The shapes of what is normalised."""
    shapes, norm = [], ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, *args: shapes.append(tuple(x.shape)) or norm(x, *args))
    return shapes


def test_torch_attention_that_is_no_self_attention_is_left():
    def why(**changes):
        return reasons(nn.MultiheadAttention(64, 4, **({"batch_first": True} | changes))).get("", "")

    assert why() == ""
    assert why(bias=False) == "out_proj (NonDynamicallyQuantizableLinear) is more than a linear layer with a bias, or less"
    for changes in ({"batch_first": False}, {"kdim": 32}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        assert why(**changes) == "it is not batch-first self-attention, or adds a key"


def test_layers_without_a_bias_are_packed_with_one_of_zeros():
    model, _ = videomae()
    attention = model.encoder.layer[0].attention.attention.eval()
    x = normal(2, 5, 64)
    expected = attention(x)[0]
    assert attention.key.bias is None
    assert packs((attention.query, attention.key, attention.value))
    fuse(attention)
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-5, atol=1e-5)
    assert not packs((attention.query, nn.Identity()))


def test_heads_are_normalised_as_timm_does(calls_of_layer_norm):
    attention = timm_vit(qk_norm=True)[0].blocks[0].attn.eval()
    x = normal(2, 5, 64)
    expected = attention(x)
    fuse(attention)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)
    assert calls_of_layer_norm == [(2, 5, 4, 16)] * 2
    attention.k_norm.register_forward_hook(lambda module, args, output: 0 * output)
    assert not torch.allclose(attention(x), expected, atol=1e-3)  # the hook runs, in the module's own code
    assert reasons(attention) == {"": "k_norm: it has hooks"}


def test_hugging_face_attention_of_another_kind_is_left():
    model, _ = hugging_face_vit()
    model.layers[0].attention.is_causal = True
    model.layers[1].attention.scaling = 1.0
    assert reasons(model) == {
        "layers.0": "attention: ViTAttention is left",
        "layers.0.attention": "it is causal",
        "layers.1": "attention: ViTAttention is left",
        "layers.1.attention": "it scales scores by 1, not by head_dim ** -0.5",
    }
    model, _ = hugging_face_vit()
    model.config._attn_implementation = "my_own"
    assert reasons(model)["layers.1.attention"] == "its attention implementation is 'my_own'"
