"""The machine that measures: its name, clocks and installed versions, and the least time that it needs for bytes and products."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# What lies here is measured, even where another version is installed or none. `tests/compare.py` judges the results, and ported models
# need the declarations of `tests/drop_in`.
sys.path[:0] = [str(ROOT / folder) for folder in ("", "kernels", "tests", "tests/drop_in")]

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32

IS_TINY = False
"""Whether the benchmarks take sizes that only show that they run (`pytest benchmarks --tiny`)."""

RATES = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 790e12)}
"""Measured: bytes a second of a copy within the GPU, counted both ways; bf16 operations a second of a product of 8192 × 8192 matrices."""
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12}
"""Dense bf16 operations a second by the makers' data sheets: 100 % of a model's FLOPs utilisation (MFU)."""

_PACKAGES = (
    *("torch", "triton", "timm", "transformers", "nvidia-dali-cuda130", "xformers", "liger-kernel", "flash-attn", "flash-attn-3"),
    "pytest-benchmark",
)
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def find_name() -> str:
    """The GPU's name, or the number of the CPU's cores that this process may use."""
    return torch.cuda.get_device_name() if HAS_GPU else f"CPU, {len(os.sched_getaffinity(0))} cores"


def slugify(name: str) -> str:
    """A device's name as a file name: nvidia-h200, cpu-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shorten(name: str) -> str:
    """A GPU's name as the tile table's files have it: h100 for NVIDIA H100 80GB HBM3; the slug where no word names the model alone."""
    model = re.search(r"\b[A-Z]+\d+[A-Z]*\b", name)
    return model.group().lower() if model else slugify(name)


def floor_seconds(num_bytes: float, flops: float) -> float | None:
    """The least time for so many bytes and operations at the GPU's measured rates; None where nobody measured them."""
    if find_name() not in RATES:
        return None
    bandwidth, rate = RATES[find_name()]
    return max(num_bytes / bandwidth, flops / rate)


def compute_mfu(flops: float, seconds: float) -> float | None:
    """Model FLOPs utilisation; None for a GPU whose peak is not listed."""
    peak = PEAKS.get(find_name())
    return peak and flops / seconds / peak


def read_clocks() -> dict[str, float]:
    """What nvidia-smi says now: MHz, watts, degrees; nothing without a GPU."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(_CLOCKS, map(float, line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


@cache
def find_versions() -> dict[str, str]:
    """Versions of Python, CUDA, cuDNN and the installed packages that matter here."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def is_installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that holds it
        return False
