"""What timm loads of an export has our logits, and is read back to the bit."""

import pytest
import torch
from export_cases import CASES, NAMES, assert_same, build, draw_levels, normalise, save, without_head

from polyvit_fast.model import pretrained
from polyvit_fast.model.export.plain import flatten
from polyvit_fast.model.export.timm import convert

HELD = {
    "picture": ("vit_base_patch16_224", "VisionTransformer"),
    "picture, erf, adaptors": ("vit_base_patch16_224", "VisionTransformer"),
    "picture, all adaptors": ("vit_base_patch16_224", "VisionTransformer"),
    "two tokens": ("vit_base_patch16_224", "VisionTransformer"),
    "mean of two tokens": ("deit_base_distilled_patch16_224", "VisionTransformerDistilled"),
    "mean": ("vit_base_patch16_224", "VisionTransformer"),
    "mean, no token": ("vit_base_patch16_224", "VisionTransformer"),
    "fixed positions": ("vit_base_patch16_224", "VisionTransformer"),
    "plain sound": ("vit_base_patch16_224", "VisionTransformer"),
}


def load(folder):
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", HELD)
def test_logits_are_ours(name, tmp_path):
    polyvit, _, vit = build(name)
    converted = convert(vit)
    save(converted, tmp_path)
    theirs, levels = load(tmp_path), draw_levels(vit)
    assert (converted.configs["config.json"]["architecture"], type(theirs).__name__) == HELD[name]
    # Where three channels become one, their weights' sums are rounded: timm's parameters are fp32.
    tolerance = 1e-6 if vit.has_copies else 1e-12
    with torch.no_grad():
        found = theirs.double()(normalise(vit, levels)[:, 0].movedim(-1, 1))
        torch.testing.assert_close(found, polyvit(levels, "classes"), rtol=0, atol=tolerance)
    assert bool(converted.remarks) == (name in ("fixed positions", "plain sound"))


@pytest.mark.parametrize("name", [name for name in HELD if name not in ("fixed positions", "plain sound")])
def test_round_trip_is_exact(name, tmp_path):
    _, _, vit = build(name, torch.float32)
    written = save(convert(vit), tmp_path)
    back = flatten(pretrained.read(str(tmp_path)))
    assert_same(back, vit)
    for setting in ("sizes", "tubelet_sizes", "mean", "std", "num_class_tokens"):
        assert getattr(back.grid, setting) == getattr(vit.grid, setting)
    again = convert(back)
    assert again.tensors.keys() == written.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in written.items())


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg"}, {"img_size": (32, 48), "reg_tokens": 1}], ids=str)
def test_what_timm_saved_comes_back_as_it_was(changes, tmp_path):
    from foreign_models import randomised
    from timm.models import save_for_hf
    from timm.models.vision_transformer import vit_tiny_patch16_224

    theirs = randomised(vit_tiny_patch16_224(depth=2, num_classes=3, **({"img_size": 32} | changes))).eval()
    arguments = {"depth": 2, **{key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}}
    arguments.setdefault("img_size", 32)
    save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    converted = convert(flatten(pretrained.read(str(tmp_path))))
    before = theirs.state_dict()
    assert converted.configs["config.json"]["architecture"] == "vit_tiny_patch16_224"
    assert converted.tensors.keys() == before.keys()
    assert all(torch.equal(converted.tensors[key], tensor) for key, tensor in before.items())


def test_features_without_a_head(tmp_path):
    polyvit, vit = without_head("picture")
    save(convert(vit), tmp_path)
    theirs, levels = load(tmp_path), draw_levels(vit)
    assert theirs.num_classes == 0
    with torch.no_grad():
        found = theirs.double()(normalise(vit, levels)[:, 0].movedim(-1, 1))
        torch.testing.assert_close(found, polyvit.features(levels, "m")[:, 0], rtol=0, atol=1e-12)


def test_its_transform_knows_our_mean_and_names(tmp_path):
    _, _, vit = build("picture")
    save(convert(vit), tmp_path)
    files = load(tmp_path).pretrained_cfg
    assert [255 * value for value in files["mean"]] == [100.0, 110.0, 90.0]
    assert files["label_names"] == list(NAMES)
    assert files["input_size"] == (3, 32, 48) or list(files["input_size"]) == [3, 32, 48]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture, eps 1e-12", "its norm_eps is 1e-12, timm's is 1e-06"),
        ("clip, 2 frames", "it takes 8 frames at once, timm's takes one picture"),
        ("sound, 3 channels", "its tokens overlap .* its head normalises what it reads"),
        ("masked clip", "it takes 8 frames at once"),
    ],
)
def test_what_it_cannot_hold_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        convert(build(name)[2])


def test_every_case_is_held_or_refused():
    refused = set(CASES) - set(HELD)
    assert refused == {"picture, eps 1e-12", "clip, 4 frames", "clip, 2 frames", "masked clip", "sound", "sound, 3 channels"}
    for name in refused:
        with pytest.raises(ValueError, match="timm's VisionTransformer cannot hold this model: "):
            convert(build(name)[2])


def test_mlp_of_any_width(tmp_path):
    from polyvit_fast.model.export.timm import _find_ratio

    for dim in (64, 192, 198, 768):
        assert all(int(dim * _find_ratio(width, dim)) == width for width in range(1, 4 * dim))
