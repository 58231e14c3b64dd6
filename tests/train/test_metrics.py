import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from long_forms import mark_long

from polyvit_fast.config import Modality, Source, Task
from polyvit_fast.train.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Patch(Modality):
    name: ClassVar[str] = "patch"
    grid = (1, 8, 8, 3)
    tubelet = (1, 8, 8)
    normalisation = ((0.0,), (1.0,))
    eval_views = 1


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    def samples(self, task):
        return []


def task(num_classes: int, **changes) -> Task:
    return Task(modality=Patch(), train=Files(), val=Files(), num_classes=num_classes, steps=1, **changes)


def multi_label(num_classes: int) -> Task:
    return task(num_classes, multi_label=True, loss="sigmoid")


def computed(of: Task, logits: torch.Tensor, labels: torch.Tensor, batch: int) -> dict[str, float]:
    metrics = Metrics(of)
    for start in range(0, len(logits), batch):
        metrics.update(logits[start : start + batch], labels[start : start + batch])
    assert metrics.num_examples == len(logits)
    return metrics.compute()


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Σ (R_n - R_{n-1}) P_n over the distinct thresholds, from the highest."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        precision, recall = positive[chosen].mean(), positive[chosen].sum() / positive.sum()
        total, recall_before = total + (recall - recall_before) * precision, recall
    return total


def sorted_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The same for many examples, as scikit-learn does it."""
    order = np.argsort(-scores, kind="stable")
    last_of_equal = np.flatnonzero(np.append(scores[order][1:] != scores[order][:-1], True))
    hits = np.cumsum(positive[order])[last_of_equal]
    return float(np.sum(np.diff(hits / hits[-1], prepend=0) * hits / (last_of_equal + 1)))


def mean_average_precision(logits: torch.Tensor, labels: torch.Tensor) -> float:
    columns = [(logits[:, j].double().numpy(), labels[:, j].double().numpy()) for j in range(labels.shape[1])]
    return float(np.mean([average_precision(scores, positive) for scores, positive in columns if positive.any()]))


@pytest.mark.parametrize("batch", [1, 7, 64, 100])
def test_top1_and_top5_count_every_example_once(batch):
    torch.manual_seed(0)
    logits, labels = torch.randn(100, 9), torch.randint(9, (100,))
    found = computed(task(9), logits, labels, batch)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert list(found) == ["top1", "top5", "loss"]
    assert found["top1"] == pytest.approx((ranks < 1).double().mean().item(), abs=1e-6)
    assert found["top5"] == pytest.approx((ranks < 5).double().mean().item(), abs=1e-6)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)


def test_top5_needs_more_than_five_classes():
    logits, labels = torch.eye(5), torch.tensor([0, 1, 2, 3, 0])
    assert list(computed(task(5), logits, labels, 5)) == ["top1", "loss"]
    assert computed(task(5), logits, labels, 2)["top1"] == pytest.approx(0.8)
    assert computed(task(1), torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), 2)["top1"] == 1
    assert "top5" in computed(task(6), torch.eye(6), torch.arange(6), 6)


def test_the_loss_is_that_of_the_task_without_smoothing():
    torch.manual_seed(1)
    logits, labels = torch.randn(11, 4), torch.randint(4, (11,))
    expected = F.binary_cross_entropy_with_logits(logits.double(), F.one_hot(labels, 4).double(), reduction="sum") / 11
    assert computed(task(4, loss="sigmoid", label_smoothing=0.2), logits, labels, 3)["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_map_is_exact_over_uneven_batches():
    torch.manual_seed(2)
    logits = torch.randn(101, 6)
    labels = (torch.rand(101, 6) < 0.3).float()
    found = computed(multi_label(6), logits, labels, 16)
    assert list(found) == ["mAP", "loss"]
    assert found["mAP"] == pytest.approx(mean_average_precision(logits, labels), abs=1e-6)
    expected = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum") / 101
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_class_without_positives_is_left_out_not_counted_as_zero():
    torch.manual_seed(3)
    logits = torch.randn(40, 5)
    labels = (torch.rand(40, 5) < 0.4).float()
    labels[:, 1] = labels[:, 4] = 0
    found = computed(multi_label(5), logits, labels, 40)["mAP"]
    assert found == pytest.approx(mean_average_precision(logits, labels), abs=1e-6)
    assert found > 0.3
    assert math.isnan(computed(multi_label(5), logits, torch.zeros(40, 5), 16)["mAP"])


def test_batches_whose_logits_look_like_probabilities_are_ranked_with_the_others():
    logits = torch.tensor([[0.9], [0.2], [3.0], [-2.0]])  # the first two lie in [0, 1]; as probabilities they would pass over the third
    labels = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert computed(multi_label(1), logits, labels, 2)["mAP"] == pytest.approx((1 / 1 + 2 / 4) / 2)


INF = float("inf")
CASES = {  # the sigmoid in fp64 is 1 above 37, and smaller than any number below -745
    "above 37": lambda n: 37 + torch.rand(n, 5) * 20,
    "below -745": lambda n: -745 - torch.rand(n, 5) * 20,
    "huge": lambda n: torch.randn(n, 5) * 1e38,
    "tiny": lambda n: torch.randn(n, 5) * 1e-42,
    "neighbours in fp32": lambda n: 1 + torch.randint(9, (n, 5)) * 2.0**-23,
    "neighbours in fp64": lambda n: 1 + torch.randint(9, (n, 5)).double() * 2.0**-52,
    "beyond fp32": lambda n: torch.randn(n, 5).double() * 1e300,
    "infinite": lambda n: torch.tensor([-INF, -1.0, 0.0, 1.0, INF])[torch.randint(5, (n, 5))],
    "both zeros": lambda n: torch.tensor([-0.0, 0.0, 1e-30])[torch.randint(3, (n, 5))],
    "in [0, 1]": lambda n: torch.rand(n, 5),
    "bf16": lambda n: (torch.randn(n, 5) * 50).bfloat16(),
    "fp16": lambda n: (torch.randn(n, 5) * 50).half(),
    "all equal": lambda n: torch.full((n, 5), 7.0),
}


@pytest.mark.parametrize("batch", [1, 64, 200])
@pytest.mark.parametrize("name", CASES)
def test_map_ranks_the_logits_whatever_they_are(name, batch):
    torch.manual_seed(5)
    logits = CASES[name](200)
    labels = (torch.rand(200, 5) < 0.3).float()
    found = computed(multi_label(5), logits, labels, batch)["mAP"]
    assert found == pytest.approx(mean_average_precision(logits, labels), abs=1e-6)


@pytest.mark.parametrize("std", mark_long([1, 1000], [1000]))
def test_map_of_as_many_examples_as_audioset_has(std):
    torch.manual_seed(6)
    labels = (torch.rand(18_589, 3) < torch.tensor([0.003, 0.1, 0.6])).float()
    logits = (torch.randn(18_589, 3) + labels) * std
    columns = [sorted_average_precision(*(t[:, j].double().numpy() for t in (logits, labels))) for j in range(3)]
    assert columns[0] == pytest.approx(average_precision(*(t[:, 0].double().numpy() for t in (logits, labels))), abs=1e-12)
    assert computed(multi_label(3), logits, labels, 1000)["mAP"] == pytest.approx(float(np.mean(columns)), abs=1e-6)


@pytest.mark.parametrize("form", [torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.double])
def test_of_equal_logits_the_first_class_comes_first(form):
    equal, labels = form(torch.full((10, 10), 3.0)), torch.arange(10)
    found = computed(task(10), equal, labels, 3)
    assert found["top1"] == pytest.approx(0.1)
    assert found["top5"] == pytest.approx(0.5)
    torch.manual_seed(7)
    logits, labels = form(torch.randint(4, (300, 9))), torch.randint(9, (300,))
    earlier = torch.arange(9) < labels[:, None]
    right = logits.gather(1, labels[:, None])
    ranks = ((logits > right) | ((logits == right) & earlier)).sum(1)
    found = computed(task(9), logits, labels, 64)
    assert found["top1"] == pytest.approx((ranks < 1).double().mean().item(), abs=1e-6)
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-6)
    assert found["top5"] == pytest.approx((ranks < 5).double().mean().item(), abs=1e-6)


def test_accuracies_of_infinite_and_huge_logits():
    logits = torch.tensor([[INF, 3e38, 0.0], [-INF, -3e38, -INF], [-INF, -INF, -INF]])
    assert computed(task(3), logits, torch.tensor([0, 1, 0]), 2)["top1"] == 1
    assert computed(task(1), torch.tensor([[-INF], [INF]]), torch.zeros(2, dtype=torch.int64), 2)["top1"] == 1


@given(st.data())
@settings(max_examples=60, derandomize=True)
def test_map_with_ties_equals_the_formula(data):
    num_examples, num_classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    cells = st.lists(st.integers(-3, 3), min_size=num_examples * num_classes, max_size=num_examples * num_classes)
    logits = torch.tensor(data.draw(cells)).view(num_examples, num_classes).float()
    labels = (torch.tensor(data.draw(cells)).view(num_examples, num_classes) > 1).float()
    found = computed(multi_label(num_classes), logits, labels, data.draw(st.integers(1, 12)))["mAP"]
    if labels.any():
        assert found == pytest.approx(mean_average_precision(logits, labels), abs=1e-6)
    else:
        assert math.isnan(found)


def test_bfloat16_logits_and_empty_batches():
    torch.manual_seed(4)
    logits, labels = torch.randn(30, 6).bfloat16(), torch.randint(6, (30,))
    metrics = Metrics(task(6))
    assert all(math.isnan(value) for value in metrics.compute().values())
    metrics.update(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    metrics.update(logits, labels)
    assert metrics.num_examples == 30
    assert metrics.compute()["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-6)
    assert metrics.compute()["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-5)
    several = (torch.rand(30, 6) < 0.5).float()
    assert computed(multi_label(6), logits, several, 7)["mAP"] == pytest.approx(mean_average_precision(logits, several), abs=1e-6)


def test_where_a_logit_is_nan_all_metrics_are():
    logits = torch.zeros(4, 6)
    logits[1, 2] = float("nan")
    found = computed(task(6), logits, torch.tensor([0, 1, 2, 0]), 2)
    assert list(found) == ["top1", "top5", "loss"]
    assert all(math.isnan(value) for value in found.values())
    found = computed(multi_label(6), logits, torch.eye(6)[:4], 2)
    assert list(found) == ["mAP", "loss"]
    assert all(math.isnan(value) for value in found.values())
