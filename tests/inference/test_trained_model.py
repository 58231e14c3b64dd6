"""What a model says of files is what an evaluation computes for them, in whichever form they are given."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from PIL import Image as Pillow
from torchmetrics.functional.classification import multilabel_average_precision

import polyvit_fast as pf
from polyvit_fast import experiments
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.media import Media
from polyvit_fast.train.evaluate import evaluate_run

TASKS = ("shapes", "motion", "tones", "chords")


@pytest.fixture(scope="module")
def rows(run):
    """The metrics of the run, by its evaluation."""
    config = pf.load(run.folder).config
    return evaluate_run(run.folder, config, "newest", (), lambda *done: None).rows


@pytest.mark.parametrize("task", ["shapes", "motion", "tones"])
def test_predictions_are_those_of_the_evaluation(run, model, rows, task):
    labels = torch.tensor([sample.labels[0] for sample in run.samples(task)])
    logits = model.logits(run.files(task), task)
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(rows[task]["loss"], abs=1e-6)
    predictions = model.predict(run.files(task), task)
    names = [model.classes[task][label] for label in labels]
    assert [row.name for row in predictions] == run.files(task)
    right = [row.classes[0] == name for row, name in zip(predictions, names, strict=True)]
    assert np.mean(right) == pytest.approx(rows[task]["top1"])
    among = [name in row.classes for row, name in zip(predictions, names, strict=True)]
    assert np.mean(among) == pytest.approx(rows[task]["top5"])


def test_predictions_of_several_labels_are_those_of_the_evaluation(run, model, rows):
    predictions = model.predict(run.files("chords"), "chords", top=None)
    classes = model.classes["chords"]
    found = torch.tensor([[row.probabilities[row.classes.index(name)] for name in classes] for row in predictions])
    labels = torch.zeros(len(predictions), 6, dtype=torch.int64)
    for row, sample in zip(labels, run.samples("chords"), strict=True):
        row[list(sample.labels)] = 1
    precisions = multilabel_average_precision(found, labels, 6, average=None)
    assert float(precisions[labels.sum(0) > 0].mean()) == pytest.approx(rows["chords"]["mAP"], abs=1e-6)
    assert not torch.allclose(found.sum(1), torch.ones(len(found)))


def test_probabilities_are_those_of_the_loss(run, model):
    for task, function in (("shapes", lambda x: x.softmax(1)), ("chords", torch.sigmoid)):
        files = run.files(task)[:3]
        expected = function(model.logits(files, task))
        for row, values in zip(model.predict(files, task, top=2), expected, strict=True):
            best = values.topk(2)
            assert row.classes == tuple(model.classes[task][number] for number in best.indices)
            assert row.probabilities == pytest.approx(best.values.tolist())


ROUNDING = {"shapes": 0.02, "motion": 0.15, "tones": 0.0, "chords": 0.0}
"""Pillow decodes a JPEG in its own way, and a video's colours, of half the resolution, are enlarged before they are scaled."""


def decoded(task, path):
    """What a user has after decoding a file."""
    if task == "motion":
        import av

        with av.open(path) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if task == "shapes":
        return np.asarray(Pillow.open(path))
    wave, rate = soundfile.read(path, dtype="float32")
    return wave, rate


@pytest.mark.parametrize("task", TASKS)
def test_a_file_its_bytes_and_what_it_decodes_to_give_the_same(run, model, task):
    path = run.files(task)[3]
    expected = model.logits(path, task)
    same = [Path(path), [path], Path(path).read_bytes(), bytearray(Path(path).read_bytes()), Media(path)]
    for value in same:
        torch.testing.assert_close(model.logits(value, task), expected, rtol=0, atol=0)
    with open(path, "rb") as file:
        torch.testing.assert_close(model.logits(file, task), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.logits(decoded(task, path), task), expected, rtol=0, atol=ROUNDING[task])
    modality = model.tasks[task].modality
    grids = build_decoder(modality, batch=1, train=False, num_threads=1)([Media(path)], [np.random.default_rng()])
    torch.testing.assert_close(model.logits(grids, task), expected, rtol=0, atol=0)


@pytest.mark.parametrize("task", TASKS)
def test_lists_may_mix_all_forms(run, model, task):
    files = run.files(task)[:6]
    stream = io.BytesIO(Path(files[5]).read_bytes())
    mixed = [files[0], Path(files[1]).read_bytes(), decoded(task, files[2]), Path(files[3]), decoded(task, files[4]), stream]
    predictions = model.predict(mixed, task)
    assert [row.name for row in predictions] == [files[0], "input[1]", "input[2]", files[3], "input[4]", "input[5]"]
    stream.seek(0)
    torch.testing.assert_close(model.logits(mixed, task), model.logits(files, task), rtol=1e-5, atol=ROUNDING[task] + 1e-6)
    assert len(model.predict(iter(files), task)) == len(model.predict(tuple(files), task)) == 6


def test_a_lossless_picture_gives_the_same_in_every_form(run, model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    expected = model.logits(str(tmp_path / "a.png"), "shapes")
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(3, 1, 1, 1)
    for value in (pixels, pixels / np.float32(255), Pillow.open(tmp_path / "a.png"), batch, batch / 255):
        for row in model.logits(value, "shapes"):
            torch.testing.assert_close(row, expected[0], rtol=1e-5, atol=1e-6)
    assert [row.name for row in model.predict(batch, "shapes")] == ["input[0]", "input[1]", "input[2]"]


def test_broken_files_are_named_or_skipped(run, model, tmp_path):
    files = run.files("shapes")[:5]
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    shutil.copy(files[0], tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:600])
    broken = [str(tmp_path / name) for name in ("text.jpg", "empty.jpg", "cut.jpg", "missing.jpg")]
    mixed = [files[0], broken[0], *files[1:3], *broken[1:], *files[3:]]
    found = model.predict(mixed, "shapes", on_error="skip")
    assert [row.name for row in found] == files
    assert [one.name for one in found.skipped] == broken
    reasons = ["not an image that can be decoded", "the file is empty", "truncated: the JPEG's end is missing", "the file is missing"]
    assert all(reason in one.reason for reason, one in zip(reasons, found.skipped, strict=True))
    expected = model.predict(files, "shapes")
    for row, other in zip(found, expected, strict=True):
        assert row.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    with pytest.raises(ValueError, match=r"text\.jpg: not an image that can be decoded; it begins with b'no picture'"):
        model.predict(mixed, "shapes")
    features = model.features(mixed, task="shapes", on_error="skip")
    assert (features.names, [one.name for one in features.skipped]) == (files, broken)
    nothing = model.predict(broken, "shapes", on_error="skip")
    assert (len(nothing), len(nothing.skipped)) == (0, 4)
    assert model.features([], task="shapes").tensor.shape == (0, 32)


def test_wrong_arrays_are_refused_even_where_broken_files_are_skipped(model):
    with pytest.raises(ValueError, match=r"input\[0\]: an array of floats from 0 to 200 .*wanted is"):
        model.predict([np.full((8, 8, 3), 200.0) * np.arange(2)[:, None, None].repeat(4, 0)], "shapes", on_error="skip")
    with pytest.raises(ValueError, match="input: an input of type ndarray does not say its sample rate"):
        model.predict(np.zeros(9000, np.float32), "tones", on_error="skip")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.predict([], "shape"), r"has no task 'shape'; perhaps you meant 'shapes'; it has 'shapes', 'motion'"),
        (lambda model: model.predict([]), r"has several tasks: name one with task=; it has 'shapes', 'motion', 'tones', 'chords'"),
        (lambda model: model.logits([], "x"), "has no task 'x'; it has"),
        (lambda model: model.predict([], "shapes", top=0), "top = 0 must be at least 1"),
        (lambda model: model.predict([], "shapes", on_error="ignore"), "on_error = 'ignore' is neither 'raise' nor 'skip'"),
        (lambda model: model.predict("/tmp", "shapes"), "/tmp is a folder; give a list of its files, or use polyvit-fast predict"),
        (lambda model: model.features([]), "has several modalities: name one with modality=; it has 'image', 'video', 'audio'"),
        (lambda model: model.features([], modality="text"), "has no modality 'text'; it has 'image', 'video', 'audio'"),
        (lambda model: model.features([], modality="audio", task="shapes"), "task 'shapes' is of the modality 'image', not 'audio'"),
        (lambda model: model.features([], task="shapes", pool="max"), "pool = 'max' is none of"),
        (lambda model: model.features(np.zeros((9, 9), np.uint8), task="shapes", layer=3), "layer = 3, but the model has 2 blocks"),
    ],
)
def test_what_is_asked_wrongly_is_answered(model, call, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_features_are_what_the_heads_read(run, model):
    for task in TASKS:
        head, files = model.model.heads[task], run.files(task)[:3]
        features = model.features(files, task=task)
        assert features.names == files
        torch.testing.assert_close(head(features.tensor), model.logits(files, task), rtol=1e-4, atol=1e-5)


def test_features_of_layers_and_pools(run, model):
    files, modality = run.files("motion")[:2], model.tasks["motion"].modality
    tokens = model.features(files, modality="video", pool=None).tensor
    assert tokens.shape == (2, 3, modality.num_tokens, 32)
    torch.testing.assert_close(model.features(files, modality="video").tensor, tokens[:, :, 0].mean(1))
    last = model.features(files, modality="video", layer=2, pool=None).tensor
    torch.testing.assert_close(model.model.norm(last), tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.features(files, modality="video", layer=2, pool="mean").tensor, last[:, :, 1:].mean((1, 2)))
    normed = model.model.norm(last[:, :, 1:].mean(2)).mean(1)
    torch.testing.assert_close(model.features(files, modality="video", pool="mean").tensor, normed, rtol=1e-4, atol=1e-5)
    grids = build_decoder(modality, batch=2, train=False, num_threads=1)([Media(file) for file in files], [np.random.default_rng()] * 2)
    first = model.model.tokenizers["video"](grids[:, 1], task="motion").detach()
    torch.testing.assert_close(model.features(files, modality="video", layer=0, pool=None).tensor[:, 1], first)
    assert not tokens.requires_grad


def test_heads_that_read_the_mean_read_these_features(tmp_path):
    config = experiments.load("smoke")
    for pool, number in (("mean", 0), ("class_tokens", 2)):
        task = config.tasks["pictures"]
        task = replace(task, modality=replace(task.modality, pool=pool, num_class_tokens=number), steps=1)
        pf.train(replace(config, tasks={"pictures": task}), out=tmp_path / pool)
        model = pf.load(tmp_path / pool)
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
        features = model.features(pixels, pool="mean" if pool == "mean" else "cls").tensor
        torch.testing.assert_close(model.model.heads["pictures"](features), model.logits(pixels), rtol=1e-4, atol=1e-5)
        if not number:
            with pytest.raises(ValueError, match="the modality image has no class token; take pool='mean'"):
                model.features(pixels)


def test_it_says_what_it_is(run, model):
    text = repr(model)
    assert str(run.folder) in text
    assert "step 12, ema weights, cpu: shapes (image, 6 classes)" in text
