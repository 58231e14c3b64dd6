"""Weights of Hugging Face's models against the libraries' own logits."""

import json

import pytest
import torch
from foreign_models import randomised
from safetensors.torch import load_file, save_file

from polyvit_fast.model import pretrained
from polyvit_fast.model.pretrained.hugging_face import AST_MEAN, AST_STD

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80, "num_labels": 3}


def vit(**changes):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**(SIZES | {"image_size": [32, 48], "patch_size": 16} | changes)))


def deit(**changes):
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**(SIZES | {"image_size": [32, 48], "patch_size": 16} | changes)))


def vivit(**changes):
    from transformers import VivitConfig, VivitForVideoClassification

    sizes = {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 16, 16], "hidden_act": "gelu_pytorch_tanh"}
    return VivitForVideoClassification(VivitConfig(**(SIZES | sizes | changes)))


def videomae(**changes):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(VideoMAEConfig(**(SIZES | {"image_size": 32, "num_frames": 4, "layer_norm_eps": 1e-6} | changes)))


def ast(**changes):
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(ASTConfig(**(SIZES | {"max_length": 57, "num_mel_bins": 36} | changes)))


def pixels(*shape):
    """Pixels as their model takes them, and as levels of a grid; the last three axes are channels, rows and columns."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = x.movedim(-3, -1) * 127.5 + 127.5
    return x, levels if levels.ndim == 5 else levels[:, None]


def sound():
    x = torch.randn(2, 57, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(value, dtype=torch.float32).double() for value in (AST_MEAN, AST_STD))
    return x, x[:, None, :, :, None] * std + mean


CASES = {
    "vit": (vit, pixels(3, 32, 48), "image"),
    "deit": (deit, pixels(3, 32, 48), "image"),
    "vivit": (vivit, pixels(4, 3, 32, 32), "video"),
    "videomae": (videomae, pixels(4, 3, 32, 32), "video"),
    "ast": (ast, sound(), "audio"),
}


def save(model, folder):
    """As the library saves it, drawn at random and in evaluation mode."""
    randomised(model).eval().save_pretrained(folder)
    return model.double()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_librarys(name, tmp_path):
    build, (x, grid), modality = CASES[name]
    theirs = save(build(), tmp_path)
    found = pretrained.read(str(tmp_path))
    assert list(found.tokenizers) == [modality]
    assert found.model.num_heads == 3
    with torch.no_grad():
        torch.testing.assert_close(found.build().double()(grid, "classes"), theirs(x).logits, rtol=0, atol=1e-12)
    assert not found.left_out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-5, "qkv_bias": False}),
        ("vivit", {"tubelet_size": [4, 16, 16], "hidden_act": "gelu", "qkv_bias": False}),
        ("vivit", {"hidden_act": "gelu_fast"}),
        ("ast", {"time_stride": 16, "frequency_stride": 12, "hidden_act": "gelu_new"}),
        ("deit", {"layer_norm_eps": 1e-3}),
    ],
)
def test_logits_with_other_settings(name, changes, tmp_path):
    build, (x, grid), _ = CASES[name]
    theirs = save(build(**changes), tmp_path)
    with torch.no_grad():
        # gelu_fast writes sqrt(2 / pi) with ten digits.
        atol = 1e-10 if changes.get("hidden_act") == "gelu_fast" else 1e-12
        torch.testing.assert_close(pretrained.load(str(tmp_path)).double()(grid, "classes"), theirs(x).logits, rtol=0, atol=atol)


def test_names_of_transformers_5_are_known(tmp_path):
    theirs = randomised(vit()).eval()
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    assert "vit.layers.0.attention.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    x, grid = pixels(3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(pretrained.load(str(tmp_path)).double()(grid, "classes"), theirs.double()(x).logits, rtol=0, atol=1e-12)


def test_a_model_without_its_head_and_without_its_class(tmp_path):
    theirs = save(vit(), tmp_path / "head")
    theirs.vit.save_pretrained(tmp_path / "trunk")
    found = pretrained.read(str(tmp_path / "trunk"))
    assert not found.heads
    x, grid = pixels(3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(found.build().features(grid, "image"), theirs.vit(x).last_hidden_state, rtol=0, atol=1e-12)


def test_class_names_and_normalisation_come_from_the_files_beside(tmp_path):
    from transformers import ViTImageProcessor

    save(vit(id2label={2: "newt", 0: "cat", 1: "dog"}, label2id={}), tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    found = pretrained.read(str(tmp_path))
    assert found.heads["classes"].class_names == ("cat", "dog", "newt")
    assert found.tokenizers["image"].mean == pytest.approx((25.5, 51.0, 76.5))
    assert found.tokenizers["image"].std == pytest.approx((102.0, 127.5, 153.0))


def test_names_that_nobody_gave_are_no_names(tmp_path):
    save(vit(), tmp_path)
    assert pretrained.read(str(tmp_path)).heads["classes"].class_names is None


def test_the_second_head_of_a_distilled_model_is_left_out(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    save(DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, image_size=32, patch_size=16)), tmp_path)
    found = pretrained.read(str(tmp_path))
    assert sorted(found.left_out) == ["distillation_classifier.bias", "distillation_classifier.weight"]
    assert found.heads["classes"].tensors["weight"].shape == (3, 48)


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (vit, {"hidden_act": "relu"}, "its activation is 'relu'; models here have gelu, "),
        (videomae, {"use_mean_pooling": False}, "use_mean_pooling = False reads the first tubelet's token"),
    ],
)
def test_what_models_here_do_not_have_is_refused(build, changes, message, tmp_path):
    save(build(**changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        pretrained.read(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 512}, "config.json says hidden_size = 512, the weights have 48"),
        ({"num_hidden_layers": 12}, "config.json says num_hidden_layers = 12, the weights have 2"),
        ({"image_size": 224}, "its config.json means 1 × 14 × 14 tokens, there are 6 positions"),
        ({"id2label": {"0": "cat"}}, "config.json names 1 classes, the head has 3"),
        ({"id2label": {"cat": 0}}, "Is a config.json next to them another model's"),
        ({"image_size": "large"}, "Is a config.json next to them another model's"),
        ({"model_type": "vivit", "num_frames": 4}, "there are 6 positions"),
    ],
)
def test_the_config_of_another_model_is_noticed(changes, message, tmp_path):
    save(vit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.read(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path))


def test_another_type_of_model_is_named(tmp_path):
    save(vit(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "beit"}))
    with pytest.raises(ValueError, match="its model_type is 'beit'; known are vit, deit, vivit, audio-spectrogram-transformer, videomae"):
        pretrained.read(str(tmp_path))


def test_a_model_that_lacks_weights_can_start_a_run_but_is_none(tmp_path):
    """What VideoMAE's pretraining saves has no norm after its encoder."""
    theirs = save(videomae(), tmp_path)
    theirs.videomae.save_pretrained(tmp_path / "trunk")
    found = pretrained.read(str(tmp_path / "trunk"))
    assert not [name for name in found.trunk if name.startswith("norm.")]
    with pytest.raises(ValueError, match=r"trunk \(Hugging Face VideoMAE\) lacks norm.weight, norm.bias; a run can start from it"):
        found.build()
