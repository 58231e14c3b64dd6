"""Layer normalisation, by itself or after the addition of a residual."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polyvit_kernels.ops import dtypes, gradients
from polyvit_kernels.ops.dtypes import check_factors, check_floating, check_one_device, matmul_dtype, norm_dtype
from polyvit_kernels.ops.registration import Pick, pick_torch, register


def layer_norm(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    bias: Float[Tensor, " dim"],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch dim"]:
    """Each vector shifted and scaled to mean 0 and variance 1, then an affine map (arXiv 1607.06450); `eps` adds to the variance.

    `weight` may have another dtype than `x`. `out_dtype` is x's unless given, and fp32 under autocast, as in torch. Raises ValueError
    when shapes, dtypes or devices do not go together, or a dtype is no floating-point one.
    """
    _check_layer_norm(x, weight, bias)
    out_dtype = out_dtype or norm_dtype(x)
    check_floating(out_dtype=out_dtype)
    if not dtypes.runs_registered(x):
        return _layer_norm(x, weight, bias, eps, out_dtype, pick_torch)[0]
    return _layer_norm_op(x, weight, bias, eps, out_dtype)[0]


def layer_norm_residual(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    bias: Float[Tensor, " dim"],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    factors: Float[Tensor, " examples"] | None = None,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """(x, its `layer_norm`), for a residual connection around what follows the norm: the norm's backward adds both gradients of x.

    If the `linear_add` or `mlp` that made x had `factors`, pass them: the backward multiplies by them in the same pass. They change no
    result. Raises ValueError as `layer_norm` does, and unless there is a factor for each example.
    """
    if factors is not None:
        check_factors(factors, x)
    if not (torch.is_grad_enabled() and x.requires_grad and dtypes.runs_registered(x)):
        return x, layer_norm(x, weight, bias, eps, out_dtype)
    _check_layer_norm(x, weight, bias)
    out_dtype = out_dtype or norm_dtype(x)
    check_floating(out_dtype=out_dtype)
    return _LayerNormResidual.apply(x, weight, bias, eps, out_dtype, factors)


def add_layer_norm(
    x: Float[Tensor, "*batch dim"],
    residual: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    bias: Float[Tensor, " dim"],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """(x + residual, its `layer_norm`), in one pass. The sum has torch's dtype for a sum; `out_dtype` is of the normalised one.

    Raises ValueError as `layer_norm` does, and when x and residual differ in shape.
    """
    _check_layer_norm(x, weight, bias)
    check_floating(residual=residual)
    check_one_device(x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, not {list(x.shape)} and {list(residual.shape)}")
    kind = torch.promote_types(x.dtype, residual.dtype)
    out_dtype = out_dtype or norm_dtype(x.new_empty(0, dtype=kind))
    check_floating(out_dtype=out_dtype)
    if not dtypes.runs_registered(x):
        return _add_layer_norm(x, residual, weight, bias, eps, out_dtype, pick_torch)[:2]
    return _add_layer_norm_op(x, residual, weight, bias, eps, out_dtype)[:2]


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not x.ndim or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"x, weight and bias have the shapes {shapes}, but [..., dim], [dim] and [dim] are needed")
    check_floating(x=x, weight=weight, bias=bias)
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must have one dtype, not {weight.dtype} and {bias.dtype}")
    check_one_device(x=x, weight=weight, bias=bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, means, reciprocals of the std)."""
    tile = pick("layer_norm_forward", x, features=x.shape[-1])
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import layer_norm as norm

        _, out, mean, rstd = norm.forward(x, None, weight, bias, eps, out_dtype, tile)
        return out, mean, rstd
    precise = torch.promote_types(x.dtype, torch.float32)
    out, mean, rstd = torch.native_layer_norm(x.to(precise), x.shape[-1:], weight.to(precise), bias.to(precise), eps)
    return out.to(out_dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def _fake_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:-1], dtype=precise), x.new_empty(x.shape[:-1], dtype=precise)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, pick: Pick
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + residual, normalised, means, reciprocals of the std)."""
    tile = pick("layer_norm_forward", x, dtype=torch.promote_types(x.dtype, residual.dtype), features=x.shape[-1])
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import layer_norm as norm

        total, out, mean, rstd = norm.forward(x, residual, weight, bias, eps, out_dtype, tile)
        assert total is not None
        return total, out, mean, rstd
    total = (x + residual).contiguous()
    return total, *_layer_norm(total, weight, bias, eps, out_dtype, pick_torch)


def _fake_add_layer_norm(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return total, *_fake_layer_norm(total, *others)


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    copy_dtype: torch.dtype | None,
    factors: Tensor | None,
    output_mask: list[bool],
    pick: Pick,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(gradient of `x`, its copy in `copy_dtype`, the sums of the copy's columns, gradients of the weight and of the bias).

    `grad_sum` is added to the gradient of `x`. The copy is multiplied by the `factors` of the examples if there are any; it is empty where
    it would be the gradient itself, and without a `copy_dtype`, as the sums are then. They are rounded last. The bias has the weight's
    dtype. `output_mask` says which gradients are wanted, of x, weight and bias; the others are empty. Without that of x there is no
    `grad_sum` and no `copy_dtype`.
    """
    tile = pick("layer_norm_backward", x, features=x.shape[-1])
    if tile.backend != "torch":
        from polyvit_kernels.triton_kernels import layer_norm as norm

        d_x, copy, sums, d_weight, d_bias = norm.backward(grad, grad_sum, x, weight, mean, rstd, tile, copy_dtype, factors)
        copy, sums = (x.new_empty(0) if tensor is None else tensor for tensor in (copy, sums))
        d_x, d_weight, d_bias = _keep_wanted(output_mask, x, weight, (d_x, d_weight, d_bias))  # one pass makes all three
        return d_x, copy, sums, d_weight, d_bias
    precise, kept = mean.dtype, mean[..., None]
    inputs = (grad.to(precise), x.to(precise), x.shape[-1:], kept, rstd.view_as(kept), weight.to(precise), weight.to(precise))
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(*inputs, output_mask)
    if grad_sum is not None:
        d_x += grad_sum
    copy, sums = x.new_empty(0), x.new_empty(0)
    if copy_dtype is not None:
        product = gradients.multiply(d_x, factors)
        copy = copy if copy_dtype is x.dtype and factors is None else product.to(copy_dtype, copy=True)
        sums = product.reshape(-1, len(weight)).sum(0).to(copy_dtype)
    d_x, d_weight, d_bias = _keep_wanted(output_mask, x, weight, (d_x, d_weight, d_bias))
    return d_x, copy, sums, d_weight, d_bias


def _keep_wanted(mask: list[bool], x: Tensor, weight: Tensor, gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The gradients of x, of the weight and of the bias in their dtypes, those not wanted empty."""
    likes = (x, weight, weight)
    return [
        gradient.to(like.dtype) if wanted and gradient is not None else like.new_empty(0)
        for wanted, like, gradient in zip(mask, likes, gradients, strict=True)
    ]


def _fake_layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, copy_dtype, factors, mask = others
    is_same = copy_dtype is x.dtype and factors is None
    copy = x.new_empty(0) if copy_dtype is None or is_same else x.new_empty(x.shape, dtype=copy_dtype)
    sums = x.new_empty(0) if copy_dtype is None else x.new_empty(weight.shape, dtype=copy_dtype)
    shapes = zip(mask, (x, weight, weight), strict=True)
    d_x, d_weight, d_bias = (like.new_empty(like.shape if wanted else 0) for wanted, like in shapes)
    return d_x, copy, sums, d_weight, d_bias


_layer_norm_backward_op = register("layer_norm_backward", _layer_norm_backward, _fake_layer_norm_backward)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate_layer_norm(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    mask = list(ctx.needs_input_grad[:3])
    d_x, _, _, d_weight, d_bias = _layer_norm_backward_op(grad, *ctx.saved_tensors, None, None, None, mask)
    return *_only(mask, (d_x, d_weight, d_bias)), None, None


def _only(mask: Sequence[bool], gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if wanted else None for wanted, gradient in zip(mask, gradients, strict=True)]


_layer_norm_op = register("layer_norm", _layer_norm, _fake_layer_norm, save=_save_layer_norm, differentiate=_differentiate_layer_norm)


def _copy_dtype(x: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products will read the gradient of a residual stream `x`: autocast's, or that of the normalised tensor."""
    return min(matmul_dtype(x), out_dtype, key=lambda dtype: dtype.itemsize)


def _differentiate_residual(
    grad: Tensor,
    grad_x: Tensor | None,
    saved: tuple[Tensor, ...],
    copy_dtype: torch.dtype,
    wanted: Sequence[bool],
    factors: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of a residual stream, with its copy and column sums attached, and where `wanted` of the weight and of the bias."""
    attached, factors = (copy_dtype, factors) if gradients.can_attach(grad) else (None, None)
    mask = [True, *wanted]
    d_x, copy, sums, d_weight, d_bias = _layer_norm_backward_op(grad, *saved, grad_x, attached, factors, mask)
    return _only(mask, (gradients.attach(d_x, copy=copy, sums=sums, factors=factors), d_weight, d_bias))


class _LayerNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, mean, rstd = _layer_norm_op(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.copy_dtype, ctx.factors = _copy_dtype(x, out_dtype), factors
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return grad_x, None, None, None, None, None
        wanted = ctx.needs_input_grad[1:3]
        return *_differentiate_residual(grad, grad_x, ctx.saved_tensors, ctx.copy_dtype, wanted, ctx.factors), None, None, None


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, *_ = inputs
    total, out, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.copy_dtype = _copy_dtype(total, out.dtype)


def _differentiate_add_layer_norm(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:  # the normalised tensor was not used, so that only the sum can have a gradient
        d_sum, d_weight, d_bias = grad_sum, None, None
    else:
        d_sum, d_weight, d_bias = _differentiate_residual(grad, grad_sum, ctx.saved_tensors, ctx.copy_dtype, ctx.needs_input_grad[2:4])
    wanted = ctx.needs_input_grad[:2]
    d_x, d_residual = (d_sum.to(dtype) if needed and d_sum is not None else None for needed, dtype in zip(wanted, ctx.dtypes, strict=True))
    return d_x, d_residual, d_weight, d_bias, None, None


_add_layer_norm_op = register(
    "add_layer_norm", _add_layer_norm, _fake_add_layer_norm, save=_save_add_layer_norm, differentiate=_differentiate_add_layer_norm
)
