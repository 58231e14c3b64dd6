"""The numbers that a task is judged by, over all of its evaluated examples."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from jaxtyping import Float, Int
from torch import Tensor

from polyvit_fast.config import Task
from polyvit_fast.extras import require
from polyvit_fast.train.loss import LOSSES, Labels


class Metrics:
    """Adds up one task's metrics over batches of any size.

    Single-label tasks: top1, and top5 when there are more than five classes; of equal logits the first class comes first. Multi-label
    tasks: mAP, the mean over classes of the average precision; a class without a positive example has none and is left out. All tasks:
    loss, the mean over examples, without label smoothing. Where a logit is NaN, all of them are.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu") -> None:
        require("evaluating", "torchmetrics")
        # Here, because torchmetrics takes seconds to import.
        from torchmetrics.classification import MulticlassAccuracy

        self.task, self.num_examples = task, 0
        # Not torchmetrics' MeanMetric: it drops a NaN, or with nan_strategy="disable" the weights (1.9).
        self.total_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.has_nan = torch.zeros((), dtype=torch.bool, device=device)
        # torchmetrics wants two classes: a task of one gets another that is never right.
        self.padding = max(0, 2 - task.num_classes)
        self.answers: list[tuple[Tensor, Tensor]] = []
        """Of a multi-label task: the logits and labels of each batch, for only all together have an order."""
        ranks = () if task.multi_label else (1, 5) if task.num_classes > 5 else (1,)
        # Without sync_on_compute = False they wait for the other processes of a run, which hold no examples.
        options = {"average": "micro", "sync_on_compute": False}
        self.accuracies = {f"top{k}": MulticlassAccuracy(task.num_classes + self.padding, k, **options).to(device) for k in ranks}

    def update(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> None:
        """Add a batch; labels are int64 [batch], or multi-hot floats [batch, classes] of a multi-label task."""
        if not len(logits):
            return
        self.num_examples += len(logits)
        self.total_loss += LOSSES[self.task.loss](logits, labels, 0.0).double() * len(logits)
        self.has_nan |= logits.isnan().any()
        if self.task.multi_label:
            self.answers.append((logits, labels))
        for accuracy in self.accuracies.values():
            accuracy.update(F.pad(_order_by_logit(logits), (0, self.padding), value=-1.0), labels)

    def compute(self) -> dict[str, float]:
        """The metrics so far, the task's own one first; NaN without examples."""
        names = ["mAP"] if self.task.multi_label else list(self.accuracies)
        if not self.num_examples or self.has_nan:
            return dict.fromkeys([*names, "loss"], float("nan"))
        if self.task.multi_label:
            values = {"mAP": self._mean_average_precision()}
        else:
            values = {name: float(accuracy.compute()) for name, accuracy in self.accuracies.items()}
        return values | {"loss": float(self.total_loss) / self.num_examples}

    def _mean_average_precision(self) -> float:
        precisions = average_precisions(*map(torch.cat, zip(*self.answers, strict=True)))
        return float(precisions[~precisions.isnan()].mean())


def average_precisions(logits: Float[Tensor, "examples classes"], labels: Float[Tensor, "examples classes"]) -> Float[Tensor, " classes"]:
    """The average precision of each class, in float64; NaN where it has no positive example."""
    from torchmetrics.functional.classification import multilabel_average_precision

    padding = max(0, 2 - labels.shape[1])  # torchmetrics wants two classes
    logits, padded = F.pad(logits, (0, padding)), F.pad(labels, (0, padding))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples found in target")  # torchmetrics gives such a class 0
        precisions = multilabel_average_precision(_rank_by_logit(logits), padded.long(), padded.shape[1], average=None)
    return torch.where(padded.sum(0) > 0, precisions.double(), torch.nan)[: labels.shape[1]]


def _order_by_logit(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Numbers in the order of each example's logits, no two equal: torch.topk takes any of equal ones, not the first as argmax does."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    falling = torch.arange(logits.shape[1] - 1, -1, -1.0, device=logits.device)
    return torch.zeros(logits.shape, device=logits.device).scatter_(1, order, falling.expand(logits.shape))


def _rank_by_logit(logits: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes"]:
    """Numbers in [0, 1) in the order of each class's logits, equal where those are.

    torchmetrics would take logits in [0, 1] for probabilities, and of others the sigmoid, which makes one of all large ones.
    """
    ranks: list[Int[Tensor, " examples"]] = [column.unique(return_inverse=True)[1] for column in logits.unbind(1)]
    return torch.stack(ranks, 1).double() / len(logits)
