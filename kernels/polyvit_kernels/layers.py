"""Layers by the operations: the parameters of a plain layer are read, any other layer is called.

A layer that somebody has hooked, replaced, parametrised, quantised or sharded does more than its formula, so it has to run itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from polyvit_kernels import ops
from polyvit_kernels.ops.dtypes import check_factors
from polyvit_kernels.ops.gradients import expand_factors, find_factors

PLAIN = (nn.Parameter, Tensor)
"""The types of tensors that are neither quantised nor sharded."""

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)  # the second is what torch's MultiheadAttention projects with


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs hooks, its own or those registered for all modules."""
    # Private attributes: up to torch 2.13 there is no public way to ask whether a module, or all of them, have hooks.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's `forward` and nothing else."""
    return "forward" not in module.__dict__ and not has_hooks(module)


def is_plain(linear: Any) -> bool:
    """Whether a call of `linear` is x Wᵀ + b and nothing else, so that an operation may read its parameters instead.

    False for an adapter around a layer, for hooks, for parametrised, quantised or sharded weights, and without a bias.
    """
    return type(linear) in _LINEAR and is_untouched(linear) and type(linear.weight) in PLAIN and type(linear.bias) in PLAIN


def project(linear: Any, x: Float[Tensor, "*batch dim"], shape: tuple[int, ...] = (-1,)) -> Float[Tensor, "*batch_and_shape"]:
    """linear(x), its features in the given `shape`."""
    return ops.linear(x, linear.weight, linear.bias, shape) if is_plain(linear) else linear(x).unflatten(-1, shape)


def add_linear(
    linear: Any,
    x: Float[Tensor, "*batch dim"],
    residual: Float[Tensor, "*batch out"] | None = None,
    factors: Float[Tensor, " examples"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch out"]:
    """`residual` plus linear(x) after `dropout`, each example of which is multiplied by its one of `factors`; linear(x) without a residual.

    Raises ValueError for factors without a residual.
    """
    if residual is not None and is_plain(linear) and not dropout:
        return ops.linear_add(x, linear.weight, linear.bias, residual, factors)
    branch = functional.dropout(project(linear, x), dropout)
    if residual is not None:
        return add_branch(residual, branch, factors)
    if factors is not None:
        raise ValueError("factors multiply what is added to a residual, but there is none")
    return branch


def add_branch(
    residual: Float[Tensor, "*batch dim"], branch: Float[Tensor, "*batch dim"], factors: Float[Tensor, " examples"] | None
) -> Float[Tensor, "*batch dim"]:
    """`residual` plus the branch, each example of which is multiplied by its one of `factors`; in the wider of both dtypes."""
    if factors is None:
        return residual + branch
    check_factors(factors, residual)
    return torch.addcmul(residual, branch, expand_factors(factors, branch)).to(torch.promote_types(residual.dtype, branch.dtype))


def norm_residual(
    norm: Any, x: Float[Tensor, "batch tokens dim"], out_dtype: torch.dtype
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens dim"]]:
    """(x, norm(x) in `out_dtype`): what goes past the norm, and what goes into the branch.

    `norm` is a layer norm, or anything that has its `weight`, `bias` and `eps`. The backward adds both gradients in one pass, and
    multiplies by the factors of the branch that `x` ends with, unless a call of the norm would do more than normalise.
    """
    if _has_to_run(norm):
        return x, norm(x, out_dtype)
    return ops.layer_norm_residual(x, norm.weight, norm.bias, norm.eps, out_dtype, find_factors(x))


def _has_to_run(norm: Any) -> bool:
    return isinstance(norm, nn.Module) and not is_untouched(norm)
