"""Weights of timm's models against timm's own logits."""

import json

import pytest
import torch
from foreign_models import randomised
from safetensors.torch import save_file

from polyvit_fast.model import pretrained

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 2, "num_classes": 3}


def vit(**changes):
    from timm.models.vision_transformer import VisionTransformer

    return randomised(VisionTransformer(**(SIZES | changes))).eval()


def save(model, path, config=None):
    """In fp64, so that what is computed of the weights, as with LayerScale, can be compared in it."""
    model = model.double()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return model


def picture(rows=32, columns=32):
    x = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x.movedim(1, -1)[:, None] * 127.5 + 127.5


def check(theirs, folder, x, grid):
    found = pretrained.read(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(found.build().double()(grid, "classes"), theirs(x), rtol=0, atol=1e-12)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"init_values": 0.5},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"no_embed_class": True},
    ],
    ids=str,
)
def test_logits_are_timms(changes, tmp_path):
    config = {"global_pool": changes["global_pool"]} if "global_pool" in changes else None
    found = check(save(vit(**changes), tmp_path, config), tmp_path, *picture())
    assert (found.kind, found.model.gelu, found.model.norm_eps, found.left_out) == ("timm ViT", "erf", 1e-6, {})


def test_what_timm_writes_beside_a_model_is_read(tmp_path):
    from functools import partial

    from torch import nn

    theirs = vit(img_size=(32, 48), num_heads=4, act_layer=partial(nn.GELU, approximate="tanh"))
    arguments = {"img_size": [32, 48], "num_heads": 4, "act_layer": "gelu_tanh"}
    files = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "vit_x", "model_args": arguments, "pretrained_cfg": files, "label_names": ["cat", "dog", "newt"]}
    save(theirs, tmp_path, config)
    x, _ = picture(32, 48)
    mean, std = (torch.tensor(files[name], dtype=torch.float32).double() for name in ("mean", "std"))
    levels = (x.movedim(1, -1)[:, None] * std + mean) * 255
    found = pretrained.read(str(tmp_path))
    assert found.heads["classes"].class_names == ("cat", "dog", "newt")
    assert found.tokenizers["image"].tubelets == (1, 2, 3)
    with torch.no_grad():  # mean and std are held in fp32
        torch.testing.assert_close(found.build().double()(levels, "classes"), theirs(x), rtol=0, atol=1e-5)


def test_a_mean_is_known_by_its_norm_where_nothing_tells(tmp_path):
    check(save(vit(global_pool="avg"), tmp_path), tmp_path, *picture())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"label_names": ["cat"]}, "config.json names 1 classes, the head has 3"),
        ({"model_args": {"embed_dim": 32}}, "config.json says embed_dim = 32, the weights have 64"),
        ({"model_args": [1]}, "Is a config.json next to them another model's"),
    ],
)
def test_the_config_of_another_model_is_noticed(config, message, tmp_path):
    save(vit(), tmp_path, config)
    with pytest.raises(ValueError, match=message):
        pretrained.read(str(tmp_path))


def test_features_of_a_distilled_deit_are_timms(tmp_path):
    from timm.models.deit import VisionTransformerDistilled

    theirs = save(randomised(VisionTransformerDistilled(**SIZES)).eval(), tmp_path)
    found, (x, grid) = pretrained.read(str(tmp_path)), picture()
    assert sorted(found.left_out) == ["head_dist.bias", "head_dist.weight"]
    model = found.build().double()
    with torch.no_grad():
        tokens = theirs.forward_features(x)
        torch.testing.assert_close(model.features(grid, "image"), tokens, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(grid, "classes"), theirs.head(tokens[:, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reg_tokens": 2}, "reg_token is of 2 register tokens"),
        ({"qk_norm": True}, "q_norm.(weight|bias) is of normalised queries and keys"),
        ({"pre_norm": True}, "norm_pre.(weight|bias) is of a norm before the blocks"),
    ],
)
def test_what_models_here_do_not_have_is_refused(changes, message, tmp_path):
    save(vit(**changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        pretrained.read(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg"}, "global_pool = avg with the norm before it is unknown here"),
        ({}, {"model_args": {"act_layer": "quick_gelu"}}, "its activation is 'quick_gelu'; models here have 'gelu'"),
        ({}, {"architecture": "vit_base_patch16_clip_quickgelu_224"}, "its activation is 'quick_gelu'"),
    ],
)
def test_what_its_config_says_is_refused(changes, config, message, tmp_path):
    save(vit(**changes), tmp_path, config)
    with pytest.raises(ValueError, match=message):
        pretrained.read(str(tmp_path))
