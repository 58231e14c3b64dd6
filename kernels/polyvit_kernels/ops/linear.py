"""A linear layer that takes the gradient of its bias from the backward pass before, where that has summed the columns already."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from polyvit_kernels.ops import dtypes, weights
from polyvit_kernels.ops.dtypes import check_floating
from polyvit_kernels.ops.gradients import sum_columns
from polyvit_kernels.ops.mlp import check_layer, unsafe_view


def linear(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"], bias: Float[Tensor, " out"], shape: tuple[int, ...] = (-1,)
) -> Float[Tensor, "*batch_and_shape"]:
    """x Wᵀ + b, its features in the `shape` that is given, such as (3, heads, head_dim) for attention.

    In that shape the gradient comes back as attention's backward made it, with its column sums attached (`gradients`); a view between the
    two would lose them. Raises ValueError when shapes, dtypes or devices do not go together, or a dtype is no floating-point one.
    """
    check_floating(x=x, weight=weight, bias=bias)
    x, weight, bias = weights.cast(x, weight, bias)
    check_layer(x, x.shape[-1:], weight, bias)
    if not dtypes.runs_registered(x) or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias).unflatten(-1, shape)
    return _Linear.apply(x, weight, bias, shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
        return unsafe_view(y, [*x.shape[:-1], *y.unflatten(-1, shape).shape[1:]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        rows, (wants_x, wants_weight, wants_bias, _) = grad.reshape(-1, len(weight)), ctx.needs_input_grad
        d_x = (rows @ weight).view(x.shape) if wants_x else None
        d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return d_x, d_weight, sum_columns(grad, len(weight), weight.dtype) if wants_bias else None, None
