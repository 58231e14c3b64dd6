"""Loads weights that were read into a PolyViT of any modalities and tasks, and reports of each tensor what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from polyvit_fast.config import Modality, Model, Task
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.resize import Inflation, Interpolation, fit_kernel, fit_positions, guess_tubelets
from polyvit_fast.model.pretrained.weights import Pretrained, TokenizerWeights, shift_block
from polyvit_fast.model.tokenizer import sinusoids

SIZES = ("dim", "depth", "num_heads", "mlp_dim")
Classes = tuple[str, ...] | None
"""Names of a task's classes; None where only their numbers are known."""


@dataclass(frozen=True)
class Loaded:
    """What became of one tensor of the model."""

    name: str
    origin: str
    """The file's tensor, in our names: "image: pos_embed"; "" where it stays as it was drawn."""
    change: str = ""
    """"" where it was copied as it is; else what was done, or why it is new."""


@dataclass
class LoadReport:
    """Tensor by tensor, what a model got of a source."""

    source: str
    kind: str
    rows: list[Loaded] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """What of the source is not used, and why."""
    remarks: list[str] = field(default_factory=list)
    """Settings in which the model and the source differ."""

    def summarise(self) -> str:
        """One sentence with the counts."""
        copied = sum(bool(row.origin) and not row.change for row in self.rows)
        changed = [row for row in self.rows if row.origin and row.change]
        new = [row for row in self.rows if not row.origin]
        text = f"{self.source} ({self.kind}): {copied} tensors copied"
        text += "".join(f"; {row.name} {row.change}" for row in changed)
        text += f"; {len(new)} new ({', '.join(_group(row.name for row in new))})" if new else ""
        return text + (f"; {len(self.left_out)} left out ({', '.join(_group(self.left_out))})" if self.left_out else "")

    def lines(self) -> list[str]:
        """A line for each tensor."""
        own = [f"{row.name:56} {_describe(row)}" for row in self.rows]
        return own + [f"{name:56} left out: {reason}" for name, reason in self.left_out.items()]


def _describe(row: Loaded) -> str:
    if not row.origin:
        return f"new: {row.change}"
    return f"{row.origin}, {row.change}" if row.change else row.origin


def _group(names: object) -> list[str]:
    """The first two parts of names, each once, at most four."""
    stems = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in cast(list[str], names)))
    return stems[:4] + ["…"] * (len(stems) > 4)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that weights are loaded into, with the records that it was built of."""

    polyvit: PolyViT
    model: Model
    modalities: Mapping[str, Modality]
    tasks: Mapping[str, Task]
    classes: Mapping[str, Classes]
    """Of the tasks."""
    interpolation: Interpolation = "bilinear"
    inflation: Inflation = "central"


def load_into(target: Target, source: Pretrained, parts: Sequence[str] | None = None) -> LoadReport:
    """Copy what the source has for the model's parts: "trunk", names of modalities and of tasks; None: all that it has.

    A tokenizer is loaded from the source's of the same modality, else from its only or first one. A head is loaded where the source has one
    for classes of the same names, row by row; without names on both sides it is loaded if the task is named in `parts`, or has the name
    of the source's task, and the numbers of classes are equal. Everything else stays as it was drawn. Raises ValueError when sizes differ.
    """
    _check_sizes(target.model, source)
    report = LoadReport(source.source, source.kind, left_out=dict(source.left_out))
    values: dict[str, Tensor] = {}
    used: set[str] = set()
    if parts is None or "trunk" in parts:
        report.remarks += _compare_settings(target.model, source)
        _load_trunk(target, source, report, values)
    for name in target.modalities:
        if parts is None or name in parts:
            used.add(_load_tokenizer(target, source, name, report, values))
    for name in target.tasks:
        if parts is None or name in parts:
            _load_head(target, source, name, report, values, asked=parts is not None)
    for name in source.tokenizers.keys() - used:
        report.left_out[f"tokenizers.{name}"] = "the model has no such modality, or it was not asked for"
    own = dict(target.polyvit.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return report


def _check_sizes(model: Model, source: Pretrained) -> None:
    """Raise ValueError that names both where the blocks differ in size."""
    different = [
        f"{name} = {getattr(source.model, name)}, the model {getattr(model, name)}"
        for name in SIZES
        if getattr(source.model, name) != getattr(model, name)
    ]
    if different:
        flags = " ".join(
            f"--model.{name.replace('_', '-')} {getattr(source.model, name)}" for name in ("dim", "depth", "num_heads", "mlp_dim")
        )
        raise ValueError(f"{source.source} ({source.kind}) has {'; '.join(different)}. Take its sizes: {flags}")


def _compare_settings(model: Model, source: Pretrained) -> list[str]:
    return [
        f"the model has {name} = {getattr(model, name)}, {source.source} was trained with {getattr(source.model, name)} "
        f"(--model.{name.replace('_', '-')} {getattr(source.model, name)})"
        for name in ("gelu", "norm_eps", "last_norm_eps")
        if getattr(model, name) != getattr(source.model, name)
    ]


def _load_trunk(target: Target, source: Pretrained, report: LoadReport, values: dict[str, Tensor]) -> None:
    num_adaptors, own = target.model.num_adaptor_layers, dict(target.polyvit.named_parameters())
    first = next(iter(source.tokenizers))
    for name, parameter in own.items():
        if name.startswith(("blocks.", "norm.")):
            _take(source, first, name, shift_block(name, num_adaptors), parameter, report, values)


def _take(
    source: Pretrained, modality: str, name: str, there: str, parameter: Tensor, report: LoadReport, values: dict[str, Tensor]
) -> None:
    """A tensor of a block or of the last norm: `there` in the source, whose first blocks belong to its modalities if it has adaptors."""
    tensors, origin = source.trunk, there
    if there.startswith("blocks.") and int(there.split(".")[1]) < source.model.num_adaptor_layers:
        tensors, origin = source.tokenizers[modality].tensors, f"{modality}: {there}"
    if there not in tensors:
        report.rows.append(Loaded(name, "", "the source has none"))
        return
    if tensors[there].shape != parameter.shape:
        raise ValueError(f"{source.source}: {there} has the shape {list(tensors[there].shape)}, the model's {name} {list(parameter.shape)}")
    values[name] = tensors[there]
    report.rows.append(Loaded(name, origin))


def _load_tokenizer(target: Target, source: Pretrained, name: str, report: LoadReport, values: dict[str, Tensor]) -> str:
    """Gives the name of the source's tokenizer that was used."""
    theirs = name if name in source.tokenizers else next(iter(source.tokenizers))
    tokenizer, modality = source.tokenizers[theirs], target.modalities[name]
    own = {key: value for key, value in target.polyvit.named_parameters() if key.startswith(f"tokenizers.{name}.")}
    if theirs == name:
        report.remarks += _compare_tokens(tokenizer, modality, source.source)
    for key, parameter in own.items():
        short = key.removeprefix(f"tokenizers.{name}.")
        if short.startswith("blocks."):
            _take(source, theirs, key, short, parameter, report, values)
            continue
        if short not in tokenizer.tensors and not (short == "pos_embed" and tokenizer.positions == "sinusoidal"):
            report.rows.append(Loaded(key, "", "the source has none"))
            continue
        try:
            value, change = _fit_tensor(short, tokenizer, modality, parameter, target)
        except ValueError as error:
            advice = "" if theirs == name else f". To leave {name} out, name what to load: trunk={source.source},{theirs}={source.source}"
            raise ValueError(f"{source.source}, {theirs}: {short} does not fit the model's {key}: {error}{advice}") from error
        values[key] = value
        report.rows.append(Loaded(key, f"{theirs}: {short}", change))
    for short in sorted(tokenizer.tensors.keys() - {key.removeprefix(f"tokenizers.{name}.") for key in own}):
        if not short.startswith("blocks."):
            report.left_out[f"{theirs}: {short}"] = f"{name} has none"
    return theirs


def _compare_tokens(tokenizer: TokenizerWeights, modality: Modality, source: str) -> list[str]:
    mean, std = modality.normalisation
    stride = tokenizer.token_stride or modality.tubelet
    pairs = {
        "num_class_tokens": (modality.num_class_tokens, tokenizer.num_class_tokens),
        "pool": (modality.pool, tokenizer.pool),
        "positions": (modality.positions, tokenizer.positions),
        "tokens every (frames, rows, columns)": (modality.token_stride, stride),
        "mean": (mean[0], mean[0] if tokenizer.mean is None else tokenizer.mean[0]),
        "std": (std[0], std[0] if tokenizer.std is None else tokenizer.std[0]),
    }
    return [
        f"{modality.name} has {name} = {ours}, {source} was trained with {theirs}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def _fit_tensor(short: str, tokenizer: TokenizerWeights, modality: Modality, parameter: Tensor, target: Target) -> tuple[Tensor, str]:
    """A tensor of the source's tokenizer as the model has it, and what was done to it."""
    if short == "weight":
        return fit_kernel(tokenizer.tensors[short], (*modality.tubelet, modality.grid[3]), target.inflation)
    if short == "cls_token":
        return _fit_class_tokens(tokenizer.tensors[short], parameter)
    if short == "pos_embed":
        return _fit_all_positions(tokenizer, modality, parameter, target.interpolation)
    return tokenizer.tensors[short], ""


def _fit_class_tokens(theirs: Tensor, ours: Tensor) -> tuple[Tensor, str]:
    old, new = theirs.shape[1], ours.shape[1]
    if old == new:
        return theirs, ""
    return torch.cat([theirs[:, :new], ours.detach()[:, old:]], 1), f"{min(old, new)} of {max(old, new)} class tokens"


def _fit_all_positions(
    tokenizer: TokenizerWeights, modality: Modality, parameter: Tensor, interpolation: Interpolation
) -> tuple[Tensor, str]:
    theirs, old, new = tokenizer.tensors.get("pos_embed"), tokenizer.num_class_tokens, modality.num_class_tokens
    tubelets, from_sines = tokenizer.tubelets, ""
    if theirs is None:
        tubelets, from_sines = tubelets or modality.tubelets, "fixed sines and cosines"
        theirs = functional.pad(sinusoids(math.prod(tubelets), parameter.shape[2]), (0, 0, old, 0))[None]
    count = theirs.shape[1] - old
    tubelets = tubelets or guess_tubelets(count, modality.tubelets)
    if tubelets is None:
        raise ValueError(f"it has {count} positions, which are no square, and the model {modality.num_tokens - new}")
    first, changed = _fit_class_tokens(theirs[:, :old], parameter[:, :new]) if old and new else (parameter.detach()[:, :new], "")
    rest, resized = fit_positions(theirs[:, old:].float(), tubelets, modality.tubelets, interpolation)
    return torch.cat([first.to(rest), rest], 1), ", ".join(filter(None, (from_sines, resized, changed)))


def _load_head(target: Target, source: Pretrained, name: str, report: LoadReport, values: dict[str, Tensor], *, asked: bool) -> None:
    own = {key: value for key, value in target.polyvit.named_parameters() if key.startswith(f"heads.{name}.")}
    head = source.heads.get(name) or (next(iter(source.heads.values())) if len(source.heads) == 1 else None)
    if head is None:
        report.rows += [Loaded(key, "", "the source has no head for it") for key in own]
        return
    classes, theirs = target.classes.get(name), head.class_names
    count = target.tasks[name].num_classes
    if classes and theirs and (asked or head.modality == target.tasks[name].modality.name):
        rows = {theirs.index(label): number for number, label in enumerate(classes) if label in theirs}
        reason = f"none of its classes is among the source's ({', '.join(theirs[:3])}, …)" if not rows else ""
    else:
        agreed = len(head.tensors["weight"]) == count and (asked or name in source.heads)
        rows = {number: number for number in range(count)} if agreed else {}
        reason = "" if agreed else "nothing says that the source's classes are the same"
    for key, parameter in own.items():
        short = key.removeprefix(f"heads.{name}.")
        if not rows or short not in head.tensors:
            report.rows.append(Loaded(key, "", reason or "the source has none"))
            continue
        if short.startswith("norm."):
            values[key], change = head.tensors[short], ""
        else:
            values[key] = parameter.detach().clone()
            values[key][list(rows.values())] = head.tensors[short][list(rows)].to(values[key])
            same = list(rows.items()) == [(number, number) for number in range(count)] and len(head.tensors[short]) == count
            change = "" if same else f"{len(rows)} of {count} classes, by their names"
        report.rows.append(Loaded(key, f"head: {short}", change))
    for short in head.tensors.keys() - {key.removeprefix(f"heads.{name}.") for key in own}:
        report.left_out[f"head: {short}"] = f"the head of {name} has none"
