"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): a batch is mixed with its own examples in another order, its partners.

What is drawn is one for the whole batch, a pure function of seed, task and step: the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Bool, Float, Int32, UInt8
from torch import Tensor

from polyvit_fast.config import Task
from polyvit_fast.randomness import generator

CUTMIX_PROB = 0.5
"""Of CutMix in a task that has mixup too; timm's switch_prob."""

Grids = UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"]
Ratio = Float[Tensor, ""]
CutBox = tuple[int, int, int, int]
"""(top, left, bottom, right), the last two outside of it."""


@dataclass(frozen=True)
class Mix:
    """How the examples of a batch are mixed; the default is not at all."""

    ratio: float = 1.0
    """Of an example's labels, and with mixup of its pixels; the rest is its partner's."""
    box: CutBox | None = None
    """Where the pixels are the partner's; empty where a task with CutMix has mixup in this step, None in a task without CutMix."""


def draw_mix(task: Task, seed: int, name: str, step: int) -> Mix:
    """The mix of a batch: that of the `step`-th step of the task called `name`."""
    rng = generator(seed, "cutmix", name, step)
    if task.cutmix and not (task.mixup and rng.random() >= CUTMIX_PROB):
        _, rows, columns, _ = task.modality.grid
        side = sqrt(1 - rng.beta(task.cutmix, task.cutmix))  # of the box, as a fraction of the grid's
        spans = [_cut(int(rng.integers(size)), int(size * side), size) for size in (rows, columns)]
        (top, bottom), (left, right) = spans
        return Mix(1 - (bottom - top) * (right - left) / (rows * columns), (top, left, bottom, right))
    ratio = generator(seed, "mixup", name, step).beta(task.mixup, task.mixup) if task.mixup else 1.0
    return Mix(ratio, (0, 0, 0, 0) if task.cutmix else None)


def _cut(centre: int, length: int, size: int) -> tuple[int, int]:
    """Begin and end of a span around `centre`, what lies outside cut off, as in the code of CutMix."""
    return max(0, centre - length // 2), min(size, centre + length // 2)


def mix_grids(grids: Grids, partners: Grids, ratio: Ratio, box: Int32[Tensor, "sides=4"] | None, *, mixup: bool) -> Grids:
    """The grids of a batch mixed with those of their partners, in the grids' own units: the tokenizer normalises afterwards.

    With `mixup` by the `ratio`, unless the box holds something; inside the box, if there is one, they are the partners', in all frames.
    """
    if mixup:
        kept = ratio if box is None else torch.where(box[2] > box[0], 1.0, ratio)
        grids, partners = grids.float(), partners.float()
        grids = grids.lerp(partners, 1 - kept)
    return grids if box is None else torch.where(_find_inside(box, *grids.shape[2:4]), partners, grids)


def _find_inside(box: Int32[Tensor, "sides=4"], num_rows: int, num_columns: int) -> Bool[Tensor, "rows columns 1"]:
    """By comparisons, for no shape may depend on the box."""
    top, left, bottom, right = box.unbind()
    rows, columns = (torch.arange(size, device=box.device) for size in (num_rows, num_columns))
    return ((rows >= top) & (rows < bottom))[:, None, None] & ((columns >= left) & (columns < right))[:, None]
