"""From a model of another library through a run and back to that library; and what an export writes, overwrites and refuses."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from stories import STORIES, write_experiment

import polyvit_fast as pf
from polyvit_fast import cli
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.inference.export.targets import TARGETS
from polyvit_fast.inference.export.verify import LogitDifference
from polyvit_fast.model import pretrained
from polyvit_fast.randomness import generator


def decode(model, task):
    """The grids of a task's validation files."""
    record = model.tasks[task]
    samples = list(record.val.samples(record))[:4]
    decoder = build_decoder(record.modality, batch=4, train=False, num_threads=1)
    return decoder([sample.media for sample in samples], [generator(0, str(number)) for number in range(4)])[:, 0]


@pytest.mark.parametrize("name", STORIES)
def test_there_and_back(name, tmp_path):
    """Their weights, ten steps on real files, their library again: it computes what the run does."""
    story = STORIES[name]
    (tmp_path / "theirs").mkdir()
    story.save(tmp_path / "theirs")
    experiment, run, out = write_experiment(story, tmp_path), tmp_path / "run", tmp_path / "out"
    assert cli.run(["train", str(experiment), "--device", "cpu", "--init", str(tmp_path / "theirs"), "--out", str(run)]) == 0
    assert f"theirs ({name})" in (run / "init.txt").read_text()
    exported = pf.export(run, story.to, out)
    assert isinstance(exported.comparison, LogitDifference)
    assert exported.comparison.difference < 1e-12 * max(1, exported.comparison.largest)
    model = pf.load(run)
    grids = decode(model, story.kind)
    mean, std = (torch.tensor(values) for values in model.tasks[story.kind].modality.normalisation)
    inputs = (grids.double() - mean) / std
    if story.to == "timm":
        import timm

        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval().double()
        found = theirs(inputs[:, 0].movedim(-1, 1))
    else:
        import transformers

        kind = json.loads((out / "config.json").read_text())["architectures"][0]
        assert kind in ("ViTForImageClassification", "VivitForVideoClassification", "ASTForAudioClassification")
        theirs = getattr(transformers, kind).from_pretrained(out).eval().double()
        layouts = {"ViTF": inputs[:, 0].movedim(-1, 1), "Vivi": inputs.movedim(-1, 2), "ASTF": inputs[:, 0, :, :, 0]}
        found = theirs(layouts[kind[:4]]).logits
        assert theirs.config.id2label[0] == model.classes[story.kind][0]
    with torch.no_grad():
        truth = model.model.double()(grids, story.kind)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 * max(1, truth.abs().max().item()))
        before = pretrained.load(str(tmp_path / "theirs")).double()(grids.double(), "classes")
    assert (truth - before).abs().max() > 0.01  # it has learnt something


@pytest.mark.parametrize("to", TARGETS)
def test_every_form_has_the_runs_logits(to, run, tmp_path, unchecked_types):
    exported = pf.export(run.folder, to, tmp_path / "out", task="shapes", checkpoint="best")
    assert isinstance(exported.comparison, LogitDifference)
    assert exported.comparison.difference <= (1e-5 if to in ("onnx", "torch.export") else 1e-12)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(exported.files)
    assert "README.md" in exported.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert f"wrote {exported.files[0]}" in str(exported)


def test_our_own_form_starts_a_run(run, tmp_path):
    pf.export(run.folder, "safetensors", tmp_path / "own", task="motion")
    source, model = pretrained.read(str(tmp_path / "own")), pf.load(run.folder)
    assert list(source.heads) == ["motion"]
    assert source.heads["motion"].class_names == model.classes["motion"]
    theirs = source.state_dict()
    ours = model.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; name another folder, or let its model be replaced with --overwrite"):
        pf.export(run.folder, "hf", tmp_path, task="shapes")
    pf.export(run.folder, "hf", tmp_path, task="shapes", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "note.txt",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    pf.export(run.folder, "torch.export", tmp_path, task="shapes", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"note.txt", "README.md", "model.pt2"}
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_what_cannot_be_exported_is_refused(run, tmp_path, unchecked_types):
    for arguments, message in (
        (("hff", {}), "to = 'hff' is none of 'timm', 'hf', 'safetensors', 'torch.export', 'onnx'"),
        (("hf", {}), "has several tasks"),
        (("hf", {"task": "shape"}), "has no task 'shape'"),
        (("timm", {"task": "motion"}), "task motion cannot be exported to timm: .* it takes 8 frames at once"),
        (("hf", {"task": "shapes", "checkpoint": 5}), "holds no checkpoint '5'"),
    ):
        with pytest.raises(ValueError, match=message):
            pf.export(run.folder, arguments[0], tmp_path / "out", **arguments[1])
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is not a run folder"):
        pf.export(tmp_path, "hf", tmp_path / "out")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        pf.export(run.folder, "hf", file, task="shapes")


def test_a_folder_below_a_file_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out cannot be written: Not a directory; choose another with --out"):
        pf.export(run.folder, "hf", Path(tmp_path / "file" / "out"), task="shapes")


@pytest.mark.parametrize("to", ["hf", "timm", "safetensors", "torch.export"])
def test_a_modality_of_ones_own(to, config, tmp_path, unchecked_types):
    """Nothing is known of its files; its grid is all that there is."""
    pf.train(config, out=tmp_path / "run")
    with pytest.raises(ValueError, match="has several tasks"):
        pf.export(tmp_path / "run", to, tmp_path / "out", config=config)
    exported = pf.export(tmp_path / "run", to, tmp_path / "out", task="b", config=config)
    assert isinstance(exported.comparison, LogitDifference)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The run's own decoder makes a grid of 1 frame, 16 rows, 16 columns and 3 channels." in text
    assert "4 classes, whose names the run does not know. Of the logits, sigmoid gives" in text
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_run_of_an_earlier_version(run, tmp_path):
    """0.6 stored neither what tokenizers are like nor whose they are: the configuration says it."""
    shutil.copytree(run.folder, tmp_path / "old")
    newest = sorted((tmp_path / "old" / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    content = json.dumps({key: value for key, value in state.items() if key not in ("tokenizers", "modality_of")}).encode()
    (newest / "state.json").write_bytes(content)
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    old = pf.export(tmp_path / "old", "hf", tmp_path / "out", task="motion")
    new = pf.export(run.folder, "hf", tmp_path / "new", task="motion")
    assert old.comparison == new.comparison
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "new" / "config.json").read_text()
