"""The machine that measures: its name, its clocks, what is installed, and the least time that it needs for bytes and multiplications."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Measured is what lies here, also where another version is installed or none; `tests/compare.py` judges it.
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "tests")]

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32

# Bytes and bf16 operations a second, measured: a copy within the card counting both ways, a product of 8192 × 8192 random matrices.
RATES = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 790e12)}
# What their makers name as the most for dense products in bf16: the 100 % of a model's FLOPs utilisation (MFU).
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12}

PACKAGES = (
    *(
        "torch",
        "triton",
        "timm",
        "transformers",
        "nvidia-dali-cuda130",
        "xformers",
        "mslk-cuda",
        "liger-kernel",
        "flash-attn",
        "flash-attn-3",
    ),
    "pytest-benchmark",
)
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that any implementation must do: bytes from and to memory, each once, and operations, two for a multiply-add."""

    num_bytes: float
    flops: float = 0.0


def name() -> str:
    """The card's, or the number of the CPU's cores that this process may use."""
    return torch.cuda.get_device_name() if HAS_GPU else f"CPU, {len(os.sched_getaffinity(0))} cores"


def folder_name() -> str:
    """Of `benchmarks/results/<here>`: nvidia-h200, cpu-2-cores."""
    return folder_of(name())


def folder_of(card: str) -> str:
    """The same of a card by its name."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def floor_seconds(cost: Cost, card: str) -> float | None:
    """The time of `cost` at the card's measured rates; None for a card that nobody measured."""
    if card not in RATES:
        return None
    bandwidth, rate = RATES[card]
    return max(cost.num_bytes / bandwidth, cost.flops / rate)


def peak_flops(card: str) -> float | None:
    """Operations in bf16 a second that the card's maker promises; None for a card that is not listed."""
    return PEAKS.get(card)


def clocks() -> dict[str, float]:
    """What nvidia-smi says now: MHz, watts, degrees; nothing where it is not there."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(CLOCKS, map(float, line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def versions() -> dict[str, str]:
    """Of Python, CUDA, cuDNN and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def is_installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
