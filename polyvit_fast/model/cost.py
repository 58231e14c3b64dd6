"""What a model costs, by counting: parameters, floating-point operations, bytes of memory."""

from __future__ import annotations

from typing import Literal

from torch import nn

from polyvit_fast.config import Modality, Model, Optim, Task

FP32_BYTES, BF16_BYTES = 4, 2


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters; works on the meta device too."""
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops(model: Model, modality: Modality, num_classes: int) -> int:
    """Floating-point operations of one view's forward pass, two per multiplication of its matrices; a training step has three times that.

    Counted are blocks, patch embedding and head; not normalisation, softmax, GELU and sums, which are small beside them.
    """
    tokens = modality.num_tokens
    attention = 2 * tokens**2 * model.dim
    blocks = model.depth * (tokens * _block_matrices(model) + attention)
    return 2 * (blocks + (tokens - 1) * _tubelet_elements(modality) * model.dim + model.dim * num_classes)


def state_bytes(model: nn.Module, optim: Optim) -> int:
    """Memory that lasts for the whole run: parameters, gradients, the optimizer's moments and the moving average, all fp32."""
    copies = 2 + {"sgd": 1, "adamw": 2}[optim.name] + (optim.ema_decay > 0)
    return FP32_BYTES * copies * num_parameters(model)


def activation_bytes(model: Model, task: Task, precision: Literal["fp32", "bf16"] = "fp32") -> int:
    """Memory that one micro-batch of `task` holds from its forward to its backward pass.

    Counted is what autograd keeps: per block both inputs of the norms, and the inputs of attention, the GELU and all linear layers but
    the last, which is computed again unless there is dropout; in bf16 the weights' rounded copies too. Not counted: short-lived results
    and gradients (about one block's share), the allocator's slack, the input grid, decoded batches.
    """
    narrow = BF16_BYTES if precision == "bf16" else FP32_BYTES
    batch, tokens = task.batch // task.micro_batches, task.modality.num_tokens
    residual = FP32_BYTES * model.dim
    statistics = FP32_BYTES * (4 + model.num_heads)
    hidden = (2 if model.dropout else 1) * model.mlp_dim
    masks = 2 * model.dim + model.mlp_dim if model.dropout else 0
    block = 2 * residual + narrow * (6 * model.dim + hidden + masks) + statistics
    ends = residual * (2 if model.dropout else 1)
    weights = model.depth * _block_matrices(model) + model.dim * (_tubelet_elements(task.modality) + task.num_classes)
    rounded_weights = BF16_BYTES * weights if precision == "bf16" else 0
    return batch * (tokens * (model.depth * block + ends) + narrow * model.dim) + rounded_weights


def _block_matrices(model: Model) -> int:
    """Elements of a block's weight matrices, each used once per token."""
    return model.dim * (4 * model.dim + 2 * model.mlp_dim)


def _tubelet_elements(modality: Modality) -> int:
    frames, rows, columns = modality.tubelet
    return frames * rows * columns * modality.grid[3]
