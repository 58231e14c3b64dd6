"""Which attention modules are computed here, and why the others are left."""

from foreign_models import hugging_face_vit, reasons
from torch import nn


def test_torch_attention_that_is_no_self_attention_is_left():
    def why(**changes):
        return reasons(nn.MultiheadAttention(64, 4, **({"batch_first": True} | changes))).get("", "")

    assert why() == ""
    assert why(bias=False) == "out_proj (NonDynamicallyQuantizableLinear) is more than a linear layer with a bias, or less"
    for changes in ({"batch_first": False}, {"kdim": 32}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        assert why(**changes) == "it is not batch-first self-attention, or adds a key"


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
