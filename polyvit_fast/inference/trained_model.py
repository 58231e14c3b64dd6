"""A trained model with all that it takes to use it: `TrainedModel`, which `polyvit_fast.load` returns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polyvit_fast.config import Modality, Task, Train
from polyvit_fast.inference.decoding import GridReader
from polyvit_fast.inference.results import Features, Prediction, Predictions, Skipped
from polyvit_fast.media import printable
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.evaluate import average_logits

OnError = Literal["raise", "skip"]
Pool = Literal["cls", "mean"]
PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}
"""From logits, by `Task.loss`."""


class TrainedModel:
    """A run's model, which predicts and gives features for files, bytes, open files, pictures of Pillow, arrays and tensors.

    Each input is read as an evaluation reads the file that holds the same, and logits are averaged over its views. Arrays may have these
    layouts: pictures HWC, CHW, NHWC, NCHW or HW; videos THWC, TCHW, NTHWC or NTCHW; both uint8, or floats from 0 to 1. Sounds are pairs
    (waveform, rate). An array of six dimensions is a batch of grids as the decoder gives them.
    """

    def __init__(
        self, folder: Path, config: Train, model: PolyViT, classes: Mapping[str, tuple[str, ...] | None], *, step: int, weights: str
    ) -> None:
        self.folder, self.config, self.model, self.step, self.weights = folder, config, model, step, weights
        self.classes = {name: names or tuple(map(str, range(config.tasks[name].num_classes))) for name, names in classes.items()}
        """The names of each task's classes; where the run knows none, their numbers."""
        self._readers: dict[str, GridReader] = {}

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The record of each task."""
        return self.config.tasks

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name} ({task.modality.name}, {task.num_classes} classes)" for name, task in self.tasks.items())
        return f"TrainedModel({str(self.folder)!r}, step {self.step}, {self.weights} weights, {self.config.device}: {tasks})"

    def predict(
        self,
        inputs: Any,
        task: str | None = None,
        *,
        top: int | None = 5,
        on_error: OnError = "raise",
    ) -> Predictions:
        """The `top` most probable classes of each input, or all of them with None; `task` may be left out where the run has one.

        Probabilities are those of the task's loss: softmax's add up to 1, sigmoid's are each class's own. A broken input raises
        ValueError, or with `on_error` = "skip" is named in the result's `skipped`.
        """
        name = self.find_task(task)
        if top is not None and top < 1:
            raise ValueError(f"top = {top} must be at least 1, or None for all classes")
        names, logits, skipped = self._compute_logits(name, inputs, on_error)
        probabilities = PROBABILITIES[self.tasks[name].loss](logits)
        # Stable: of equal logits the first class comes first, as in the metrics.
        order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top]
        rows = [
            Prediction(one, tuple(self.classes[name][number] for number in numbers), tuple(values))
            for one, numbers, values in zip(names, order.tolist(), probabilities.gather(1, order).tolist(), strict=True)
        ]
        return Predictions(name, rows, skipped)

    def logits(self, inputs: Any, task: str | None = None) -> Float[Tensor, "inputs num_classes"]:
        """The logits of each input, averaged over its views, in float32 on the CPU. Raises ValueError for a broken input."""
        return self._compute_logits(self.find_task(task), inputs, "raise")[1]

    @torch.no_grad()
    def features(
        self,
        inputs: Any,
        *,
        modality: str | None = None,
        task: str | None = None,
        layer: int | None = None,
        pool: Pool | None = "cls",
        on_error: OnError = "raise",
    ) -> Features:
        """Features of each input after `layer` blocks, or after all of them and the last norm.

        cls: the class token, or the mean of several where heads read that. mean: the mean of the tubelets' tokens, which without a
        `layer` is then normalised, as heads read it. Both are averaged over the views. None: all tokens, `[input, view, token, dim]`, class
        tokens first. Inputs are read as those of `task`, or of the first task of `modality`; either may be left out where there is one.
        """
        reader = self._find_reader(self.find_task_of(modality, task))
        record = reader.task.modality
        if pool not in ("cls", "mean", None):
            raise ValueError(f"pool = {pool!r} is none of 'cls', 'mean' and None")
        if pool == "cls" and not record.num_class_tokens:
            raise ValueError(f"the modality {record.name} has no class token; take pool='mean'")
        compute = partial(self._compute_features, reader, layer, pool)
        names, found, skipped = self._map_batches(reader, inputs, on_error, compute)
        return Features(torch.cat(found) if found else torch.empty(0, self.config.model.dim), names, skipped)

    def _compute_features(self, reader: GridReader, layer: int | None, pool: Pool | None, grids: Tensor) -> Tensor:
        record, views = reader.task.modality, grids.flatten(0, 1)
        with torch.autocast(grids.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if layer is None and pool == ("mean" if record.pool == "mean" else "cls"):
                found = self.model.embed(views, record.name, task=reader.name)
            else:
                norms_last = pool == "mean" and layer is None
                number = self.config.model.depth if norms_last else layer
                found = _pool_tokens(self.model.features(views, record.name, task=reader.name, layer=number), record, pool)
                found = self.model.norm(found) if norms_last else found
        features = found.float().unflatten(0, grids.shape[:2])
        return features if pool is None else features.mean(1)

    def _compute_logits(self, task: str, inputs: Any, on_error: OnError) -> tuple[list[str], Tensor, list[Skipped]]:
        """The names and logits of the inputs, and those that are broken."""
        compute = partial(average_logits, self.model, task, precision=self.config.precision)
        names, found, skipped = self._map_batches(self._find_reader(task), inputs, on_error, compute)
        return names, torch.cat(found) if found else torch.empty(0, self.tasks[task].num_classes), skipped

    def _map_batches(
        self, reader: GridReader, inputs: Any, on_error: OnError, compute: Callable[[Tensor], Tensor]
    ) -> tuple[list[str], list[Tensor], list[Skipped]]:
        """Names and results of the good inputs, and the broken ones."""
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error = {on_error!r} is neither 'raise' nor 'skip'")
        names, found, skipped = list[str](), list[Tensor](), list[Skipped]()

        def skip(name: str, error: Exception) -> None:
            reason = printable(str(error).strip()) or type(error).__name__
            if on_error == "raise":
                raise ValueError(f"{printable(name)}: {reason}") from error
            skipped.append(Skipped(name, reason))

        self.model.eval()
        for some, grids in reader.read(inputs, skip):
            names += some
            if grids.is_cuda:
                grids.record_stream(torch.cuda.current_stream())  # another stream made it
            found.append(compute(grids.to(self.config.device)).cpu())
        return names, found, skipped

    def _find_reader(self, task: str) -> GridReader:
        return self._readers.setdefault(task, GridReader(task, self.config))

    def find_task(self, task: str | None) -> str:
        """The name of a task, or of the only one. Raises ValueError that names those which are there."""
        if task is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if task is None or task not in self.tasks:
            close = difflib.get_close_matches(str(task), self.tasks, 1)
            hint = f"; perhaps you meant {close[0]!r}" if close else ""
            fault = "has several tasks: name one with task=" if task is None else f"has no task {task!r}{hint}"
            raise ValueError(f"{self.folder} {fault}; it has {', '.join(map(repr, self.tasks))}")
        return task

    def find_task_of(self, modality: str | None, task: str | None) -> str:
        """The task whose files the inputs are read like."""
        modalities = self.config.modalities
        if task is not None:
            task = self.find_task(task)
            if modality not in (None, self.tasks[task].modality.name):
                raise ValueError(
                    f"task {task!r} is of the modality {self.tasks[task].modality.name!r}, not {modality!r}; name one of the two"
                )
            return task
        if modality is None and len(modalities) > 1:
            raise ValueError(f"{self.folder} has several modalities: name one with modality=; it has {', '.join(map(repr, modalities))}")
        if modality is not None and modality not in modalities:
            raise ValueError(f"{self.folder} has no modality {modality!r}; it has {', '.join(map(repr, modalities))}")
        return next(name for name, one in self.tasks.items() if modality in (None, one.modality.name))


def _pool_tokens(tokens: Tensor, modality: Modality, pool: Pool | None) -> Tensor:
    count = modality.num_class_tokens
    if pool == "mean":
        return tokens[:, count:].mean(1)
    return tokens[:, : count if modality.pool == "class_tokens" else 1].mean(1) if pool == "cls" else tokens
