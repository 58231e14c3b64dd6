"""Probes a frozen model on the tasks of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polyvit_fast import strict_json
from polyvit_fast.config import Task, Train
from polyvit_fast.files import write_atomically
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import Target, load_into
from polyvit_fast.probe.features import FeatureReader, Progress, SplitFeatures
from polyvit_fast.probe.few_shot import measure_few_shot
from polyvit_fast.probe.heads import AttentiveProbe, LinearProbe, Probe, split_for_choice
from polyvit_fast.probe.intervals import Estimate, bootstrap, wilson
from polyvit_fast.train.evaluate import use_device
from polyvit_fast.train.hardware import choose_hardware
from polyvit_fast.train.metrics import Metrics
from polyvit_fast.train.run_folder.initial_weights import list_parts, read_source

Head = Literal["linear", "attentive", "few-shot"]
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RANDOM = "random weights"


@dataclass(frozen=True)
class ProbeResult:
    """One line of the table."""

    weights: str
    """The source of the frozen weights, or "random weights"."""
    task: str
    head: str
    """linear, attentive, or the number of examples of each class: 5-shot."""
    metric: str
    estimate: Estimate
    penalty: float
    num_train: int
    num_val: int


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What to probe, of which weights, by which heads."""

    source: str
    """As for `Train.init`: a run folder, a file of weights, a name on the hub; or PART=SOURCE,... What no part names is random."""
    config: Train
    """Of the experiment whose tasks are new to the model. Its `model` is replaced by the source's."""
    tasks: Sequence[str] = ()
    """Empty: all."""
    heads: Sequence[Head] = ("linear", "attentive", "few-shot")
    shots: Sequence[int] = (1, 5, 20)
    compares_random: bool = False
    """Whether the same model with random weights is probed too."""
    folder: Path
    """Where the features are kept and probe.json is written."""


def probe(plan: ProbePlan, report: Callable[[str], None], progress: Progress) -> list[ProbeResult]:
    """The results of all heads on all tasks, which are also written to probe.json.

    Raises ValueError for a task, source or device that is not there, and for weights that do not fit the tasks' grids.
    """
    unknown = sorted(set(plan.tasks) - plan.config.tasks.keys())
    if unknown:
        raise ValueError(f"the experiment has no task {', '.join(unknown)}; it has {', '.join(plan.config.tasks)}")
    names = plan.tasks or tuple(plan.config.tasks)
    config = replace(choose_hardware(plan.config).config, tasks={name: plan.config.tasks[name] for name in names}, init=plan.source)
    parts_of = list_parts(config)
    sources = {source: read_source(source) for source in parts_of}
    trunk = next((source for source, parts in parts_of.items() if parts is None or "trunk" in parts), None)
    if trunk is None:
        raise ValueError(f"source = {plan.source!r} names no trunk to probe: give a run folder or file of weights, or trunk=SOURCE,...")
    config = replace(config, model=sources[trunk].model)
    results: list[ProbeResult] = []
    with use_device(config):
        for weights in [plan.source, *([RANDOM] if plan.compares_random else [])]:
            model = PolyViT.from_config(config)
            if weights != RANDOM:
                target = Target(polyvit=model, model=config.model, modalities=config.modalities, tasks={}, classes={})
                for source, parts in parts_of.items():
                    loaded = load_into(target, sources[source], parts)
                    report(loaded.summarise())
                    for remark in loaded.remarks:
                        report(f"warning: {remark}")
            reader = FeatureReader(model.to(config.device), config, plan.folder / "features", report, progress)
            for name in names:
                results += _probe_task(reader, plan, name, weights)
    content = {"source": plan.source, "results": [asdict(result) | {"estimate": result.estimate._asdict()} for result in results]}
    write_atomically(plan.folder / "probe.json", strict_json.dumps(content, indent=1) + "\n")
    return results


def _probe_task(reader: FeatureReader, plan: ProbePlan, name: str, weights: str) -> list[ProbeResult]:
    task, seed = reader.config.tasks[name], reader.config.seed
    needs_tokens = "attentive" in plan.heads
    train, val = (reader.read(name, split, tokens=needs_tokens) for split in ("train", "val"))
    counts = (len(train.labels), len(val.labels))
    if len(train.labels) < 2:
        raise ValueError(f"task {name}: heads need two training files at least, and there is {len(train.labels)}")
    results = []
    for head in plan.heads:
        if head == "few-shot":
            if task.multi_label:
                reader.report(f"task {name}: few-shot heads need one class for each example; it has several")
                continue
            for shots in plan.shots:
                found = measure_few_shot((train.pooled, train.labels), (val.pooled, val.labels), task.num_classes, shots, seed)
                results.append(ProbeResult(weights, name, f"{shots}-shot", "top1", found.accuracy, found.penalty, *counts))
            continue
        estimate, penalty = _fit(AttentiveProbe if head == "attentive" else LinearProbe, task, train, val, seed)
        results.append(ProbeResult(weights, name, head, task.metric, estimate, penalty, *counts))
    return results


def _fit(kind: type[Probe], task: Task, train: SplitFeatures, val: SplitFeatures, seed: int) -> tuple[Estimate, float]:
    """The metric on the validation split of a head fitted to all training examples, with the penalty that is best on a fifth of them."""
    features, others = ((split.pooled if kind is LinearProbe else _require(split.tokens)) for split in (train, val))
    fitted, held_out = split_for_choice(len(train.labels), seed)
    candidates = kind(task.num_classes, task.loss, PENALTIES)
    candidates.fit(features[fitted], train.labels[fitted], seed)
    scores = [_measure(task, logits, train.labels[held_out]) for logits in candidates.predict(features[held_out])]
    # Of equal scores the strongest penalty: the simplest head that does as well.
    best = max(range(len(PENALTIES)), key=lambda index: (np.nan_to_num(scores[index], nan=-1.0), index))
    final = kind(task.num_classes, task.loss, PENALTIES[best : best + 1])
    final.fit(features, train.labels, seed)
    return _estimate(task, final.predict(others)[0], val.labels, seed), PENALTIES[best]


def _require(tokens: Tensor | None) -> Tensor:
    assert tokens is not None
    return tokens


def _measure(task: Task, logits: Tensor, labels: Tensor) -> float:
    metrics = Metrics(task)
    metrics.update(logits, labels)
    return metrics.compute()[task.metric]


def _estimate(task: Task, logits: Tensor, labels: Tensor, seed: int) -> Estimate:
    if not task.multi_label:
        return wilson(int((logits.argmax(1) == labels).sum()), len(labels))
    return bootstrap(lambda chosen: _measure(task, logits[torch.from_numpy(chosen)], labels[torch.from_numpy(chosen)]), len(labels), seed)
