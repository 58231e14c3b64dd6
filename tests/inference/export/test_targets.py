"""The lines of Python in a model card work as they are written there."""

import json

import pytest
import torch
from PIL import Image

import polyvit_fast as pf
from polyvit_fast.inference.export.targets import TARGETS


def read_code(folder) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def run_card(folder, **values) -> dict:
    exec(compile(read_code(folder), str(folder), "exec"), values)
    return values


def test_a_picture_through_hugging_faces_processor(run, tmp_path):
    pf.export(run.folder, "hf", tmp_path / "out", task="shapes")
    [file, *_] = run.files("shapes")
    with torch.no_grad():
        logits = run_card(tmp_path / "out", picture=Image.open(file))["logits"]
    torch.testing.assert_close(logits, pf.load(run.folder).logits([file], "shapes"), rtol=0, atol=0.05)


def test_a_picture_through_timms_transform(run, tmp_path):
    pf.export(run.folder, "timm", tmp_path / "out", task="shapes")
    [file, *_] = run.files("shapes")
    scope = run_card(tmp_path / "out")
    with torch.no_grad():
        logits = scope["model"](scope["transform"](Image.open(file))[None])
    torch.testing.assert_close(logits, pf.load(run.folder).logits([file], "shapes"), rtol=0, atol=0.05)
    assert scope["model"].pretrained_cfg["label_names"] == list(pf.load(run.folder).classes["shapes"])


@pytest.mark.parametrize("to", ["safetensors", "torch.export", "onnx"])
def test_other_forms_take_what_a_decoder_gives(to, run, tmp_path, unchecked_types):
    pf.export(run.folder, to, tmp_path / "out", task="motion")
    model = pf.load(run.folder)
    pixels = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grids = pixels.movedim(2, -1)
    found = run_card(tmp_path / "out", pixels=pixels, array=pixels.numpy(), grids=grids)["logits"]
    with torch.no_grad():
        truth = model.model(grids, "motion")
    torch.testing.assert_close(torch.as_tensor(found), truth, rtol=0, atol=1e-5)


def test_onnx_says_what_it_is(run, tmp_path):
    import onnxruntime

    pf.export(run.folder, "onnx", tmp_path / "out", task="shapes")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    found, model = session.get_modelmeta().custom_metadata_map, pf.load(run.folder)
    assert json.loads(found["class_names"]) == list(model.classes["shapes"])
    assert (found["task"], found["loss"], json.loads(found["step"])) == ("shapes", "softmax", 12)
    assert json.loads(found["mean"]) == [127.5] * 3
    [pixels] = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape[1:]) == ("pixels", "tensor(uint8)", [3, 48, 48])


def test_every_target_says_its_library():
    assert [target.library for target in TARGETS.values()] == ["timm", "transformers", "polyvit_fast", "torch", "onnxruntime"]
