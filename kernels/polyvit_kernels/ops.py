"""The public operations: differentiable functions of a Vision Transformer, and updates in place on flat buffers.

They are put together from torch's own operators on every device. `reference.py` says what each computes.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

Gelu = Literal["tanh", "erf"]
"""tanh: the approximation of arXiv 1606.08415, section 2; erf: exact."""

_APPROXIMATE = {"tanh": "tanh", "erf": "none"}


def attention(qkv: Float[Tensor, "batch tokens 3 heads head_dim"]) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Softmax attention of every token to all tokens of its example, scores divided by sqrt(head_dim) (arXiv 1706.03762, eq. 1)."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}, but attention needs [batch, tokens, 3, heads, head_dim]")
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def linear_gelu(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "hidden dim"], bias: Float[Tensor, " hidden"], gelu: Gelu
) -> Float[Tensor, "*batch hidden"]:
    """GELU of a linear layer."""
    return functional.gelu(functional.linear(x, weight, bias), approximate=_APPROXIMATE[gelu])


def mlp(
    x: Float[Tensor, "*batch dim"],
    fc1_weight: Float[Tensor, "hidden dim"],
    fc1_bias: Float[Tensor, " hidden"],
    fc2_weight: Float[Tensor, "dim hidden"],
    fc2_bias: Float[Tensor, " dim"],
    gelu: Gelu,
) -> Float[Tensor, "*batch dim"]:
    """Two linear layers with a GELU between them."""
    return functional.linear(linear_gelu(x, fc1_weight, fc1_bias, gelu), fc2_weight, fc2_bias)


def layer_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], bias: Float[Tensor, " dim"], eps: float = 1e-6
) -> Float[Tensor, "*batch dim"]:
    """Each vector shifted and scaled to mean 0 and variance 1, then an affine map (arXiv 1607.06450); `eps` adds to the variance."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def patch_embed(
    grid: UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"],
    weight: Float[Tensor, "dim tubelet_frames tubelet_rows tubelet_columns channels"],
    bias: Float[Tensor, " dim"],
    cls_token: Float[Tensor, "1 1 dim"],
    pos_embed: Float[Tensor, "1 tokens dim"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch tokens dim"]:
    """A grid as tokens: normalised, cut into tubelets, projected, the class token put first, positions added to all of them.

    Tubelets are in the order (frames, rows, columns). `mean` and `std` are in the grid's units. Raises ValueError when sizes disagree.
    """
    _check_patch_embed(grid, weight, pos_embed)
    # Normalised in fp32 at least: bf16 knows a mean such as 123.7 only to within 0.25.
    precise = torch.promote_types(weight.dtype, torch.float32)
    split = grid
    for axis in (3, 2, 1):
        split = split.unflatten(axis, (-1, weight.shape[axis]))
    tubelets = split.permute(0, 1, 3, 5, 2, 4, 6, 7)
    patches = tubelets.to(precise, memory_format=torch.contiguous_format, copy=True).view(len(grid), -1, weight[0].numel())
    repeats = weight[0].numel() // len(mean)
    patches = patches.sub_(mean.to(precise).repeat(repeats)).div_(std.to(precise).repeat(repeats)).to(weight.dtype)
    # Channels are the weight's last axis as they are the grid's: gathering copies whole runs, and the weight is a matrix as it lies.
    embedded = functional.linear(patches, weight.flatten(1), bias)
    return torch.cat([cls_token.expand(len(grid), -1, -1), embedded], 1) + pos_embed


def _check_patch_embed(grid: Tensor, weight: Tensor, pos_embed: Tensor) -> None:
    if grid.ndim != 5:
        raise ValueError(f"the grid has the shape {list(grid.shape)}, but [batch, frames, rows, columns, channels] is needed")
    sizes, tubelet = list(grid.shape[1:4]), list(weight.shape[1:4])
    if grid.shape[4] != weight.shape[4]:
        raise ValueError(f"the grid has {grid.shape[4]} channels and the weight {weight.shape[4]}")
    if any(size % step for size, step in zip(sizes, tubelet, strict=True)):
        raise ValueError(f"a grid of (frames, rows, columns) = {sizes} does not divide into tubelets of {tubelet}")
    num_tokens = 1 + grid[0, ..., 0].numel() // weight[0, ..., 0].numel()
    if pos_embed.shape[1] != num_tokens:
        raise ValueError(
            f"a grid of {sizes} in tubelets of {tubelet} makes {num_tokens} tokens, but there are {pos_embed.shape[1]} positions"
        )


def sgd_(
    param: Float[Tensor, " size"],
    grad: Float[Tensor, " size"],
    momentum_buffer: Float[Tensor, " size"],
    *,
    lr: Float[Tensor, ""],
    scale: Float[Tensor, ""],
    ok: Bool[Tensor, ""],
    momentum: float,
    weight_decay: float,
) -> None:
    """One update of SGD with momentum, in place, with the gradient `scale * grad`; without `ok` neither `param` nor the buffer changes.

    The buffer starts at zero. `grad` is used up: its content afterwards is not defined. Nothing is sent to the host.
    """
    _check_flat(param, grad, momentum_buffer)
    torch.ops.aten._fused_sgd_(
        [param],
        [grad],
        [momentum_buffer],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=scale.reciprocal(),
        found_inf=ok.logical_not().float(),
    )


def adamw_(
    param: Float[Tensor, " size"],
    grad: Float[Tensor, " size"],
    exp_avg: Float[Tensor, " size"],
    exp_avg_sq: Float[Tensor, " size"],
    count: Float[Tensor, ""],
    *,
    lr: Float[Tensor, ""],
    scale: Float[Tensor, ""],
    ok: Bool[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of AdamW (arXiv 1711.05101, algorithm 2), in place, with the gradient `scale * grad`; without `ok` nothing changes.

    `count` is the number of updates, this one included; both averages start at zero.
    `grad` is used up: its content afterwards is not defined. Nothing is sent to the host.
    """
    _check_flat(param, grad, exp_avg, exp_avg_sq)
    torch.ops.aten._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [count],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=scale.reciprocal(),
        found_inf=ok.logical_not().float(),
    )


def _check_flat(*buffers: Tensor) -> None:
    # torch's fused updates walk over raw memory: other layouts would be read wrongly, or beyond their end.
    if any(buffer.ndim != 1 or not buffer.is_contiguous() for buffer in buffers) or len({(len(b), b.dtype) for b in buffers}) > 1:
        shapes = ", ".join(f"{list(buffer.shape)} {buffer.dtype}" for buffer in buffers)
        raise ValueError(f"updates need contiguous flat buffers of one size and dtype, not {shapes}")
