"""Features of a task's files, computed once and kept in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyvit_fast import strict_json
from polyvit_fast.config import Train
from polyvit_fast.data.stream import Loader, prefetch, request_validation_batches
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.run_folder.config_json import to_json

Split = Literal["train", "val"]
Progress = Callable[[str, int, int], None]
"""Called with a name, how many files are done, and how many there are."""
LARGEST_TOKENS_BYTES = 16 << 30


@dataclass(frozen=True)
class SplitFeatures:
    """The features of one split of a task, on the CPU, with the labels of `data.stream.Batch`."""

    pooled: Float[Tensor, "examples dim"]
    """What heads read, the mean over the views of a file."""
    tokens: Float[Tensor, "examples tokens dim"] | None
    """All tokens of all views in fp16, where they were asked for."""
    labels: Tensor


class FeatureReader:
    """Reads the features of an experiment's tasks from a frozen model, or from the files in `folder` that it kept before."""

    def __init__(self, model: PolyViT, config: Train, folder: Path, report: Callable[[str], None], progress: Progress) -> None:
        self.model, self.config, self.folder, self.report, self.progress = model.eval(), config, folder, report, progress

    def read(self, name: str, split: Split, *, tokens: bool) -> SplitFeatures:
        """The features of a task's files as an evaluation sees them, with their tokens if asked for. Broken files are left out.

        Raises ValueError when no file can be read, or all tokens together would need too much memory.
        """
        loader = self._open(name, split)
        path = self.folder / f"{name}-{split}-{self._digest(loader, tokens)[:16]}.safetensors"
        if path.is_file():
            try:
                found = load_file(path)
                return SplitFeatures(found["pooled"], found.get("tokens"), found["labels"])
            except (SafetensorError, KeyError, OSError):
                self.report(f"{path} is broken, its features are computed again")
        features = self._compute(loader, split, tokens)
        kept = {"pooled": features.pooled, "labels": features.labels} | ({} if features.tokens is None else {"tokens": features.tokens})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in kept.items()}, temporary)
        temporary.rename(path)
        return features

    def _open(self, name: str, split: Split) -> Loader:
        task = self.config.tasks[name]
        one = replace(self.config, tasks={name: replace(task, val=task.train) if split == "train" else task}, init="")
        return Loader(name, one, train=False, report=self.report)

    def _digest(self, loader: Loader, tokens: bool) -> str:
        """One hash of all that the features follow from: weights, files, and how they are read."""
        digest = hashlib.sha256()
        modality = loader.task.modality
        for key, tensor in self.model.state_dict().items():
            if key.startswith(("blocks.", "norm.", f"tokenizers.{modality.name}.")):
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        settings = [to_json(modality), to_json(self.config.model), self.config.precision, tokens, loader.fingerprint()]
        digest.update(strict_json.dumps(settings).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def _compute(self, loader: Loader, split: Split, tokens: bool) -> SplitFeatures:
        config, modality, name = self.config, loader.task.modality, loader.name
        if tokens:
            _check_memory(name, len(loader.samples) * modality.num_tokens * modality.eval_views * config.model.dim * 2)
        pooled, sequences, labels, total = [], [], [], len(loader.samples)
        requests = request_validation_batches(loader)
        batches = prefetch(requests, depth=config.data.prefetch, timeout_seconds=config.data.decode_timeout_seconds)
        for number, (_, batch) in enumerate(batches, 1):
            self.progress(f"{name} {split}", min(number * loader.size, total), total)
            if not len(batch.labels):
                continue
            count, views = batch.grid.shape[:2]
            grid = batch.grid.flatten(0, 1).to(config.device)
            with torch.autocast(grid.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                embedded = self.model.embed(grid, modality.name, task=name)
                if tokens:
                    all_tokens = self.model.features(grid, modality.name, task=name)
                    sequences.append(all_tokens.unflatten(0, (count, views)).flatten(1, 2).half().cpu())
            pooled.append(embedded.float().unflatten(0, (count, views)).mean(1).cpu())
            labels.append(batch.labels)
        loader.release()
        if not pooled:
            raise ValueError(f"task {name}: no file of its {split} split could be read")
        return SplitFeatures(torch.cat(pooled), torch.cat(sequences) if tokens else None, torch.cat(labels))


def _check_memory(name: str, needed: int) -> None:
    if needed > LARGEST_TOKENS_BYTES:
        raise ValueError(
            f"task {name}: the tokens of all its files need {needed / (1 << 30):.0f} GiB, more than {LARGEST_TOKENS_BYTES >> 30}; "
            "leave the attentive head out (--heads linear few-shot), or take fewer files"
        )
