import math

import numpy as np
import pytest
import torch
from tiny_runs import tile_task, tiny_config
from torchmetrics.functional.classification import multiclass_confusion_matrix, multilabel_average_precision

from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import Loader
from polyvit_fast.inference.answers import ANSWER_COLUMNS, Answers, TaskAnswers
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.evaluate import evaluate


def test_who_is_taken_for_whom():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    answers = TaskAnswers.begin(tile_task(num_classes=4), ("a", "b", "c", "d"))
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        answers.add(logits[part], labels[part])
    expected = multiclass_confusion_matrix(logits, labels, 4)
    assert torch.equal(answers.confusion, expected)
    results = answers.summarise()
    assert [one.name for one in results] == ["a", "b", "c", "d"]
    for number, one in enumerate(results):
        row, column = expected[number].sum().item(), expected[:, number].sum().item()
        assert one.num_files == row
        if row:
            assert one.recall == pytest.approx(expected[number, number].item() / row)
        assert one.precision == pytest.approx(expected[number, number].item() / column)
        assert one.average_precision is None
    assert math.isnan(results[3].recall)  # it has no file


def test_several_labels():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(40, 3, generator=generator), (torch.rand(40, 3, generator=generator) < 0.4).float()
    labels[:, 2] = 0
    answers = TaskAnswers.begin(tile_task(loss="sigmoid", multi_label=True), None)
    answers.add(logits[:25], labels[:25])
    answers.add(logits[25:], labels[25:])
    results = answers.summarise()
    precisions = multilabel_average_precision(logits[:, :2].sigmoid(), labels[:, :2].long(), 2, average=None)
    assert [one.name for one in results] == ["0", "1", "2"]
    for number, one in enumerate(results[:2]):
        said, has = logits[:, number] > 0, labels[:, number] > 0
        assert one.num_files == has.sum()
        assert one.recall == pytest.approx((said & has).sum().item() / has.sum().item())
        assert one.precision == pytest.approx((said & has).sum().item() / said.sum().item())
        assert one.average_precision == pytest.approx(float(precisions[number]), abs=1e-6)
    assert math.isnan(results[2].recall)
    assert math.isnan(results[2].average_precision)
    assert results[2].precision == 0


def test_an_evaluation_gives_every_sample_with_its_answer():
    task = tile_task(num_classes=7, batch=4, val=Synthetic(num_samples=10, seed=1))
    config = tiny_config(tasks={"a": task})
    model, rows = PolyViT.from_config(config), []
    loader = Loader("a", config, train=False)
    answers = Answers(lambda: rows.extend)
    metrics = evaluate(model, config, {"a": loader}, lambda *done: None, keep=answers)["a"]
    assert all(len(row) == len(ANSWER_COLUMNS) for row in rows)
    assert [row[0] for row in rows[::5]] == [sample.media.name for sample in loader.samples]
    assert [row[2] for row in rows[::5]] == [str(sample.labels[0]) for sample in loader.samples]
    assert [row[3] for row in rows] == [1, 2, 3, 4, 5] * 10
    assert np.mean([row[2] == row[4] for row in rows[::5]]) == pytest.approx(metrics["top1"])
    found = answers.tasks["a"]
    assert found.confusion.sum() == found.present.sum() == found.answered.sum() == 10
    assert found.confusion.diag().sum() / 10 == pytest.approx(metrics["top1"])
    for row in rows[:5]:
        assert 0 < row[5] < 1
    assert [row[5] for row in rows[:5]] == sorted((row[5] for row in rows[:5]), reverse=True)
