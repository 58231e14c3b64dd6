"""What a model costs, by counting: parameters, floating-point operations, bytes of memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polyvit_kernels.flops as _formulas  # noqa: F401 - importing it tells torch's counter what our operations cost
from polyvit_fast.config import Modality, Model, Optim, Task
from polyvit_fast.model.polyvit import PolyViT

Precision = Literal["fp32", "bf16"]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
FP32_BYTES, BF16_BYTES = BYTES["fp32"], BYTES["bf16"]


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters; works on the meta device too."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_trained_parameters(model: nn.Module) -> int:
    """Elements of the parameters that are not frozen."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def forward_flops(model: Model, modality: Modality, num_classes: int) -> int:
    """Floating-point operations of one view's forward pass, two per multiplication of its matrices.

    A training step has three times that, unless something is frozen (`backward_flops`).

    Counted by torch on the meta device: blocks, patch embedding and head; not normalisation, softmax, GELU and sums, which are small in
    comparison. With as many adaptor layers as blocks every token passes every block, as in other libraries' models.
    """
    try:
        return _count_forward(model, modality, num_classes)
    except TypeError:  # a modality of the user's may have a list among its fields, by which nothing is found again
        return _count_forward.__wrapped__(model, modality, num_classes)


@cache
def _count_forward(model: Model, modality: Modality, num_classes: int) -> int:
    # All blocks but the last are alike, so models of one block and of two say what a deeper one costs.
    one, two = (_count_flops(model, depth, modality, num_classes) for depth in (1, 2))
    return one + (model.depth - 1) * (two - one)


def _count_flops(model: Model, depth: int, modality: Modality, num_classes: int) -> int:
    """Of a model with that many blocks, the last of which is of the same kind as the model's last."""
    shallow = replace(model, depth=depth, num_adaptor_layers=0 if model.num_adaptor_layers < model.depth else depth)
    with torch.device("meta"):
        vit = PolyViT(shallow, {modality.name: modality}, {"task": (modality.name, num_classes)})
    with _count_all() as counter, torch.no_grad():
        vit(torch.empty(1, *modality.grid, device="meta"), "task")
    return counter.get_total_flops()


def backward_flops(model: PolyViT, task: str, modality: Modality) -> int:
    """Floating-point operations of one view's backward pass through a model on the meta device, of which some parameters are frozen."""
    logits = model(torch.empty(1, *modality.grid, device="meta"), task)
    with _count_all() as counter:
        logits.sum().backward()
    return counter.get_total_flops()


def _count_all() -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, _WholeModel())
    return counter


class _WholeModel:
    """Instead of torch's tracker, which counts by module, with hooks on all modules: a layer with hooks is called, and not fused."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def state_bytes(model: nn.Module, optim: Optim, keeps_rounded: bool = False) -> int:
    """Memory that lasts for the whole run: parameters, gradients, the optimizer's moments and the moving average, all fp32.

    With `keeps_rounded` the parameters in bf16 too. Of frozen parameters there is nothing but themselves.
    """
    copies = 1 + {"sgd": 1, "adamw": 2}[optim.name] + (optim.ema_decay > 0)
    held = (FP32_BYTES + BF16_BYTES * keeps_rounded) * num_parameters(model)
    return held + FP32_BYTES * copies * num_trained_parameters(model)


def activation_bytes(
    model: Model,
    task: Task,
    precision: Precision = "fp32",
    recompute: bool = False,
    *,
    residual: Precision = "fp32",
    keeps_rounded: bool = False,
    num_frozen: int = 0,
) -> int:
    """Memory that one micro-batch of `task` holds from its forward to its backward pass, on a GPU.

    Counted is what autograd keeps: per block both inputs of the norms, the inputs of attention and of all linear layers, and GELU's
    slope; in bf16 the weights' rounded copies too, unless those last for the whole run. With `recompute` it is the input of every block
    and all that one block keeps. The first `num_frozen` layers (see `count_frozen_layers`) keep nothing. Not counted: short-lived results
    and gradients (about as much as one block keeps), memory that the allocator reserves beyond that, the input grid, decoded batches.
    """
    narrow, wide = BYTES[precision], BYTES[residual]
    batch, tokens = task.batch // task.micro_batches, task.modality.num_tokens
    stream = wide * tokens * model.dim
    embedding = stream if model.dropout and not num_frozen else 0
    num_blocks = min(model.depth, model.depth + 1 - num_frozen)  # that keep anything
    ends_with_class_token = _ends_with_class_token(model, task.modality)
    end = (wide * model.dim if ends_with_class_token else stream) * (num_blocks >= 0) + narrow * model.dim
    num_last = int(ends_with_class_token and num_blocks > 0)
    num_whole, num_inputs = max(0, num_blocks - num_last), 0
    if recompute:  # the block that the backward pass is in, and the inputs of all others
        num_whole, num_last, num_inputs = (1, 0, num_blocks - 1) if num_whole else (0, num_last, 0)
    whole, last = _whole_block_bytes(model, tokens, narrow, wide), _class_token_bytes(model, tokens, narrow, wide)
    blocks = num_whole * whole + num_last * last + num_inputs * stream
    matrices = num_whole * _block_matrices(model) + num_last * (_block_matrices(model) - 3 * model.dim**2)  # its qkv stays fp32
    weights = matrices + model.dim * (_tubelet_elements(task.modality) * (not num_frozen) + task.num_classes)
    return batch * (embedding + blocks + end) + (BF16_BYTES * weights if precision == "bf16" and not keeps_rounded else 0)


def _whole_block_bytes(model: Model, tokens: int, narrow: int, wide: int) -> int:
    """Kept for one example by a block that computes all tokens."""
    statistics = FP32_BYTES * (4 + model.num_heads)
    return tokens * (2 * wide * model.dim + statistics + narrow * (5 * model.dim + _mlp_elements(model)))


def _class_token_bytes(model: Model, tokens: int, narrow: int, wide: int) -> int:
    """Kept for one example by a block that computes the class token alone: of all tokens only what the first norm and the scores are."""
    seen = wide * model.dim + FP32_BYTES * (model.dim + 2 + model.num_heads)
    query = FP32_BYTES * model.dim * (1 + 2 * model.num_heads)
    return tokens * seen + query + wide * model.dim + 2 * FP32_BYTES + narrow * (model.dim + _mlp_elements(model))


def _mlp_elements(model: Model) -> int:
    """Kept for one token by the MLP, and the masks of a block's dropout."""
    return 3 * model.dim + 3 * model.mlp_dim if model.dropout else model.dim + 2 * model.mlp_dim


def _ends_with_class_token(model: Model, modality: Modality) -> bool:
    """Whether the last block computes the class token alone: a shared block does where heads read nothing else, an adaptor does not."""
    return model.num_adaptor_layers < model.depth and modality.pool == "cls"


def _block_matrices(model: Model) -> int:
    """Elements of a block's weight matrices, each used once per token."""
    return model.dim * (4 * model.dim + 2 * model.mlp_dim)


def _tubelet_elements(modality: Modality) -> int:
    frames, rows, columns = modality.tubelet
    return frames * rows * columns * modality.grid[3]
