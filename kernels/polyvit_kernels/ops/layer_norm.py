"""Layer normalisation, by itself or after the addition of a residual."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polyvit_kernels import tiles
from polyvit_kernels.ops import dtypes, gradients
from polyvit_kernels.ops.dtypes import check_factors, check_floating, check_one_device, matmul_dtype, norm_dtype


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
    run = _layer_norm if dtypes.runs_registered(x) else _layer_norm_by_torch
    return run(x, weight, bias, eps, out_dtype)[0]


def layer_norm_residual(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    bias: Float[Tensor, " dim"],
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    factors: Float[Tensor, " examples"] | None = None,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """(x, its `layer_norm`), for a residual that goes past the norm: the backward adds both gradients in the norm's own pass.

    Name the `factors` of the `linear_add` or `mlp` that made x, if it had any: the backward then multiplies by them in the same pass. They
    change no result. Raises ValueError as `layer_norm` does, and unless there is a factor for each example.
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
    run = _add_layer_norm if dtypes.runs_registered(x) else _add_layer_norm_by_torch
    return run(x, residual, weight, bias, eps, out_dtype)[:2]


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not x.ndim or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"x, weight and bias have the shapes {shapes}, but [..., dim], [dim] and [dim] are needed")
    check_floating(x=x, weight=weight, bias=bias)
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must have one dtype, not {weight.dtype} and {bias.dtype}")
    check_one_device(x=x, weight=weight, bias=bias)


def _layer_norm_by_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, means, reciprocal standard deviations)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    out, mean, rstd = torch.native_layer_norm(x.to(precise), x.shape[-1:], weight.to(precise), bias.to(precise), eps)
    return out.to(out_dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


_layer_norm = torch.library.custom_op("polyvit::layer_norm", _layer_norm_by_torch, mutates_args=(), device_types="cpu")


@_layer_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tile = tiles.pick_for("layer_norm_forward", x, features=x.shape[-1])
    if tile.backend == "torch":
        return _layer_norm_by_torch(x, weight, bias, eps, out_dtype)
    from polyvit_kernels.triton_kernels import layer_norm as norm

    with torch.cuda.device_of(x):
        _, out, mean, rstd = norm.forward(x, None, weight, bias, eps, out_dtype, tile)
    return out, mean, rstd


@_layer_norm.register_fake
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:-1], dtype=precise), x.new_empty(x.shape[:-1], dtype=precise)


def _add_layer_norm_by_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + residual, normalised, means, reciprocal standard deviations)."""
    total = (x + residual).contiguous()
    return total, *_layer_norm_by_torch(total, weight, bias, eps, out_dtype)


_add_layer_norm = torch.library.custom_op("polyvit::add_layer_norm", _add_layer_norm_by_torch, mutates_args=(), device_types="cpu")


@_add_layer_norm.register_kernel("cuda")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tile = tiles.pick_for("layer_norm_forward", x, dtype=torch.promote_types(x.dtype, residual.dtype), features=x.shape[-1])
    if tile.backend == "torch":
        return _add_layer_norm_by_torch(x, residual, weight, bias, eps, out_dtype)
    from polyvit_kernels.triton_kernels import layer_norm as norm

    with torch.cuda.device_of(x):
        total, out, mean, rstd = norm.forward(x, residual, weight, bias, eps, out_dtype, tile)
    assert total is not None
    return total, out, mean, rstd


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return total, *_layer_norm_fake(total, weight, bias, eps, out_dtype)


def _layer_norm_backward_by_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    low_dtype: torch.dtype | None,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `x`, with `grad_sum` added when there is one, twice more, then those of the weight and of the bias.

    With a `low_dtype` the gradient of `x` comes in that too, multiplied by the `factors` of the examples if there are any, unless it is
    the same; its columns' sums, rounded last, do as well; what is not wanted is empty. The bias has the weight's dtype.
    """
    precise, kept = mean.dtype, mean[..., None]
    inputs = (grad.to(precise), x.to(precise), x.shape[-1:], kept, rstd.view_as(kept), weight.to(precise), weight.to(precise))
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(*inputs, [True, True, True])
    if grad_sum is not None:
        d_x += grad_sum
    low, sums = x.new_empty(0), x.new_empty(0)
    if low_dtype is not None:
        wanted = gradients.multiply(d_x, factors)
        low = low if low_dtype is x.dtype and factors is None else wanted.to(low_dtype, copy=True)
        sums = wanted.reshape(-1, len(weight)).sum(0).to(low_dtype)
    return d_x.to(x.dtype), low, sums, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


_layer_norm_backward = torch.library.custom_op(
    "polyvit::layer_norm_backward", _layer_norm_backward_by_torch, mutates_args=(), device_types="cpu"
)


@_layer_norm_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    low_dtype: torch.dtype | None,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tile = tiles.pick_for("layer_norm_backward", x, features=x.shape[-1])
    if tile.backend == "torch":
        return _layer_norm_backward_by_torch(grad, x, weight, mean, rstd, grad_sum, low_dtype, factors)
    from polyvit_kernels.triton_kernels import layer_norm as norm

    with torch.cuda.device_of(x):
        d_x, low, sums, d_weight, d_bias = norm.backward(grad, grad_sum, x, weight, mean, rstd, tile, low_dtype, factors)
    low, sums = (x.new_empty(0) if tensor is None else tensor for tensor in (low, sums))
    return d_x, low, sums, d_weight, d_bias


@_layer_norm_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    low_dtype: torch.dtype | None,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    is_same = low_dtype is x.dtype and factors is None
    low = x.new_empty(0) if low_dtype is None or is_same else x.new_empty(x.shape, dtype=low_dtype)
    sums = x.new_empty(0) if low_dtype is None else x.new_empty(weight.shape, dtype=low_dtype)
    return x.new_empty(x.shape), low, sums, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    d_x, _, _, d_weight, d_bias = _layer_norm_backward(grad, *ctx.saved_tensors, None, None, None)
    return d_x, d_weight, d_bias, None, None


def _low_dtype(x: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """In which products will read the gradient of a residual stream `x`: autocast's, or that of the normalised form."""
    return min(matmul_dtype(x), out_dtype, key=lambda dtype: dtype.itemsize)


def _residual_gradients(
    grad: Tensor, grad_x: Tensor | None, saved: tuple[Tensor, ...], low_dtype: torch.dtype, factors: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The gradients of a residual stream, which is handed on with what the layers before will ask of it, of the weight and of the bias."""
    wanted, factors = (low_dtype, factors) if gradients.can_attach(grad) else (None, None)
    d_x, low, sums, d_weight, d_bias = _layer_norm_backward(grad, *saved, grad_x, wanted, factors)
    return gradients.attach(d_x, low=low, sums=sums, factors=factors), d_weight, d_bias


class _LayerNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, mean, rstd = _layer_norm(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.low_dtype, ctx.factors = _low_dtype(x, out_dtype), factors
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return grad_x, None, None, None, None, None
        return *_residual_gradients(grad, grad_x, ctx.saved_tensors, ctx.low_dtype, ctx.factors), None, None, None


def _add_layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, *_ = inputs
    total, out, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.low_dtype = _low_dtype(total, out.dtype)


def _add_layer_norm_gradients(ctx: Any, grad_sum: Tensor | None, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        # Nobody used the normalised one, so the sum's gradient, if there is one, is all there is.
        d_sum, d_weight, d_bias = grad_sum, None, None
    else:
        d_sum, d_weight, d_bias = _residual_gradients(grad, grad_sum, ctx.saved_tensors, ctx.low_dtype)
    d_x, d_residual = (d_sum if d_sum is None else d_sum.to(dtype) for dtype in ctx.dtypes)
    return d_x, d_residual, d_weight, d_bias, None, None


_layer_norm.register_autograd(_layer_norm_gradients, setup_context=_layer_norm_context)
_add_layer_norm.register_autograd(_add_layer_norm_gradients, setup_context=_add_layer_norm_context)
