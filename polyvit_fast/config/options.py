"""Four groups of options of a run: how it reads data, computes, logs, and uses several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyvit_fast.config.record import Record, check_range


@dataclass(frozen=True, kw_only=True)
class DataOptions(Record):
    """How files are read and decoded."""

    decoding: Literal["auto", "cpu", "gpu"] = "auto"
    """Where files are decoded. auto: on the GPU with --device cuda, else on the CPU. Formats without a GPU decoder always use the CPU."""
    num_threads: int = 2
    """CPU threads that decode files."""
    prefetch: int = 4
    """Batches that are decoded ahead of the step that needs them."""
    decode_timeout_seconds: float = 120.0
    """Stop the run when a batch takes longer than this to decode; the message names the file."""
    max_bad_ratio: float = 0.01
    """Largest fraction of a task's files that may be broken before the run stops. Until then each is replaced by another of the task."""
    changed_files: Literal["refuse", "allow"] = "refuse"
    """Whether a run may resume when training files have changed since its checkpoint, for example because broken ones were repaired or
    left out. When their list changes, so does the order of the samples from then on."""

    def __post_init__(self) -> None:
        check_range(self, "[1, 1024]", "num_threads", "prefetch")
        check_range(self, "[0, 1]", "max_bad_ratio")
        check_range(self, "(0, inf)", "decode_timeout_seconds")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Record):
    """How a step is computed."""

    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision of the residual stream between blocks. bf16 halves its memory and needs --precision bf16."""
    attention: Literal["auto", "cudnn", "flash", "xformers"] = "auto"
    """Attention kernel on a GPU. auto: the fastest one measured for the sequence length. xformers needs `pip install mslk-cuda`."""
    capture: bool = True
    """On a GPU, capture each task's step once as a CUDA graph and replay it, so that launching kernels costs no CPU time."""
    recompute: bool = False
    """Activation checkpointing: keep only each block's input and recompute the rest in the backward pass. Far less memory, about a third
    more time."""
    compute_threads: int = 0
    """CPU threads of PyTorch's operators. 0: one less than there are cores, which leaves one for the decoders."""
    nonfinite_patience: int = 10
    """Stop the run after this many steps of a task in a row with a non-finite loss or gradient. Each of them skips its update.
    The host does not wait for a GPU to see them: there the run stops a step or two later."""

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "nonfinite_patience")
        check_range(self, "[0, 1024]", "compute_threads")


@dataclass(frozen=True, kw_only=True)
class LogOptions(Record):
    """How often a run logs, evaluates and saves. All intervals count steps of all tasks together."""

    log_every_steps: int = 20
    """Steps from one log line, with its row of metrics.jsonl and its TensorBoard point, to the next."""
    eval_every_steps: int = 0
    """Steps from one evaluation to the next. 0: only at the end."""
    early_stop_evaluations: int = 0
    """Stop the run when the mean of all tasks' metrics has not risen above its best for so many evaluations in a row. 0: never.
    The learning rate is not adapted to that: its cosine was made for all steps, so that a run which stops early ends at a higher rate."""
    save_every_steps: int = 500
    """Steps from one checkpoint to the next. One is also saved after each evaluation, at the end and when a signal stops the run."""
    keep: int = 2
    """How many of the newest checkpoints are kept. The best one is kept as well."""

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "log_every_steps", "save_every_steps", "keep")
        check_range(self, "[0, inf)", "eval_every_steps", "early_stop_evaluations")
        if self.early_stop_evaluations and not self.eval_every_steps:
            raise ValueError(
                f"early_stop_evaluations = {self.early_stop_evaluations} needs evaluations during the run: set eval_every_steps"
            )


@dataclass(frozen=True, kw_only=True)
class DistributedOptions(Record):
    """How the processes of torchrun work together."""

    sharded: bool = False
    """Split parameters, gradients and optimizer state over the processes (FSDP2), for models too large for one GPU. Turns --capture off."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are all-reduced. bf16 halves the traffic."""
