"""How each operation of the tile table is called with a row that need not be in it: the tensors, our kernel, and what it must give."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from bench_attention import eager_attention
from bench_layer_norm import EPS, eager_add_norm, eager_norm, true_add_norm
from bench_linear import eager_add
from bench_patch_embed import eager_patch_embed
from bench_update import BETAS, MOMENTUM, WEIGHT_DECAY, eager_adamw, eager_sgd, make_state, true_adamw, true_sgd
from bench_update import EPS as ADAM_EPS
from harness import Inputs
from machine import DEVICE, HAS_GPU
from torch import Tensor
from torch.nn import functional

import polyvit_kernels
from polyvit_kernels import reference, tiles
from polyvit_kernels.tiles import Tile

INTERPRETED_ARCH = 90
Results = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How an operation of the tile table is called: its tensors for a size and dtype, our kernel, and what it must give.

    `plain` is PyTorch's way in the tensors' dtype, `true` the formulas, which get fp64.
    """

    inputs: Callable[[tuple[int, ...], torch.dtype], Inputs]
    launch: Callable[[Inputs, Tile], Results]
    plain: Callable[[Inputs], Results]
    true: Callable[[Inputs], Results]


def find_row(op: str, tokens: int, features: int) -> Tile:
    """What the table gives for an operation in bf16 (updates: fp32) here; without a GPU, of the portable rows for `INTERPRETED_ARCH`."""
    arch = tiles.architecture(DEVICE) if HAS_GPU else INTERPRETED_ARCH
    dtype = torch.float32 if op.endswith("_update") else torch.bfloat16
    return tiles.pick(op, arch, dtype, tokens=tokens, features=features, portable=not HAS_GPU)


def draw(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    """Normal numbers, the same each time."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return {name: torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for name, shape in shapes.items()}


def find_module(tile: Tile, name: str) -> Any:
    """The module with a row's kernels."""
    return import_module(f"{tiles.PACKAGES[tile.backend]}.{name}")


def differentiate(form: Callable[..., Tensor], grad: Tensor, inputs: Inputs, *names: str) -> Results:
    """The gradients of a form by the tensors of these names."""
    leaves = inputs | {name: inputs[name].detach().requires_grad_() for name in names}
    return torch.autograd.grad(form(**leaves), [leaves[name] for name in names], grad)


# Attention, as forward and backward kernels and as the choice between ours and libraries


def attention_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, tokens, heads, head_dim = size
    return draw(dtype, qkv=(batch, tokens, 3, heads, head_dim), grad=(batch, tokens, heads, head_dim))


def attention_inputs_after_forward(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    inputs = attention_inputs(size, dtype)
    out, lse = forward_attention(inputs["qkv"], find_attention_row("forward", size[1], size[3]))
    return inputs | {"out": out, "lse": lse}


def find_attention_row(direction: str, tokens: int, features: int) -> Tile:
    """The row in use; where a short attention has none, the long kernel does it."""
    short, long = (find_row(f"attention_{length}_{direction}", tokens, features) for length in ("short", "long"))
    return short if short.backend in tiles.PACKAGES else long


def forward_attention(qkv: Tensor, tile: Tile) -> Results:
    return find_module(tile, tile.op.removesuffix("_forward")).forward(qkv, tile)


def backward_attention(inputs: Inputs, tile: Tile) -> Results:
    tensors = (inputs[name] for name in ("grad", "qkv", "out", "lse"))
    return find_module(tile, tile.op.removesuffix("_backward")).backward(*tensors, tile)[:1]


def attend_both_ways(inputs: Inputs, tile: Tile) -> Results:
    """Forward and backward by a backend; ours with the rows in use."""
    qkv, grad = inputs["qkv"], inputs["grad"]
    if tile.backend != "triton":
        return differentiate(lambda qkv, **_: polyvit_kernels.attention(qkv, backend=tile.backend), grad, inputs, "qkv")
    forward, backward = (find_attention_row(direction, qkv.shape[1], qkv.shape[4]) for direction in ("forward", "backward"))
    out, lse = forward_attention(qkv, forward)
    return backward_attention({"grad": grad, "qkv": qkv, "out": out, "lse": lse}, backward)


def attention_gradient(form: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Results]:
    return lambda inputs: differentiate(lambda qkv, **_: form(qkv), inputs["grad"], inputs, "qkv")


ATTENTION_FORWARD = Kernel(
    inputs=attention_inputs,
    launch=lambda inputs, tile: forward_attention(inputs["qkv"], tile)[:1],
    plain=lambda inputs: (eager_attention(inputs["qkv"]),),
    true=lambda inputs: (reference.attention(inputs["qkv"]),),
)
ATTENTION_BACKWARD = Kernel(
    inputs=attention_inputs_after_forward,
    launch=backward_attention,
    plain=attention_gradient(eager_attention),
    true=attention_gradient(reference.attention),
)
ATTENTION = replace(ATTENTION_BACKWARD, inputs=attention_inputs, launch=attend_both_ways)


# Linear layers


def linear_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, depth, columns = size
    inputs = draw(dtype, x=(rows, depth), weight=(columns, depth), bias=(columns,), residual=(rows, columns))
    return inputs | {"weight": inputs["weight"] / math.sqrt(depth)}


def dgelu_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, depth, columns = size
    inputs = draw(dtype, grad=(rows, depth), weight=(depth, columns), slope=(rows, columns))
    return inputs | {"weight": inputs["weight"] / math.sqrt(depth)}


def gelu_and_slope(inputs: Inputs) -> Results:
    pre = functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return functional.gelu(pre), differentiate(functional.gelu, torch.ones_like(pre), {"input": pre}, "input")[0]


def true_gelu_and_slope(inputs: Inputs) -> Results:
    pre = reference.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return reference.gelu(pre, "erf"), reference.gelu_backward(pre, "erf", torch.ones_like(pre))


def dgelu(inputs: Inputs) -> Results:
    d_pre = (inputs["grad"] @ inputs["weight"]) * inputs["slope"]
    return d_pre, d_pre.sum(0)


def add(form: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
    return lambda inputs: (form(**inputs),)


def linear_kernel(op: str, *names: str, **forms: Any) -> Kernel:
    """`names` are the launcher's tensors; GELU is exact, and its slope is kept."""
    more = {"linear_gelu_forward": ("erf", True), "linear_add_forward": (None,), "dgelu_backward": ()}[op]

    def launch(inputs: Inputs, tile: Tile) -> Results:
        found = getattr(find_module(tile, "linear"), op)(*(inputs[name] for name in names), *more, tile)
        return found if isinstance(found, tuple) else (found,)

    return Kernel(launch=launch, **forms)


# LayerNorm after an addition


def norm_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, dim = size
    inputs = draw(dtype, x=(rows, dim), residual=(rows, dim), weight=(dim,), bias=(dim,), grad=(rows, dim), grad_sum=(rows, dim))
    x = inputs["x"].float()
    return inputs | {"mean": x.mean(1), "rstd": (x.var(1, unbiased=False) + EPS).rsqrt()}


def forward_norm(inputs: Inputs, tile: Tile) -> Results:
    tensors = (inputs[name] for name in ("x", "residual", "weight", "bias"))
    return find_module(tile, "layer_norm").forward(*tensors, EPS, inputs["x"].dtype, tile)[:2]


def backward_norm(inputs: Inputs, tile: Tile) -> Results:
    tensors = (inputs[name] for name in ("grad", "grad_sum", "x", "weight", "mean", "rstd"))
    d_x, _, sums, d_weight, d_bias = find_module(tile, "layer_norm").backward(*tensors, tile, inputs["x"].dtype)
    return d_x, sums, d_weight, d_bias


def add_norm(form: Callable[..., Results]) -> Callable[[Inputs], Results]:
    return lambda inputs: form(*(inputs[name] for name in ("x", "weight", "bias", "residual")))


def norm_gradients(form: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
    def run(inputs: Inputs) -> Results:
        tensors = {name: inputs[name] for name in ("x", "weight", "bias")}
        d_x, d_weight, d_bias = differentiate(form, inputs["grad"], tensors, *tensors)
        d_x = d_x + inputs["grad_sum"]
        return d_x, d_x.sum(0), d_weight, d_bias

    return run


# Updates


def launch_sgd(inputs: Inputs, tile: Tile) -> Results:
    buffers, numbers = (inputs[name] for name in ("param", "grad", "momentum_buffer")), (inputs[name] for name in ("lr", "scale", "ok"))
    find_module(tile, "update").sgd(*buffers, None, inputs["copy"], *numbers, MOMENTUM, WEIGHT_DECAY, 0.0, tile=tile)
    return inputs["param"], inputs["momentum_buffer"]


def launch_adamw(inputs: Inputs, tile: Tile) -> Results:
    buffers = (inputs[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
    numbers = (inputs[name] for name in ("count", "lr", "scale", "ok"))
    find_module(tile, "update").adamw(*buffers, None, inputs["copy"], *numbers, *BETAS, ADAM_EPS, WEIGHT_DECAY, 0.0, tile=tile)
    return inputs["param"], inputs["exp_avg"], inputs["exp_avg_sq"]


def update(
    launch: Callable[[Inputs, Tile], Results], eager: Callable[..., None], true: Callable[[Inputs], Inputs], *averages: str
) -> Kernel:
    def plain(inputs: Inputs) -> Results:
        eager(**inputs)
        return tuple(inputs[name] for name in ("param", *averages))

    inputs = lambda size, dtype: make_state(*size, averages)  # noqa: E731
    return Kernel(inputs=inputs, launch=launch, plain=plain, true=lambda inputs: tuple(true(inputs).values()))


# Patch embedding

_PATCHES = ("grid", "weight", "bias", "cls_token", "pos_embed", "mean", "std")


def patch_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, frames, side, tubelet_frames, dim = size
    tokens, weight = frames // tubelet_frames * (side // 16) ** 2 + 1, (dim, tubelet_frames, 16, 16, 3)
    inputs = draw(dtype, weight=weight, bias=(dim,), cls_token=(1, 1, dim), pos_embed=(1, tokens, dim), grad=(batch, tokens, dim))
    inputs["weight"] /= math.sqrt(inputs["weight"][0].numel())
    grid = torch.randint(256, (batch, frames, side, side, 3), device=DEVICE, dtype=torch.uint8)
    return {"grid": grid} | inputs | {"mean": torch.full((3,), 120.0, device=DEVICE), "std": torch.full((3,), 57.0, device=DEVICE)}


def forward_patches(inputs: Inputs, tile: Tile) -> Results:
    tensors = (inputs[name] for name in _PATCHES)
    return (find_module(tile, "patch_embed").forward(*tensors, inputs["weight"].dtype, tile),)


def backward_patches(inputs: Inputs, tile: Tile) -> Results:
    """The weight's gradient, as the operation makes it."""
    grad, weight = inputs["grad"], inputs["weight"]
    tensors = (inputs[name] for name in ("grid", "weight", "mean", "std"))
    rows = find_module(tile, "patch_embed").tubelets(*tensors, grad.shape[1], tile)
    return ((grad.reshape(-1, len(weight)).T @ rows).view(weight.shape),)


def embed(form: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
    return lambda inputs: (form(**{name: inputs[name] for name in _PATCHES}),)


def patch_gradient(form: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
    return lambda inputs: differentiate(form, inputs["grad"], {name: inputs[name] for name in _PATCHES}, "weight")


KERNELS: Mapping[str, Kernel] = {
    "attention": ATTENTION,
    **dict.fromkeys(("attention_short_forward", "attention_long_forward"), ATTENTION_FORWARD),
    **dict.fromkeys(("attention_short_backward", "attention_long_backward"), ATTENTION_BACKWARD),
    "linear_gelu_forward": linear_kernel(
        "linear_gelu_forward", "x", "weight", "bias", inputs=linear_inputs, plain=gelu_and_slope, true=true_gelu_and_slope
    ),
    "linear_add_forward": linear_kernel(
        *("linear_add_forward", "x", "weight", "bias", "residual"),
        inputs=linear_inputs,
        plain=add(eager_add),
        true=add(reference.linear_add),
    ),
    "dgelu_backward": linear_kernel("dgelu_backward", "grad", "weight", "slope", inputs=dgelu_inputs, plain=dgelu, true=dgelu),
    "layer_norm_forward": Kernel(inputs=norm_inputs, launch=forward_norm, plain=add_norm(eager_add_norm), true=add_norm(true_add_norm)),
    "layer_norm_backward": Kernel(
        inputs=norm_inputs, launch=backward_norm, plain=norm_gradients(eager_norm), true=norm_gradients(reference.layer_norm)
    ),
    "adamw_update": update(launch_adamw, eager_adamw, true_adamw, "exp_avg", "exp_avg_sq"),
    "sgd_update": update(launch_sgd, eager_sgd, true_sgd, "momentum_buffer"),
    "patch_embed_forward": Kernel(
        inputs=patch_inputs, launch=forward_patches, plain=embed(eager_patch_embed), true=embed(reference.patch_embed)
    ),
    "patch_embed_backward": Kernel(
        inputs=patch_inputs, launch=backward_patches, plain=patch_gradient(eager_patch_embed), true=patch_gradient(reference.patch_embed)
    ),
}
