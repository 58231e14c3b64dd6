"""What transformers loads of an export has our logits, and is read back to the bit."""

import pytest
import torch
from export_cases import CASES, NAMES, assert_same, build, draw_levels, normalise, save, without_head
from foreign_models import randomised
from safetensors.torch import load_file

from polyvit_fast.data import Audio, Image
from polyvit_fast.model import pretrained
from polyvit_fast.model.export.hugging_face import convert
from polyvit_fast.model.export.plain import flatten, select_task

VIT, VIVIT, AST = "ViTForImageClassification", "VivitForVideoClassification", "ASTForAudioClassification"
HELD = {
    "picture": VIT,
    "picture, eps 1e-12": VIT,
    "picture, erf, adaptors": VIT,
    "picture, all adaptors": VIT,
    "two tokens": "DeiTForImageClassification",
    "mean of two tokens": "DeiTForImageClassificationWithTeacher",
    "fixed positions": VIT,
    "clip, 4 frames": VIVIT,
    "clip, 2 frames": VIVIT,
    "masked clip": "VideoMAEForVideoClassification",
    "sound": AST,
    "sound, 3 channels": AST,
    "plain sound": VIT,
}


def load(folder, name):
    import transformers

    return getattr(transformers, name).from_pretrained(folder).eval()


def lay_out(vit, name, levels):
    x = normalise(vit, levels)
    if name.startswith("AST"):
        return x[:, 0, :, :, 0]
    return x[:, 0].movedim(-1, 1) if name.startswith(("ViT", "DeiT")) else x.movedim(-1, 2)


@pytest.mark.parametrize("name", HELD)
def test_logits_are_ours(name, tmp_path):
    polyvit, _, vit = build(name)
    converted = convert(vit)
    save(converted, tmp_path)
    config = converted.configs["config.json"]
    assert config["architectures"] == [HELD[name]]
    theirs, levels = load(tmp_path, HELD[name]), draw_levels(vit)
    assert [theirs.config.id2label[number] for number in range(3)] == list(NAMES)
    with torch.no_grad():
        found = theirs.double()(lay_out(vit, HELD[name], levels)).logits
        torch.testing.assert_close(found, polyvit(levels, "classes"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in HELD if name not in ("fixed positions", "plain sound", "sound, 3 channels")])
def test_round_trip_is_exact(name, tmp_path):
    _, _, vit = build(name, torch.float32)
    written = save(convert(vit), tmp_path)
    back = flatten(pretrained.read(str(tmp_path)), CASES[name][0])
    # VideoMAE has no biases of keys.
    apart = tuple(f"blocks.{number}.attn.qkv.bias" for number in range(3)) if name == "masked clip" else ()
    assert_same(back, vit, apart)
    again = convert(back)
    assert again.configs["config.json"] == convert(vit).configs["config.json"]
    assert again.tensors.keys() == written.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in written.items())


FOREIGN = {
    "ViTForImageClassification": {"image_size": [32, 48]},
    "DeiTForImageClassification": {"image_size": 32},
    "VivitForVideoClassification": {"image_size": 32, "num_frames": 4, "tubelet_size": [4, 16, 16]},
    "VideoMAEForVideoClassification": {"image_size": 32, "num_frames": 4},
    "ASTForAudioClassification": {"max_length": 57, "num_mel_bins": 36},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_transformers_saved_comes_back_as_it_was(name, tmp_path):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80, "num_labels": 3}
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(**sizes, **FOREIGN[name])
    randomised(getattr(transformers, name)(config)).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    converted = convert(flatten(pretrained.read(str(tmp_path))))
    assert converted.tensors.keys() == before.keys()
    assert all(torch.equal(converted.tensors[key], tensor) for key, tensor in before.items())


def test_features_without_a_head(tmp_path):
    for number, (name, kind) in enumerate({"picture": "ViTModel", "clip, 2 frames": "VivitModel", "sound": "ASTModel"}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        polyvit, vit = without_head(name)
        save(convert(vit), folder)
        assert not any(key.startswith(("vit.", "vivit.", "audio")) for key in load_file(folder / "model.safetensors"))
        import transformers

        options = {} if kind == "ASTModel" else {"add_pooling_layer": False}
        theirs, levels = getattr(transformers, kind).from_pretrained(folder, **options).eval().double(), draw_levels(vit)
        with torch.no_grad():
            found, tokens = theirs(lay_out(vit, kind, levels)).last_hidden_state, polyvit.features(levels, "m")
            if kind == "ASTModel":  # its tokens go through all times of a frequency first
                rows, columns = vit.grid.tubelets[1:]
                turned = tokens[:, 2:].unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
                tokens = torch.cat([tokens[:, :2], turned], 1)
            torch.testing.assert_close(found, tokens, rtol=0, atol=1e-12)


def test_its_processor_gets_our_mean():
    _, source, _ = build("picture")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image = Image(size=32, mean=tuple(255 * value for value in mean), std=tuple(255 * value for value in std))
    processor = convert(flatten(select_task(source, "classes", image), image)).configs["preprocessor_config.json"]
    assert (processor["image_mean"], processor["image_std"]) == (mean, std)
    _, source, _ = build("sound, 3 channels")
    audio = Audio(clip_seconds=0.64, num_mel_bins=48, patch_stride=10, num_class_tokens=2, pool="class_tokens")
    processor = convert(flatten(select_task(source, "classes", audio), audio)).configs["preprocessor_config.json"]
    assert (processor["mean"], 2 * processor["std"]) == (audio.mean, audio.std)
    assert (processor["max_length"], processor["num_mel_bins"]) == (64, 48)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", "the nearest is ViT, but its head reads cls, not mean"),
        ("mean, no token", "ViT, but it has 1 class token, not 0 and its head reads cls, not mean"),
        ("mean, no token", "VideoMAE, but its positions are fixed, not learned and its last norm has an eps of 1e-05, not 1e-06"),
    ],
)
def test_what_it_cannot_hold_is_refused(name, message):
    with pytest.raises(ValueError, match="no class of Hugging Face's transformers computes what this model does") as error:
        convert(build(name)[2])
    assert message in str(error.value)


def test_every_case_is_held_or_refused():
    assert set(CASES) - set(HELD) == {"mean", "mean, no token"}
