"""On which device, in which precision and with how many threads a configuration is computed here, where it leaves that to the machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from polyvit_fast.config import Train
from polyvit_fast.data.threads import count_decoding_threads
from polyvit_fast.train.distributed.process_group import ALONE, World


@dataclass(frozen=True)
class Gpus:
    """What PyTorch finds of NVIDIA GPUs on this machine."""

    name: str = ""
    """Of the first; empty: none that can be used."""
    has_bf16: bool = False
    """Whether all of them multiply matrices in bf16."""
    problem: str = "PyTorch finds no NVIDIA GPU here"
    """Why none can be used."""


@dataclass(frozen=True)
class Chosen:
    """A configuration whose device and precision are settled, and what it was before."""

    config: Train
    asked: Train
    gpus: Gpus
    resumes: bool
    """Whether auto means what the run in the run folder began with."""

    def describe(self) -> str:
        """Device and precision, and why."""
        config, asked = self.config, self.asked
        device = [self.gpus.name] * (config.device == "cuda" and bool(self.gpus.name))
        if asked.device == "auto":
            device += ["as this run began" if self.resumes else "auto" if config.device == "cuda" else f"auto: {self.gpus.problem}"]
        precision = ["as this run began" if self.resumes else "auto"] * (asked.precision == "auto")
        return f"device {config.device}{_in_brackets(device)}, precision {config.precision}{_in_brackets(precision)}"

    def describe_all(self, world: World) -> str:
        """The same with the numbers of threads, for the first lines of a log."""
        decoding, computing = (
            count_decoding_threads(self.config.data.num_threads, world.local_size),
            count_compute_threads(self.config, world),
        )
        return (
            f"{self.describe()}, {_count(decoding, 'decoding thread')} for each task{' (auto)' * (not self.config.data.num_threads)}, "
            f"{_count(computing, 'compute thread')}{' (auto)' * (not self.config.compute.compute_threads)}"
        )


def find_gpus() -> Gpus:
    """The GPUs that PyTorch can use. Makes no CUDA context, for torchrun's processes choose their GPUs only later."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return Gpus()
    major_versions = {int("".join(filter(str.isdigit, arch))) // 10 for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major_versions and major not in major_versions:
            name = torch.cuda.get_device_name(index)
            return Gpus(problem=f"this PyTorch has no code for {name}, whose compute capability is {major}.{minor}")
    has_bf16 = all(torch.cuda.get_device_capability(index)[0] >= 8 for index in range(torch.cuda.device_count()))
    return Gpus(torch.cuda.get_device_name(0), has_bf16, "")


def choose_hardware(config: Train, gpus: Gpus | None = None, *, resumes: bool = False) -> Chosen:
    """`config` with its device and precision settled where they are auto.

    auto is a GPU if there is one that PyTorch can use, else the CPU; bf16 on GPUs that have it, else fp32. With `resumes` it is what the
    run in the run folder began with, if there is one, so that the same command goes on wherever that is possible. Raises ValueError where
    it is not.
    """
    gpus = gpus or find_gpus()
    began = _read_hardware(config.folder) if resumes and config.out else None
    if began and began[0] == "cuda" and config.device == "auto" and not gpus.name:
        raise ValueError(
            f"{config.folder} holds a run on a GPU (device = cuda, precision = {began[1]}), but {gpus.problem}: start the same command "
            "where there is one, or choose another --out to begin a run on the CPU"
        )
    device, precision = config.device, config.precision
    if device == "auto":
        device = began[0] if began else "cuda" if gpus.name else "cpu"
    if precision == "auto" and began and began[0] == device:
        precision = began[1]
    if precision == "auto":
        # Where there is no GPU, nothing is computed on one: `plan` counts for one of today.
        precision = "bf16" if device == "cuda" and (gpus.has_bf16 or not gpus.name) else "fp32"
    return Chosen(replace(config, device=device, precision=precision), config, gpus, began is not None)


def _read_hardware(folder: Path) -> tuple[Literal["cpu", "cuda"], Literal["fp32", "bf16"]] | None:
    """Device and precision of the run in a run folder; None when no run has come as far as a checkpoint there."""
    for path in sorted((folder / "checkpoints").glob("step_*/config.json"), reverse=True):
        try:
            values = json.loads(path.read_bytes())
            device, precision = values.get("device"), values.get("precision")
        except (OSError, ValueError, AttributeError):
            continue
        if device in ("cpu", "cuda") and precision in ("fp32", "bf16"):
            return device, precision
    return None


def count_compute_threads(config: Train, world: World = ALONE) -> int:
    """CPU threads of PyTorch's operators in each process. auto: one less than its part of the cores, which leaves one for the decoders."""
    return config.compute.compute_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size - 1)


def _in_brackets(words: list[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
