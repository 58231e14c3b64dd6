"""The numbers that a task is judged by, over all of its evaluated examples."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from jaxtyping import Float
from torch import Tensor

from polyvit_fast.config import Task
from polyvit_fast.train.loss import LOSSES, Labels


class Metrics:
    """Adds up one task's metrics over batches of any size.

    Single-label tasks: top1, and top5 when there are more than five classes. Multi-label tasks: mAP, the mean over classes of the
    average precision; a class without a positive example has none and is left out. All tasks: loss, the mean over examples, without
    label smoothing.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu") -> None:
        # Here, because torchmetrics takes seconds to import.
        from torchmetrics import Metric
        from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision

        self.task, self.num_examples = task, 0
        # Not torchmetrics' MeanMetric: it drops a NaN, or with nan_strategy="disable" the weights (1.9).
        self.total_loss = torch.zeros((), dtype=torch.float64, device=device)
        # torchmetrics wants two classes: a task of one gets another that is never right.
        self.padding = max(0, 2 - task.num_classes)
        num_classes = task.num_classes + self.padding
        self.num_positives = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.metrics: dict[str, Metric]
        # Without sync_on_compute = False they wait for the other processes of a run, which hold no examples.
        if task.multi_label:
            average_precision = MultilabelAveragePrecision(num_classes, average=None, sync_on_compute=False)
            self.metrics = {"mAP": average_precision.to(device)}
        else:
            ranks = (1, 5) if task.num_classes > 5 else (1,)
            accuracies = (MulticlassAccuracy(num_classes, top_k=k, average="micro", sync_on_compute=False) for k in ranks)
            self.metrics = {f"top{k}": accuracy.to(device) for k, accuracy in zip(ranks, accuracies, strict=True)}

    def update(self, logits: Float[Tensor, "batch classes"], labels: Labels) -> None:
        """Add a batch; labels are int64 [batch], or multi-hot floats [batch, classes] of a multi-label task."""
        if not len(logits):
            return
        self.num_examples += len(logits)
        self.total_loss += LOSSES[self.task.loss](logits, labels, 0.0).double() * len(logits)
        logits = F.pad(logits, (0, self.padding), value=-torch.inf)
        if self.task.multi_label:
            # As probabilities, because torchmetrics would take a batch whose logits happen to lie in [0, 1] for such; in float64, where
            # large logits do not all become 1.
            logits, labels = logits.double().sigmoid(), F.pad(labels, (0, self.padding)).long()
            self.num_positives += labels.sum(0)
        for metric in self.metrics.values():
            metric.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """The metrics so far, the task's own one first; NaN where no example tells."""
        if not self.num_examples:
            return dict.fromkeys([*self.metrics, "loss"], float("nan"))
        if self.task.multi_label:
            values = {"mAP": self._mean_average_precision()}
        else:
            values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        return values | {"loss": float(self.total_loss) / self.num_examples}

    def _mean_average_precision(self) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples found in target")  # torchmetrics gives such a class 0
            precisions = self.metrics["mAP"].compute()
        return float(precisions[self.num_positives > 0].mean())
