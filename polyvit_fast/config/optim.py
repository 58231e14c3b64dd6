"""The optimizer: `Optim`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyvit_fast.config.record import Record, check_range


@dataclass(frozen=True, kw_only=True)
class Optim(Record):
    """The optimizer, one for the parameters of all tasks."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: SGD with momentum, as in the paper, for fine-tuning. adamw: for training from random weights."""
    lr: float = 1.0
    """Peak learning rate. A task's lr_scale multiplies it."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; after them a cosine lowers it to 0 at the end of the run.
    They are counted in the sum of all tasks' steps. A schedule with fewer updates, such as accumulating, warms up for the same fraction."""
    momentum: float = 0.9
    """Momentum of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adamw's two moments."""
    eps: float = 1e-8
    """Added to adamw's denominator."""
    weight_decay: float = 0.0
    """Weight decay of the weight matrices, not of biases, norms, position embeddings and class tokens.
    Decoupled from the gradient with adamw, added to it with sgd."""
    clip_norm: float = 1.0
    """Clip the gradient to this global norm over all parameters. 0: off."""
    clip: Literal["mean", "process"] = "mean"
    """Which gradient is clipped under torchrun. With one process both are the same.
    mean: the mean over all processes, which is the gradient of the whole batch.
    process: each process's own gradient before the mean, as the paper's code does for videos and sounds."""
    accumulate: Literal["mean", "sum"] = "mean"
    """How an update over several tasks (schedule accumulating) combines their gradients.
    mean: learning rate and clip_norm then mean the same as for one task.
    sum: larger by the number of tasks. That changes little with adamw, and nothing with sgd in steps whose gradient is clipped."""
    absent: Literal["auto", "coast", "rest"] = "auto"
    """How an update treats parameters of tasks that are not in the step (heads, tokenizers, adaptors).
    coast: their gradient is zero. Momentum still moves them and weight decay goes on, as in the paper's code.
    rest: neither they nor their moments change, as if each task were trained alone.
    auto: coast with sgd, rest with adamw. If it coasted, adamw would move a head that is in one of N updates about sqrt(N) times too far
    for each of them, and decay it N times as much."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: patterns of their names in which * stands for anything, such as "blocks.*" "tokenizers.image.*".
    They have no gradient, momentum or weight decay, and do not count for clip_norm.
    The backward pass computes nothing for them, and ends where all that lies before is frozen."""
    layer_decay: float = 1.0
    """Layer-wise decay of the learning rate for fine-tuning, commonly 0.65 to 0.9. 1: off.
    The rule of BEiT (arXiv 2106.08254) and timm multiplies the rate of
    block i = 0, 1, … (adaptors come first) by layer_decay^(depth - i);
    tokenizers, with positions and class token, by layer_decay^(depth + 1);
    heads by 1, and the last norm too, as in BEiT (in timm it has the last block's)."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated in their stead. 0: off."""

    def __post_init__(self) -> None:
        check_range(self, "(0, inf)", "lr", "eps")
        check_range(self, "(0, 1]", "layer_decay")
        check_range(self, "[0, inf)", "warmup_steps", "weight_decay", "clip_norm")
        check_range(self, "[0, 1)", "momentum", "ema_decay", "betas")

    @property
    def rests(self) -> bool:
        """Whether parameters without a gradient rest: `absent` with auto resolved."""
        return self.absent == "rest" or (self.absent == "auto" and self.name == "adamw")
