import copy

import pytest
import torch
from foreign_models import FAMILIES, dinov2, normal, reasons, timm_eva, timm_vit
from torch import nn

from polyvit_fast import Attention, fuse
from polyvit_fast.drop_in.adapters import ADAPTERS, BlockNames, MlpNames, adapter_of, block_adapter, mlp_adapter
from polyvit_fast.drop_in.members import full_name


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_a_known_family_is_left(name):
    model, _ = FAMILIES[name]()
    report = fuse(model)
    assert not report.left
    kinds = {type(model.get_submodule(entry.path)).__name__ for entry in report.replaced}
    assert len(kinds) == 4, kinds


@pytest.mark.parametrize(
    ("changes", "path", "why"),
    [
        ({"qk_norm": True, "norm_layer": "rmsnorm"}, "blocks.0.attn", "q_norm: RmsNorm is left"),
        ({"scale_attn_norm": True}, "blocks.0.attn", "the heads' outputs are normalised (norm is a LayerNorm)"),
        ({"scale_mlp_norm": True}, "blocks.0.mlp", "the hidden layer is normalised (norm is a LayerNorm)"),
        ({"act_layer": "relu"}, "blocks.0.mlp", "its activation ReLU is no GELU that fuse knows, or has hooks"),
        ({"num_heads": 16}, "blocks.0.attn", "head_dim = 4, but kernels take multiples of 8 up to 128"),
        ({"proj_bias": False}, "blocks.0.mlp", "fc1 (Linear) is more than a linear layer with a bias, or less"),
        ({"norm_layer": "rmsnorm"}, "norm", "fuse does not know timm.layers.norm.RmsNorm"),
        ({"norm_layer": "layernormfp32"}, "norm", "fuse does not know timm.layers.norm.LayerNormFp32"),
        ({"mlp_layer": "swiglu"}, "blocks.0.mlp", "fuse does not know timm.layers.mlp.SwiGLU"),
        ({"block_fn": "parallel"}, "blocks.0", "fuse does not know timm.models.vision_transformer.ParallelScalingBlock"),
        ({"block_fn": "post"}, "blocks.0", "fuse does not know timm.models.vision_transformer.ResPostBlock"),
    ],
    ids=str,
)
def test_why_modules_of_timm_are_left(changes, path, why):
    from timm.layers import SwiGLU
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

    classes = {"swiglu": SwiGLU, "parallel": ParallelScalingBlock, "post": ResPostBlock}
    model, _ = timm_vit(**{name: classes.get(value, value) if isinstance(value, str) else value for name, value in changes.items()})
    assert reasons(model)[path] == why


@pytest.mark.parametrize(
    ("changes", "still_fused"),
    [
        ({"init_values": 1e-5}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"init_values": 1e-5, "qk_norm": True}, {"", "norm1", "attn", "attn.q_norm", "attn.k_norm", "norm2", "mlp"}),
        ({"qkv_bias": False}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"qk_norm": True}, {"", "norm1", "attn", "attn.q_norm", "attn.k_norm", "norm2", "mlp"}),
        ({"act_layer": "quick_gelu"}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"act_layer": "gelu_tanh"}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"reg_tokens": 4, "no_embed_class": True}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"proj_bias": False}, {"norm1", "attn", "norm2"}),
        ({"class_token": False, "global_pool": "avg"}, {"", "norm1", "attn", "norm2", "mlp"}),
        ({"pre_norm": True}, {"", "norm1", "attn", "norm2", "mlp"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_variants_of_timm_are_fused_as_far_as_they_can_be(changes, still_fused):
    model, batch = timm_vit(depth=1, **changes)
    plain = copy.deepcopy(model)
    report = fuse(model, verify=batch)
    assert {e.path.removeprefix("blocks.0").lstrip(".") for e in report.replaced if e.path.startswith("blocks.0")} == still_fused
    torch.testing.assert_close(model(batch), plain(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "left", "why"),
    [
        ({"use_rot_pos_emb": True}, ("blocks.0", "blocks.0.attn"), "it is given rotary positions"),
        ({"swiglu_mlp": True}, ("blocks.0", "blocks.0.mlp"), "fuse does not know timm.layers.mlp.GluMlp"),
        ({"init_values": 1e-5}, (), None),
        ({"init_values": 1e-5, "attn_only_layer_scale": True, "qk_norm": True}, (), None),
        ({"qk_norm": True, "attn_type": "rope"}, (), None),
        ({"qkv_fused": False}, (), None),
        ({"qkv_bias": False}, (), None),
        ({"attn_type": "rope"}, (), None),
    ],
    ids=str,
)
def test_eva_is_fused_where_it_is_a_plain_transformer(changes, left, why):
    model, batch = timm_eva(depth=1, **changes)
    found = {path: reason for path, reason in reasons(model).items() if path.startswith("blocks.0")}
    assert found.keys() == set(left)
    assert why is None or why in found.values()
    fuse(model, verify=batch)


def test_norms_that_are_left():
    assert reasons(nn.LayerNorm((4, 8))) == {"": "it normalises over several axes"}
    assert reasons(nn.LayerNorm(8, bias=False)) == {"": "its weight or bias is missing or no plain tensor"}
    assert reasons(nn.LayerNorm(8, elementwise_affine=False)) == {"": "its weight or bias is missing or no plain tensor"}
    model, _ = timm_vit()
    model.norm._fast_norm = True
    assert reasons(model) == {"norm": "timm's fast norm, which rounds under autocast"}


def test_subclasses_are_not_taken_for_their_bases():
    class MyNorm(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(MyNorm(8), nn.LayerNorm(8))
    report = fuse(model)
    assert [entry.path for entry in report.replaced] == ["1"]
    assert [entry.why for entry in report.left] == [f"fuse does not know {full_name(model[0])}"]


def test_our_own_modules_need_no_fuse():
    assert reasons(Attention(64, 4)) == {"": "it runs on the kernels without fuse"}


def test_swiglu_of_dinov2_is_left():
    model, batch = dinov2(use_swiglu_ffn=True)
    assert "Dinov2SwiGLUFFN" in reasons(model)["encoder.layer.0.mlp"]
    fuse(model, verify=batch)


def test_adapters_are_found_by_the_name_of_the_class():
    assert adapter_of(nn.LayerNorm(8))
    assert adapter_of(nn.Linear(8, 8)) is None


class FeedForward(nn.Module):
    """An MLP of a ViT that no library has."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class OwnLayer(nn.Module):
    """Its block."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm_2, self.feed_forward = nn.LayerNorm(64), FeedForward()

    def forward(self, x):
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norm_2(x))


def test_classes_of_one_s_own_are_added_by_the_names_of_their_members(monkeypatch):
    model, batch = nn.Sequential(OwnLayer(), OwnLayer()), normal(2, 5, 64)
    assert {entry.path for entry in fuse(model).left} == {"0", "0.feed_forward", "1", "1.feed_forward"}
    monkeypatch.setitem(ADAPTERS, full_name(FeedForward()), mlp_adapter(MlpNames("up", "act", "down")))
    names = BlockNames(("norm_1", "attention", "norm_2", "feed_forward"))
    monkeypatch.setitem(ADAPTERS, full_name(OwnLayer()), block_adapter(names))
    report = fuse(model, verify=batch)
    assert not report.left
    assert {entry.path for entry in report.replaced} >= {"0", "1"}


def test_wrong_names_are_found_by_verify(monkeypatch):
    model, batch = nn.Sequential(OwnLayer()), normal(2, 5, 64)
    with torch.no_grad():
        model[0].norm_1.weight.fill_(2.0)
    monkeypatch.setitem(ADAPTERS, full_name(FeedForward()), mlp_adapter(MlpNames("up", "act", "down")))
    names = BlockNames(("norm_2", "attention", "norm_1", "feed_forward"))
    monkeypatch.setitem(ADAPTERS, full_name(OwnLayer()), block_adapter(names))
    with pytest.raises(RuntimeError, match="the fused model is not the original one"):
        fuse(model, verify=batch)
