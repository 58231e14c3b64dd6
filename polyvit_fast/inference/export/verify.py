"""Whether exported files give the logits of the model that they are from, computed by the library that they are for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from polyvit_fast.inference.export.targets import ExportTarget, Subject
from polyvit_fast.model.export.plain import PlainViT
from polyvit_fast.model.polyvit import PolyViT

NUM_GRIDS = 3
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The largest difference, as a fraction of the largest logit, by the dtype in which something was rounded; more is a bug."""


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits of random grids are apart."""

    library: str
    difference: float
    """The largest."""
    largest: float
    """The largest logit."""
    precision: str
    """fp64 or fp32: in which the library computed."""

    def __str__(self) -> str:
        return f"{self.difference:.1e} in {self.precision}, where the largest logit is {self.largest:.3g}"


@torch.no_grad()
def compare(subject: Subject, target: ExportTarget, folder: Path, model: PolyViT) -> LogitDifference | str:
    """How far the logits of the files in a folder are from those of `model`, or why the library cannot be imported.

    Raises RuntimeError when they compute something else.
    """
    grids = draw_grids(subject.vit, NUM_GRIDS)
    try:
        _import_library(target.library)
        found = target.compute(subject, folder, grids)
    except ImportError as error:
        return _explain(target.library, error)
    truth = copy.deepcopy(model).cpu().double().eval()(grids, subject.task)
    difference, largest = (found.double() - truth).abs().max().item(), truth.abs().max().item()
    # Written so that NaN does not pass.
    dtype = torch.float32 if subject.vit.has_copies else target.dtype
    if not difference <= ALLOWED[dtype] * max(1.0, largest):
        raise RuntimeError(
            f"{target.library} computes other logits from the exported files: they differ by {difference:.2e}, where the largest is "
            f"{largest:.3g}. It is a bug in the export: please report it"
        )
    return LogitDifference(target.library, difference, largest, "fp64" if target.dtype == torch.float64 else "fp32")


def _import_library(name: str) -> None:
    try:
        import_module(name)
    except RuntimeError as error:  # what a torchvision that was built for another PyTorch raises
        raise ImportError(str(error)) from error


def _explain(library: str, error: BaseException) -> str:
    """Why a library cannot be imported: the first of the errors, as transformers imports its parts when they are asked for."""
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed here"
    return f"{library} cannot be imported here: {str(error).splitlines()[0]}"


def draw_grids(vit: PlainViT, count: int) -> Tensor:
    """Random grids `[count, frames, rows, columns, channels]` as a decoder might return them."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns, channels = vit.grid.sizes
    if vit.preprocessing.dtype == "uint8":
        return torch.randint(0, 256, (count, frames, rows, columns, channels), dtype=torch.uint8, generator=generator)
    mean, std = map(torch.tensor, vit.grid.normalisation)
    drawn = torch.randn(count, frames, rows, columns, 1 if vit.preprocessing.is_mono else channels, generator=generator)
    return drawn.expand(-1, -1, -1, -1, channels) * std + mean
