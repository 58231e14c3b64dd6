"""Linear layers fused with what follows them: GELU, the addition to a residual."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from polyvit_kernels.ops import dtypes, weights
from polyvit_kernels.ops.dtypes import check_factors, check_floating, check_one_device
from polyvit_kernels.ops.gradients import cast_and_sum
from polyvit_kernels.ops.registration import Pick, pick_torch, register
from polyvit_kernels.tiles import Tile

Gelu = Literal["tanh", "erf", "quick"]
"""tanh: the approximation of arXiv 1606.08415, section 2; erf: exact; quick: x sigmoid(1.702 x), also of section 2, as in CLIP."""

_APPROXIMATE = {"tanh": "tanh", "erf": "none"}
"""What torch calls the forms that it has."""
# Not `view`: autograd lets nobody write to an operation's output that is a view. As of torch 2.13 there is no public function for this.
unsafe_view = torch.ops.aten._unsafe_view


def linear_gelu(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "hidden dim"], bias: Float[Tensor, " hidden"], gelu: Gelu
) -> Float[Tensor, "*batch hidden"]:
    """GELU of a linear layer. For the backward only GELU's slope is kept.

    Raises ValueError when shapes, dtypes or devices do not go together, a dtype is no floating-point one, or `gelu` is unknown.
    """
    check_floating(x=x, weight=weight, bias=bias)
    x, weight, bias = weights.cast(x, weight, bias)
    _check_gelu(gelu)
    check_layer(x, x.shape[-1:], weight, bias)
    if not dtypes.runs_registered(x):
        return _linear_gelu(x, weight, bias, gelu, False, pick_torch)[0]
    return _linear_gelu_op(x, weight, bias, gelu, _needs_backward(x, weight, bias))[0]


def linear_add(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "out dim"],
    bias: Float[Tensor, " out"],
    residual: Float[Tensor, "*batch out"],
    factors: Float[Tensor, " examples"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """`residual` plus a linear layer, each example of which is multiplied by its factor: drop path's, say.

    Autocast leaves the residual as it is; the sum has the wider of the two dtypes. Factors are fp32 (with an fp64 residual fp64), and get
    no gradient. Raises ValueError when shapes, dtypes or devices do not go together, or a dtype is no floating-point one.
    """
    check_floating(x=x, weight=weight, bias=bias, residual=residual)
    x, weight, bias = weights.cast(x, weight, bias)
    check_layer(x, x.shape[-1:], weight, bias)
    _check_residual(residual, x, weight, factors)
    if not dtypes.runs_registered(x):
        return _linear_add(x, weight, bias, residual, factors, pick_torch)
    return _linear_add_op(x, weight, bias, residual, factors)


def mlp(
    x: Float[Tensor, "*batch dim"],
    fc1_weight: Float[Tensor, "hidden dim"],
    fc1_bias: Float[Tensor, " hidden"],
    fc2_weight: Float[Tensor, "out hidden"],
    fc2_bias: Float[Tensor, " out"],
    gelu: Gelu,
    residual: Float[Tensor, "*batch out"] | None = None,
    factors: Float[Tensor, " examples"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Two linear layers with a GELU between them, added to `residual` if there is one, with `factors` as `linear_add` takes them.

    For the backward the input, the activation and GELU's slope are kept. Raises ValueError as `linear_add` does.
    """
    check_floating(x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    x, *layers = weights.cast(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = layers
    _check_gelu(gelu)
    check_layer(x, x.shape[-1:], fc1_weight, fc1_bias, "fc1_")
    check_layer(x, fc1_weight.shape[:1], fc2_weight, fc2_bias, "fc2_")
    if residual is not None:
        check_floating(residual=residual)
        _check_residual(residual, x, fc2_weight, factors)
    elif factors is not None:
        raise ValueError("factors multiply what is added to a residual, but there is none")
    if not dtypes.runs_registered(x):
        return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, factors, gelu, False, pick_torch)[0]
    return _mlp_op(x, *layers, residual, factors, gelu, _needs_backward(x, *layers))[0]


def _needs_backward(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_gelu(gelu: str) -> None:
    if gelu not in get_args(Gelu):
        raise ValueError(f"gelu is {gelu!r}, but {', '.join(map(repr, get_args(Gelu)))} are what there is")


def check_layer(x: Tensor, features: torch.Size, weight: Tensor, bias: Tensor, name: str = "") -> None:
    """Raises ValueError when a linear layer does not go together with an input of so many `features`, or with its dtype or device."""
    if weight.ndim != 2 or weight.shape[1:] != features or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}weight {list(weight.shape)} and {name}bias {list(bias.shape)} meet an input of {list(features)} features, "
            f"but [out, in], [out] and [in] are needed"
        )
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"x is {x.dtype}, {name}weight {weight.dtype} and {name}bias {bias.dtype}, but one dtype is needed")
    check_one_device(**{"x": x, f"{name}weight": weight, f"{name}bias": bias})


def _check_residual(residual: Tensor, x: Tensor, weight: Tensor, factors: Tensor | None) -> None:
    shape = [*x.shape[:-1], len(weight)]
    if list(residual.shape) != shape:
        raise ValueError(f"the residual has the shape {list(residual.shape)}, but {shape} is needed")
    check_one_device(x=x, residual=residual)
    if factors is not None:
        check_factors(factors, residual)


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _apply_gelu_layer(rows: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool, pick: Pick) -> tuple[Tensor, Tensor]:
    """gelu(H) and, for the backward pass, the slope gelu'(H), which is empty unless `keep`."""
    tile = pick("linear_gelu_forward", rows, tokens=len(rows), features=rows.shape[1])
    if tile.backend != "torch":
        return _kernels(tile).linear_gelu_forward(rows, weight, bias, gelu, keep, tile)
    pre = torch.addmm(bias, rows, weight.t())
    return apply_gelu(pre, gelu), _slope(pre, gelu) if keep else pre.new_empty(0)


def apply_gelu(x: Float[Tensor, "*shape"], gelu: str) -> Float[Tensor, "*shape"]:
    """GELU by torch's operators."""
    if gelu == "quick":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate=_APPROXIMATE[gelu])


def _slope(x: Tensor, gelu: str) -> Tensor:
    if gelu == "quick":
        precise = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch's own gelu_backward: rounded once
        sigmoid = torch.sigmoid(1.702 * precise)
        return torch.addcmul(sigmoid, 1.702 * precise, sigmoid * (1 - sigmoid)).to(x.dtype)
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=_APPROXIMATE[gelu])


def _apply_add_layer(rows: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factors: Tensor | None, pick: Pick) -> Tensor:
    tile = pick("linear_add_forward", rows, tokens=len(rows), features=rows.shape[1])
    if tile.backend != "torch":
        return _kernels(tile).linear_add_forward(rows, weight, bias, residual, factors, tile)
    y = torch.addmm(bias, rows, weight.t())
    if factors is not None:
        examples = (len(factors), len(y) // max(len(factors), 1))
        stream, branch = (tensor.unflatten(0, examples) for tensor in (residual, y))
        return torch.addcmul(stream, branch, factors[:, None, None]).flatten(0, 1).to(torch.promote_types(y.dtype, residual.dtype))
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def _differentiate_gelu(grads: Tensor, weight: Tensor, slope: Tensor, wants_sums: bool, pick: Pick) -> tuple[Tensor, Tensor | None]:
    """dH and, where wanted, its column sums; `grads` is the gradient of a layer with this `weight` whose input is gelu(H)."""
    tile = pick("dgelu_backward", grads, tokens=len(grads), features=grads.shape[1])
    if tile.backend != "torch":
        return _kernels(tile).dgelu_backward(grads, weight, slope, tile)
    d_pre = (grads @ weight).mul_(slope)
    return d_pre, d_pre.sum(0) if wants_sums else None


def _kernels(tile: Tile) -> Any:
    """The module of the kernels that a row of the tile table names."""
    if tile.backend == "hopper":
        from polyvit_kernels.hopper import linear
    else:
        from polyvit_kernels.triton_kernels import linear
    return linear


def _differentiate_layer(
    output_mask: list[bool], x: Tensor, weight: Tensor, d_out: Tensor, d_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dW, db; empty where `output_mask` is False."""
    d_x = (d_out @ weight).view(x.shape) if output_mask[0] else x.new_empty(0)
    d_weight = d_out.t() @ _flatten(x) if output_mask[1] else x.new_empty(0)
    return d_x, d_weight, d_bias.to(x.dtype) if output_mask[2] and d_bias is not None else x.new_empty(0)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool, pick: Pick) -> tuple[Tensor, Tensor]:
    y, slope = _apply_gelu_layer(_flatten(x), weight, bias, gelu, keep, pick)
    return unsafe_view(y, [*x.shape[:-1], len(weight)]), slope


def _linear_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, slope: Tensor, output_mask: list[bool], pick: Pick
) -> tuple[Tensor, Tensor, Tensor]:
    d_pre = _flatten(grad) * slope
    return _differentiate_layer(output_mask, x, weight, d_pre, d_pre.sum(0) if output_mask[2] else None)


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factors: Tensor | None, pick: Pick) -> Tensor:
    return unsafe_view(_apply_add_layer(_flatten(x), weight, bias, _flatten(residual), factors, pick), residual.shape)


def _linear_add_backward(
    grad: Tensor, x: Tensor, weight: Tensor, factors: Tensor | None, output_mask: list[bool], pick: Pick
) -> tuple[Tensor, Tensor, Tensor]:
    copy, sums = cast_and_sum(grad, len(weight), x.dtype, factors, wants_sums=output_mask[2])
    return _differentiate_layer(output_mask, x, weight, _flatten(copy), sums)


def _mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None,
    factors: Tensor | None,
    gelu: str,
    keep: bool,
    pick: Pick,
) -> tuple[Tensor, Tensor, Tensor]:
    activation, slope = _apply_gelu_layer(_flatten(x), fc1_weight, fc1_bias, gelu, keep, pick)
    if residual is None:
        y = torch.addmm(fc2_bias, activation, fc2_weight.t())
    else:
        y = _apply_add_layer(activation, fc2_weight, fc2_bias, _flatten(residual), factors, pick)
    return unsafe_view(y, [*x.shape[:-1], len(fc2_weight)]), activation if keep else x.new_empty(0), slope


def _mlp_backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    activation: Tensor,
    slope: Tensor,
    fc2_weight: Tensor,
    factors: Tensor | None,
    output_mask: list[bool],
    pick: Pick,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    copy, sums = cast_and_sum(grad, len(fc2_weight), x.dtype, factors, wants_sums=output_mask[4])
    copy = _flatten(copy)
    first = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if any(output_mask[:3]):
        d_pre, d_fc1_bias = _differentiate_gelu(copy, fc2_weight, slope, output_mask[2], pick)
        first = _differentiate_layer(output_mask[:3], x, fc1_weight, d_pre, d_fc1_bias)
    _, d_fc2_weight, d_fc2_bias = _differentiate_layer([False, *output_mask[3:]], activation, fc2_weight, copy, sums)
    return *first, d_fc2_weight, d_fc2_bias


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, gelu: str, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(weight)), _fake_hidden(x, weight, keep)


def _fake_linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factors: Tensor | None) -> Tensor:
    return x.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _fake_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    keep = others[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(*x.shape[:-1], len(fc2_weight), dtype=dtype)
    return y, _fake_hidden(x, fc1_weight, keep), _fake_hidden(x, fc1_weight, keep)


def _fake_hidden(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), len(weight)) if keep else x.new_empty(0)


def _fake_layer_gradients(output_mask: list[bool], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = (
        x.new_empty(shape if needed else 0) for needed, shape in zip(output_mask, (x.shape, weight.shape, weight.shape[:1]), strict=True)
    )
    return d_x, d_weight, d_bias


def _fake_layer_backward(grad: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_layer_gradients(others[-1], x, weight)


def _fake_mlp_backward(
    grad: Tensor, x: Tensor, fc1_weight: Tensor, activation: Tensor, slope: Tensor, fc2_weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    mask = others[-1]
    return *_fake_layer_gradients(mask[:3], x, fc1_weight), *_fake_layer_gradients([False, *mask[3:]], x, fc2_weight)[1:]


_linear_gelu_backward_op = register("linear_gelu_backward", _linear_gelu_backward, _fake_layer_backward)
_linear_add_backward_op = register("linear_add_backward", _linear_add_backward, _fake_layer_backward)
_mlp_backward_op = register("mlp_backward", _mlp_backward, _fake_mlp_backward)


def _only(mask: list[bool], gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if needed else None for needed, gradient in zip(mask, gradients, strict=True)]


def _save_linear_gelu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_linear_gelu(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    mask = list(ctx.needs_input_grad[:3])
    return *_only(mask, _linear_gelu_backward_op(grad, *ctx.saved_tensors, mask)), None, None


def _save_linear_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, residual, factors = inputs
    ctx.save_for_backward(x, weight, factors)
    ctx.residual_dtype = residual.dtype


def _differentiate_linear_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:3])
    gradients = _only(mask, _linear_add_backward_op(grad, *ctx.saved_tensors, mask)) if any(mask) else [None] * 3
    return *gradients, grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None, None


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, fc1_weight, _, fc2_weight, _, residual, factors, *_ = inputs
    ctx.save_for_backward(x, fc1_weight, *output[1:], fc2_weight, factors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _differentiate_mlp(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    mask = list(ctx.needs_input_grad[:5])
    # With a residual alone to differentiate by, neither activation nor slope was kept.
    gradients = _only(mask, _mlp_backward_op(grad, *ctx.saved_tensors, mask)) if any(mask) else [None] * 5
    return *gradients, grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None, None, None, None


_linear_gelu_op = register("linear_gelu", _linear_gelu, _fake_linear_gelu, save=_save_linear_gelu, differentiate=_differentiate_linear_gelu)
_linear_add_op = register("linear_add", _linear_add, _fake_linear_add, save=_save_linear_add, differentiate=_differentiate_linear_add)
_mlp_op = register("mlp", _mlp, _fake_mlp, save=_save_mlp, differentiate=_differentiate_mlp)
