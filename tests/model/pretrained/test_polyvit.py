"""Our own form: written, and read back to the bit."""

import json

import pytest
import torch
from export_cases import CASES, build
from safetensors.torch import save_file

from polyvit_fast.model import pretrained
from polyvit_fast.model.export.plain import make_contiguous
from polyvit_fast.model.pretrained.polyvit import KEY, describe


def save(source, path, **changes):
    save_file(make_contiguous(source.state_dict()), path, metadata={KEY: json.dumps(describe(source) | changes)})


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name, tmp_path):
    polyvit, source, vit = build(name)
    save(source, tmp_path / "model.safetensors")
    back = pretrained.read(str(tmp_path))
    assert (back.kind, back.model, back.heads["classes"].class_names) == ("PolyViT", source.model, ("cat", "dog", "newt"))
    assert back.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in source.state_dict().items())
    for setting in ("tubelets", "token_stride", "num_class_tokens", "pool", "positions", "mean", "std"):
        assert getattr(back.tokenizers["m"], setting) == getattr(source.tokenizers["m"], setting)
    levels = torch.rand(2, *vit.grid.sizes, dtype=torch.float64) * 255
    with torch.no_grad():
        assert torch.equal(pretrained.load(str(tmp_path))(levels, "classes"), polyvit(levels, "classes"))


def test_tensors_without_a_description_are_refused(tmp_path):
    _, source, _ = build("picture")
    save_file(make_contiguous(source.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"its header does not describe the model; of a run, name the folder \(runs/mine\)"):
        pretrained.read(str(tmp_path))


@pytest.mark.parametrize("changes", [{"model": {"size": 3}}, {"model": {"dim": 64, "num_heads": 5}}, {"tokenizers": {"m": {}}}], ids=str)
def test_a_broken_description_is_refused(changes, tmp_path):
    _, source, _ = build("picture")
    save(source, tmp_path / "model.safetensors", **changes)
    with pytest.raises(ValueError, match="the description in its header is broken"):
        pretrained.read(str(tmp_path))
