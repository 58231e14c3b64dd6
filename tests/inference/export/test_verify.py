"""A comparison finds what is wrong, and says when there is none."""

import dataclasses
import sys

import pytest
import torch
from export_cases import build

from polyvit_fast.inference.export.targets import TARGETS, Subject
from polyvit_fast.inference.export.verify import compare, draw_grids


def make(name="picture"):
    polyvit, source, vit = build(name, torch.float32)
    return polyvit, Subject("classes", source, vit, {"task": "classes"})


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_a_wrong_weight_is_found(to, tmp_path):
    polyvit, subject = make()
    target = TARGETS[to]
    target.write(subject, tmp_path)
    good = compare(subject, target, tmp_path, polyvit)
    assert not isinstance(good, str)
    assert good.difference < 1e-12 < good.largest
    assert str(good).endswith(f"in fp64, where the largest logit is {good.largest:.3g}")
    with torch.no_grad():
        polyvit.blocks[0].norm2.bias[3] += 1e-3
    with pytest.raises(RuntimeError, match=r"computes other logits from the exported files: .* It is a bug in the export"):
        compare(subject, target, tmp_path, polyvit)
    with torch.no_grad():
        polyvit.blocks[0].norm2.bias[3] = torch.nan
    with pytest.raises(RuntimeError, match="they differ by nan"):
        compare(subject, target, tmp_path, polyvit)


def test_the_model_stays_as_it_was(tmp_path):
    polyvit, subject = make()
    before = {name: tensor.clone() for name, tensor in polyvit.state_dict().items()}
    TARGETS["safetensors"].write(subject, tmp_path)
    compare(subject, TARGETS["safetensors"], tmp_path, polyvit.train())
    assert polyvit.training
    assert all(torch.equal(before[name], tensor) for name, tensor in polyvit.state_dict().items())


def test_without_the_library_nothing_is_compared(tmp_path, monkeypatch):
    polyvit, subject = make()
    target = dataclasses.replace(TARGETS["timm"], library="a_library_that_nobody_has")
    assert compare(subject, target, tmp_path, polyvit) == "a_library_that_nobody_has is not installed here"
    broken = tmp_path / "a_broken_library.py"
    broken.write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    target = dataclasses.replace(TARGETS["timm"], library="a_broken_library")
    found = compare(subject, target, tmp_path, polyvit)
    assert found == "a_broken_library cannot be imported here: operator torchvision::nms does not exist"
    sys.modules.pop("a_broken_library", None)


def test_a_part_that_cannot_be_imported_is_no_bug_of_ours(tmp_path):
    """transformers imports a class when it is asked for, and wraps what then goes wrong."""
    polyvit, subject = make()

    def compute(*_):
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'ViTForImageClassification'") from error

    target = dataclasses.replace(TARGETS["hf"], compute=compute)
    found = compare(subject, target, tmp_path, polyvit)
    assert found == "transformers cannot be imported here: operator torchvision::nms does not exist"


def test_grids_are_those_of_a_decoder():
    _, subject = make("plain sound")
    grids = draw_grids(subject.vit, 2)
    assert torch.equal(grids[..., 0], grids[..., 2])
    assert abs(grids.mean() + 4) < 0.5
    assert abs(grids.std() - 9) < 0.5
    _, subject = make()
    levels = dataclasses.replace(subject.vit, preprocessing=dataclasses.replace(subject.vit.preprocessing, dtype="uint8"))
    grids = draw_grids(levels, 2)
    assert (grids.dtype, int(grids.min()), int(grids.max())) == (torch.uint8, 0, 255)
