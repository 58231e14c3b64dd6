"""What ours took in version 0.3.0 on the same card, from that day's raw files, by the titles that the benchmarks give their groups now."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import card

RESULTS = card.ROOT / "benchmarks" / "results"
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
LAYERS = {  # of the file: its operation, and the kernel that had the design and the tile of ours
    "fc1 + GELU + slope 50432×768→3072": ("gelu 50432", "base128"),  # it kept the layer's output in the place of the slope
    "back through GELU 50432×768→3072": ("dgelu 50432", "base128"),  # and wrote the activation once more
    "fc2 + fp32 residual 50432×3072→768": ("fc2_32 50432", "base256"),
    "fc2 + bf16 residual 50432×3072→768": ("fc2_16 50432", "base128"),
    "proj + fp32 residual 50432×768→768": ("proj_32 50432", "base128"),
    "proj + bf16 residual 50432×768→768": ("proj_16 50432", "base128"),
}
STEPS = {"ViT-B/16 bs256": "ViT-B/16 224, batch 256"}


def seconds(group: str, name: str) -> float | None:
    """Of a call of ours on the card of that name; None where nobody measured it."""
    return _all(RESULTS / card.folder_of(name)).get(group)


@cache
def _all(folder: Path) -> dict[str, float]:
    return {title: microseconds / 1e6 for title, microseconds in (*_attention(folder), *_linear(folder), *_steps(folder))}


def _attention(folder: Path) -> Iterator[tuple[str, float]]:
    for row in _read(folder / "attention-today.json", []):
        if row["way"] == "ours":
            yield f"attention {DIRECTIONS[row['dir']]} {row['B']}×{row['S']}×{row['H']}×{row['D']}", row["us"]


def _linear(folder: Path) -> Iterator[tuple[str, float]]:
    times = _read(folder / "gemm-prototypes.json", {"times": {}})["times"]
    for title, (operation, kernel) in LAYERS.items() if times else ():
        yield title, times[operation]["times"][kernel]["us"]


def _steps(folder: Path) -> Iterator[tuple[str, float]]:
    for row in _read(folder / "steps-vit-b.json", []):
        if row["way"] == "ours":
            yield STEPS[row["contest"]], row["ms"] * 1e3


def _read(path: Path, otherwise):
    return json.loads(path.read_text()) if path.exists() else otherwise
