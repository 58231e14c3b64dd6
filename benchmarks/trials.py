"""How a row of the tile table is tried: its tensors, its kernel, what torch does instead, and the truth, for each operation."""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import compare
import torch
from card import DEVICE
from torch import Tensor

from polyvit_kernels import reference
from polyvit_kernels.ops.attention import _library_attention
from polyvit_kernels.ops.layer_norm import _add_layer_norm_by_torch, _layer_norm_backward_by_torch
from polyvit_kernels.ops.mlp import _activated, _added, _undone
from polyvit_kernels.ops.patch_embed import _patch_embed_backward_by_torch, _patch_embed_by_torch
from polyvit_kernels.ops.update import _adamw_by_torch, _sgd_by_torch
from polyvit_kernels.tiles import PACKAGES, Tile

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]

GELU = "erf"
EPS = 1e-6
MOMENTUM, BETAS, ADAM_EPS, WEIGHT_DECAY = 0.9, (0.9, 0.999), 1e-8, 0.05


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`inputs` makes tensors of a size and dtype; the others give results by name.

    `ours` runs a row; `plain` is what the torch backend does, and the yardstick; `true` is computed in fp64.
    """

    inputs: Callable[[tuple[int, ...], torch.dtype], Inputs]
    ours: Callable[[Inputs, Tile], Results]
    plain: Callable[[Inputs], Results]
    true: Callable[[Inputs], Results]

    def run(self, inputs: Inputs, tile: Tile) -> Results:
        """One call of a row."""
        return self.plain(inputs) if tile.backend == "torch" else self.ours(inputs, tile)

    def expected(self, inputs: Inputs) -> tuple[Results, Results]:
        """(torch's results, the truth)."""
        exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        return self.plain(_copied(inputs)), self.true(exact)

    def judge(self, inputs: Inputs, tile: Tile, expected: tuple[Results, Results], dtype: torch.dtype) -> None:
        """AssertionError when the results of a row are further from the truth than twice torch's."""
        compare.assert_within_rule(self.run(_copied(inputs), tile), *expected, dtype)


@contextmanager
def nan_in_new_memory():
    """What a kernel forgets to write is not what the one before wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _copied(inputs: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _random(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return {name: torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for name, shape in shapes.items()}


# Attention


def _attention_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, tokens, heads, head_dim = size
    return _random(dtype, qkv=(batch, tokens, 3, heads, head_dim))


def _attention_inputs_with_gradient(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """As the forward leaves them: log-sums to the base 2, in fp32."""
    batch, tokens, heads, head_dim = size
    inputs = _attention_inputs(size, dtype) | _random(dtype, grad=(batch, tokens, heads, head_dim))
    outs, sums = [], []
    for example in inputs["qkv"].split(1):
        q, k, _ = example.float().permute(2, 0, 3, 1, 4)
        sums.append((q @ k.transpose(-1, -2) / math.sqrt(head_dim)).logsumexp(-1) / math.log(2))
        outs.append(reference.attention(example.float()).to(dtype))
    return inputs | {"out": torch.cat(outs), "lse": torch.cat(sums)}


def _attention_kernels(tile: Tile) -> ModuleType:
    return import_module(f"{PACKAGES[tile.backend]}.{tile.op.rpartition('_')[0]}")


def _attention_forward(inputs: Inputs, tile: Tile) -> Results:
    return {"out": _attention_kernels(tile).forward(inputs["qkv"], tile)[0]}


def _attention_backward(inputs: Inputs, tile: Tile) -> Results:
    return {"d_qkv": _attention_kernels(tile).backward(*(inputs[name] for name in ("grad", "qkv", "out", "lse")), tile)[0]}


def _torch_attention(inputs: Inputs) -> Results:
    return {"out": _plain_attention(inputs["qkv"])}


def _torch_attention_backward(inputs: Inputs) -> Results:
    return _both_ways(_plain_attention, inputs["qkv"], inputs["grad"], ("d_qkv",))


def _plain_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(qkv.shape[-1]), -1) @ v).transpose(1, 2)


def _whole_attention(inputs: Inputs, tile: Tile) -> Results:
    """Forward and backward by a backend, as the public operation would call it."""

    def operation(qkv: Tensor) -> Tensor:
        if tile.backend == "triton":
            return torch.ops.polyvit.attention(qkv)[0]
        return _library_attention(qkv, tile.backend)

    return _both_ways(operation, inputs["qkv"], inputs["grad"], ("out", "d_qkv"))


def _both_ways(operation: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor, wanted: tuple[str, ...]) -> Results:
    leaf = qkv.detach().requires_grad_()
    out = operation(leaf)
    results = {"out": out.detach(), "d_qkv": torch.autograd.grad(out, leaf, grad)[0]}
    return {name: results[name] for name in wanted}


def _whole_attention_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, tokens, heads, head_dim = size
    return _attention_inputs(size, dtype) | _random(dtype, grad=(batch, tokens, heads, head_dim))


# Linear layers


def _linear_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, depth, columns = size
    inputs = _random(dtype, x=(rows, depth), weight=(columns, depth), bias=(columns,), residual=(rows, columns))
    return inputs | {"weight": inputs["weight"] / math.sqrt(depth)}


def _linear_gelu(inputs: Inputs, tile: Tile) -> Results:
    found = _activated(inputs["x"], inputs["weight"], inputs["bias"], GELU, True, lambda *_, **__: tile)
    return dict(zip(("y", "slope"), found, strict=True))


def _true_linear_gelu(inputs: Inputs) -> Results:
    pre = reference.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return {"y": reference.gelu(pre, GELU), "slope": reference.gelu_backward(pre, GELU, torch.ones_like(pre))}


def _linear_add(inputs: Inputs, tile: Tile) -> Results:
    names = ("x", "weight", "bias", "residual")
    return {"y": _added(*(inputs[name] for name in names), None, lambda *_, **__: tile)}


def _true_linear_add(inputs: Inputs) -> Results:
    return {"y": reference.linear_add(*(inputs[name] for name in ("x", "weight", "bias", "residual")))}


def _dgelu_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, depth, columns = size
    inputs = _random(dtype, grad=(rows, depth), weight=(depth, columns), slope=(rows, columns))
    return inputs | {"weight": inputs["weight"] / math.sqrt(depth)}


def _dgelu(inputs: Inputs, tile: Tile) -> Results:
    found = _undone(inputs["grad"], inputs["weight"], inputs["slope"], lambda *_, **__: tile)
    return dict(zip(("d_pre", "sums"), found, strict=True))


def _true_dgelu(inputs: Inputs) -> Results:
    d_pre = (inputs["grad"] @ inputs["weight"]) * inputs["slope"]
    return {"d_pre": d_pre, "sums": d_pre.sum(0)}


def _plain_of(run: Callable[[Inputs, Tile], Results]) -> Callable[[Inputs], Results]:
    return lambda inputs: run(inputs, Tile(op="", archs=(), backend="torch"))


# LayerNorm after an addition


def _norm_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, dim = size
    return _random(dtype, x=(rows, dim), residual=(rows, dim), weight=(dim,), bias=(dim,))


def _norm_forward(inputs: Inputs, tile: Tile) -> Results:
    from polyvit_kernels.triton_kernels import layer_norm as norm

    tensors = (inputs[name] for name in ("x", "residual", "weight", "bias"))
    total, out, _, _ = norm.forward(*tensors, EPS, inputs["x"].dtype, tile)
    assert total is not None
    return {"total": total, "out": out}


def _torch_norm_forward(inputs: Inputs) -> Results:
    tensors = (inputs[name] for name in ("x", "residual", "weight", "bias"))
    total, out, _, _ = _add_layer_norm_by_torch(*tensors, EPS, inputs["x"].dtype)
    return {"total": total, "out": out}


def _true_norm_forward(inputs: Inputs) -> Results:
    total = inputs["x"] + inputs["residual"]
    return {"total": total, "out": reference.layer_norm(total, inputs["weight"], inputs["bias"], EPS)}


def _norm_backward_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, dim = size
    inputs = _random(dtype, grad=(rows, dim), grad_sum=(rows, dim), x=(rows, dim), weight=(dim,))
    _, mean, rstd = torch.native_layer_norm(inputs["x"].float(), (dim,), None, None, EPS)
    return inputs | {"mean": mean[:, 0].contiguous(), "rstd": rstd[:, 0].contiguous()}


def _norm_backward(inputs: Inputs, tile: Tile) -> Results:
    from polyvit_kernels.triton_kernels import layer_norm as norm

    found = norm.backward(*(inputs[name] for name in ("grad", "grad_sum", "x", "weight", "mean", "rstd")), tile, inputs["x"].dtype)
    return _named_gradients(*found)


def _torch_norm_backward(inputs: Inputs) -> Results:
    tensors = (inputs[name] for name in ("grad", "x", "weight", "mean", "rstd", "grad_sum"))
    return _named_gradients(*_layer_norm_backward_by_torch(*tensors, inputs["x"].dtype, None))


def _named_gradients(d_x: Tensor, _: Tensor | None, sums: Tensor | None, d_weight: Tensor, d_bias: Tensor) -> Results:
    assert sums is not None
    return {"d_x": d_x, "sums": sums, "d_weight": d_weight, "d_bias": d_bias}


def _true_norm_backward(inputs: Inputs) -> Results:
    d_x, d_weight, d_bias = reference.layer_norm_backward(inputs["x"], inputs["weight"], inputs["grad"], EPS)
    d_x = d_x + inputs["grad_sum"]
    return {"d_x": d_x, "sums": d_x.sum(0), "d_weight": d_weight, "d_bias": d_bias}


# Updates


def _update_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    inputs = _random(dtype, param=size, grad=size, first=size, second=size)
    numbers = {name: torch.tensor(value, device=DEVICE) for name, value in (("count", 11.0), ("lr", 1e-3), ("scale", 0.7))}
    copy = torch.zeros(size, device=DEVICE, dtype=torch.bfloat16)
    return inputs | {"second": inputs["second"].square(), "copy": copy} | numbers | {"ok": torch.tensor(True, device=DEVICE)}


def _sgd_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Of the launcher, and of torch's way."""
    numbers = (inputs[name] for name in ("lr", "scale", "ok"))
    return inputs["param"], inputs["grad"], inputs["first"], None, inputs["copy"], *numbers, MOMENTUM, WEIGHT_DECAY, 0.0


def _sgd(inputs: Inputs, tile: Tile) -> Results:
    from polyvit_kernels.triton_kernels import update

    update.sgd(*_sgd_arguments(inputs), tile=tile)
    return {name: inputs[name] for name in ("param", "first")}


def _torch_sgd(inputs: Inputs) -> Results:
    _sgd_by_torch(*_sgd_arguments(inputs))
    return {name: inputs[name] for name in ("param", "first")}


def _true_sgd(inputs: Inputs) -> Results:
    rates = {"lr": inputs["lr"].item(), "scale": inputs["scale"].item(), "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    return dict(zip(("param", "first"), reference.sgd(inputs["param"], inputs["grad"], inputs["first"], **rates), strict=True))


def _adamw_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Of the launcher, and of torch's way."""
    buffers = (inputs[name] for name in ("param", "grad", "first", "second"))
    numbers = (inputs[name] for name in ("count", "lr", "scale", "ok"))
    return *buffers, None, inputs["copy"], *numbers, *BETAS, ADAM_EPS, WEIGHT_DECAY, 0.0


def _adamw(inputs: Inputs, tile: Tile) -> Results:
    from polyvit_kernels.triton_kernels import update

    update.adamw(*_adamw_arguments(inputs), tile=tile)
    return {name: inputs[name] for name in ("param", "first", "second")}


def _torch_adamw(inputs: Inputs) -> Results:
    _adamw_by_torch(*_adamw_arguments(inputs))
    return {name: inputs[name] for name in ("param", "first", "second")}


def _true_adamw(inputs: Inputs) -> Results:
    buffers = (inputs[name] for name in ("param", "grad", "first", "second"))
    numbers = {"lr": inputs["lr"].item(), "scale": inputs["scale"].item()}
    found = reference.adamw(*buffers, int(inputs["count"]), **numbers, betas=BETAS, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)
    return dict(zip(("param", "first", "second"), found, strict=True))


# Patch embedding


def _patch_inputs(size: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, frames, side, tubelet_frames, dim = size
    tokens = frames // tubelet_frames * (side // 16) ** 2 + 1
    weight = (dim, tubelet_frames, 16, 16, 3)
    inputs = _random(dtype, weight=weight, bias=(dim,), cls_token=(1, 1, dim), pos_embed=(1, tokens, dim), grad=(batch, tokens, dim))
    inputs["weight"] /= math.sqrt(inputs["weight"][0].numel())
    grid = torch.randint(256, (batch, frames, side, side, 3), device=DEVICE, dtype=torch.uint8)
    return {"grid": grid} | inputs | {"mean": torch.full((3,), 120.0, device=DEVICE), "std": torch.full((3,), 57.0, device=DEVICE)}


_PATCH_NAMES = ("grid", "weight", "bias", "cls_token", "pos_embed", "mean", "std")


def _patch_forward(inputs: Inputs, tile: Tile) -> Results:
    from polyvit_kernels.triton_kernels import patch_embed as patches

    return {"tokens": patches.forward(*(inputs[name] for name in _PATCH_NAMES), inputs["weight"].dtype, tile)}


def _patch_backward(inputs: Inputs, tile: Tile) -> Results:
    """The weight's gradient, as the operation makes it."""
    from polyvit_kernels.triton_kernels import patch_embed as patches

    grad, weight = inputs["grad"], inputs["weight"]
    tubelets = patches.tubelets(inputs["grid"], weight, inputs["mean"], inputs["std"], grad.shape[1], tile)
    return {"d_weight": (grad.reshape(-1, len(weight)).T @ tubelets).view(weight.shape)}


def _torch_patch_backward(inputs: Inputs) -> Results:
    tensors = (inputs[name] for name in ("grad", "grid", "weight", "mean", "std"))
    return {"d_weight": _patch_embed_backward_by_torch(*tensors)[0]}


def _true_patch_backward(inputs: Inputs) -> Results:
    return {"d_weight": reference.patch_embed_backward(*(inputs[name] for name in ("grid", "weight", "mean", "std", "grad")))[1]}


TRIALS: Mapping[str, Trial] = {
    "attention": Trial(
        inputs=_whole_attention_inputs,
        ours=_whole_attention,
        plain=lambda inputs: _both_ways(_plain_attention, inputs["qkv"], inputs["grad"], ("out", "d_qkv")),
        true=lambda inputs: _both_ways(reference.attention, inputs["qkv"], inputs["grad"], ("out", "d_qkv")),
    ),
    **{
        f"{op}_forward": Trial(
            inputs=_attention_inputs,
            ours=_attention_forward,
            plain=_torch_attention,
            true=lambda inputs: {"out": reference.attention(inputs["qkv"])},
        )
        for op in ("attention_short", "attention_long")
    },
    **{
        f"{op}_backward": Trial(
            inputs=_attention_inputs_with_gradient,
            ours=_attention_backward,
            plain=_torch_attention_backward,
            true=lambda inputs: {"d_qkv": reference.attention_backward(inputs["qkv"], inputs["grad"])},
        )
        for op in ("attention_short", "attention_long")
    },
    "linear_gelu_forward": Trial(inputs=_linear_inputs, ours=_linear_gelu, plain=_plain_of(_linear_gelu), true=_true_linear_gelu),
    "linear_add_forward": Trial(inputs=_linear_inputs, ours=_linear_add, plain=_plain_of(_linear_add), true=_true_linear_add),
    "dgelu_backward": Trial(inputs=_dgelu_inputs, ours=_dgelu, plain=_plain_of(_dgelu), true=_true_dgelu),
    "layer_norm_forward": Trial(inputs=_norm_inputs, ours=_norm_forward, plain=_torch_norm_forward, true=_true_norm_forward),
    "layer_norm_backward": Trial(inputs=_norm_backward_inputs, ours=_norm_backward, plain=_torch_norm_backward, true=_true_norm_backward),
    "sgd_update": Trial(inputs=_update_inputs, ours=_sgd, plain=_torch_sgd, true=_true_sgd),
    "adamw_update": Trial(inputs=_update_inputs, ours=_adamw, plain=_torch_adamw, true=_true_adamw),
    "patch_embed_forward": Trial(
        inputs=_patch_inputs,
        ours=_patch_forward,
        plain=lambda inputs: {"tokens": _patch_embed_by_torch(*(inputs[name] for name in _PATCH_NAMES), inputs["weight"].dtype)},
        true=lambda inputs: {"tokens": reference.patch_embed(*(inputs[name] for name in _PATCH_NAMES))},
    ),
    "patch_embed_backward": Trial(inputs=_patch_inputs, ours=_patch_backward, plain=_torch_patch_backward, true=_true_patch_backward),
}
