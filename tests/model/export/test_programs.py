"""Files with graphs, run by PyTorch alone and by onnxruntime."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from export_cases import build, draw_levels

from polyvit_fast.extras import MissingExtraError
from polyvit_fast.model.export import programs
from polyvit_fast.model.export.graph import lay_out
from polyvit_fast.model.export.programs import DESCRIPTION, write_onnx, write_torch_export

NAMES = ["picture", "sound", *(pytest.param(name, marks=pytest.mark.long) for name in ("clip, 2 frames", "masked clip"))]


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_computes_our_logits(name, tmp_path, unchecked_types):
    import onnxruntime

    polyvit, _, vit = build(name, torch.float32)
    write_onnx(vit, tmp_path / "model.onnx", {"task": "classes", "class_names": '["cat"]'})
    session, polyvit = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]), polyvit.double()
    assert session.get_modelmeta().custom_metadata_map == {"task": "classes", "class_names": '["cat"]'}
    assert [node.name for node in session.get_outputs()] == ["logits"]
    for batch in (1, 3):
        levels = draw_levels(vit, batch, seed=batch, dtype=torch.float32)
        [found] = session.run(None, {vit.preprocessing.input_name: lay_out(vit, levels).contiguous().numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, polyvit(levels.double(), "classes").numpy(), rtol=0, atol=1e-5)


def test_a_pt2_needs_pytorch_alone(tmp_path, unchecked_types):
    polyvit, _, vit = build("clip, 4 frames", torch.float32)
    write_torch_export(vit, tmp_path / "model.pt2", '{"task": "classes"}')
    levels = draw_levels(vit, 3, dtype=torch.float32)
    np.save(tmp_path / "pixels.npy", lay_out(vit, levels).numpy())
    code = f"""
import sys, numpy, torch
files = {{"{DESCRIPTION}": ""}}
program = torch.export.load("model.pt2", extra_files=files)
print(files["{DESCRIPTION}"])
numpy.save("logits.npy", program.module()(torch.from_numpy(numpy.load("pixels.npy"))).detach().numpy())
assert not [name for name in sys.modules if name.startswith("polyvit")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '{"task": "classes"}'
    assert "Warning" not in done.stderr
    with torch.no_grad():
        truth = polyvit.double()(levels.double(), "classes").numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), truth, rtol=0, atol=1e-5)


def test_weights_that_are_too_large_for_one_file_have_their_own(tmp_path, monkeypatch, unchecked_types):
    import onnxruntime

    polyvit, _, vit = build("picture", torch.float32)
    monkeypatch.setattr(programs, "LARGEST_FILE", 1 << 12)
    write_onnx(vit, tmp_path / "model.onnx", {})
    assert (tmp_path / "model.onnx").stat().st_size < 1 << 16 < (tmp_path / "model.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    levels = draw_levels(vit, dtype=torch.float32)
    [found] = session.run(None, {"grid": lay_out(vit, levels).contiguous().numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, polyvit(levels, "classes").numpy(), rtol=0, atol=1e-5)


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("polyvit_fast.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"an export to ONNX needs onnx and onnxscript, which are not installed: pip install 'poly"):
        write_onnx(build("picture")[2], tmp_path / "model.onnx", {})
