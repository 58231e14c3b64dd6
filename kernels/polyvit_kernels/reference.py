"""What every operation of `ops/` computes, forward and backward, in plain formulas: the specification, not the fast path.

A name with `_backward` takes the forward's inputs and `grad`, the gradient of a scalar L by the output, and gives the gradients of L by
the inputs. dX stands for ∂L/∂X, · for the elementwise product.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

Gelu = Literal["tanh", "erf", "quick"]
QKV = Float[Tensor, "batch tokens 3 heads head_dim"]
Grid = UInt8[Tensor, "batch frames rows columns channels"] | Float[Tensor, "batch frames rows columns channels"]
Tubelets = Float[Tensor, "dim tubelet_frames tubelet_rows tubelet_columns channels"]


def attention(qkv: QKV) -> Float[Tensor, "batch tokens heads head_dim"]:
    """O = P V with P = softmax(S) over keys and S = Q Kᵀ / √d, for each example and head."""
    _, _, v, p = _attention_parts(qkv)
    return (p @ v).transpose(1, 2)


def attention_backward(qkv: QKV, grad: Float[Tensor, "batch tokens heads head_dim"]) -> QKV:
    """dV = Pᵀ dO; dP = dO Vᵀ; dS = P · (dP − rowsum(dP · P)); dQ = dS K / √d; dK = dSᵀ Q / √d."""
    q, k, v, p = _attention_parts(qkv)
    d_out = grad.transpose(1, 2)
    d_v = p.transpose(-1, -2) @ d_out
    d_p = d_out @ v.transpose(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return torch.stack([part.transpose(1, 2) for part in (d_s @ k, d_s.transpose(-1, -2) @ q, d_v)], 2)


def _attention_parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, K, V `[batch, heads, tokens, head_dim]` and P `[batch, heads, tokens, tokens]`."""
    q, k, v = rearrange(qkv, "batch tokens three heads head_dim -> three batch heads tokens head_dim")
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return q, k, v, weights / weights.sum(-1, keepdim=True)


def gelu(x: Float[Tensor, "*shape"], kind: Gelu) -> Float[Tensor, "*shape"]:
    """erf: x Φ(x), Φ the normal distribution's CDF; tanh: x/2 (1 + tanh u(x)), u(x) = √(2/π) (x + 0.044715 x³); quick: x σ(1.702 x)."""
    if kind == "erf":
        return x * _normal_cdf(x)
    if kind == "quick":
        return x * torch.sigmoid(1.702 * x)
    return x / 2 * (1 + _tanh_part(x))


def gelu_backward(x: Float[Tensor, "*shape"], kind: Gelu, grad: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """erf: Φ(x) + x φ(x), φ = Φ'; tanh: (1 + t)/2 + x/2 (1 − t²) u'(x), t = tanh u(x), u'(x) = √(2/π) (1 + 0.134145 x²);
    quick: s + 1.702 x s (1 − s), s = σ(1.702 x); times grad.
    """
    if kind == "erf":
        return grad * (_normal_cdf(x) + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi))
    if kind == "quick":
        s = torch.sigmoid(1.702 * x)
        return grad * (s + 1.702 * x * s * (1 - s))
    t = _tanh_part(x)
    return grad * ((1 + t) / 2 + x / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x))


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def _tanh_part(x: Tensor) -> Tensor:
    return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def linear(x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"], bias: Float[Tensor, " out"]) -> Float[Tensor, "*batch out"]:
    """Y = X Wᵀ + b."""
    return x @ weight.T + bias


def linear_backward(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"], grad: Float[Tensor, "*batch out"]
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "out dim"], Float[Tensor, " out"]]:
    """dX = dY W; dW = dYᵀ X and db = Σ dY over all rows."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ weight, grads.T @ rows, grads.sum(0)


def linear_add(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "out dim"],
    bias: Float[Tensor, " out"],
    residual: Float[Tensor, "*batch out"],
    factors: Float[Tensor, " examples"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Y = R + f (X Wᵀ + b), f each example's factor or 1; backward as for the linear layer at f dY, and dR = dY."""
    y = linear(x, weight, bias)
    return residual + (y if factors is None else y * factors.view(len(y), *[1] * (y.ndim - 1)))


def linear_gelu(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "hidden dim"], bias: Float[Tensor, " hidden"], kind: Gelu
) -> Float[Tensor, "*batch hidden"]:
    """A = gelu(X Wᵀ + b)."""
    return gelu(linear(x, weight, bias), kind)


def linear_gelu_backward(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "hidden dim"],
    bias: Float[Tensor, " hidden"],
    kind: Gelu,
    grad: Float[Tensor, "*batch hidden"],
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "hidden dim"], Float[Tensor, " hidden"]]:
    """dX, dW, db: the linear layer's backward at dH = dA · gelu'(H), H = X Wᵀ + b."""
    return linear_backward(x, weight, gelu_backward(linear(x, weight, bias), kind, grad))


def mlp(
    x: Float[Tensor, "*batch dim"],
    fc1_weight: Float[Tensor, "hidden dim"],
    fc1_bias: Float[Tensor, " hidden"],
    fc2_weight: Float[Tensor, "dim hidden"],
    fc2_bias: Float[Tensor, " dim"],
    kind: Gelu,
    residual: Float[Tensor, "*batch dim"] | None = None,
    factors: Float[Tensor, " examples"] | None = None,
) -> Float[Tensor, "*batch dim"]:
    """Y = A W₂ᵀ + b₂, or R + f Y if there is an R, with A = gelu(X W₁ᵀ + b₁)."""
    hidden = linear_gelu(x, fc1_weight, fc1_bias, kind)
    return linear(hidden, fc2_weight, fc2_bias) if residual is None else linear_add(hidden, fc2_weight, fc2_bias, residual, factors)


def mlp_backward(
    x: Float[Tensor, "*batch dim"],
    fc1_weight: Float[Tensor, "hidden dim"],
    fc1_bias: Float[Tensor, " hidden"],
    fc2_weight: Float[Tensor, "dim hidden"],
    kind: Gelu,
    grad: Float[Tensor, "*batch dim"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, dW₁, db₁, dW₂, db₂: the second layer's backward gives dA, the first one's takes it."""
    d_hidden, d_fc2_weight, d_fc2_bias = linear_backward(linear_gelu(x, fc1_weight, fc1_bias, kind), fc2_weight, grad)
    return *linear_gelu_backward(x, fc1_weight, fc1_bias, kind, d_hidden), d_fc2_weight, d_fc2_bias


def layer_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], bias: Float[Tensor, " dim"], eps: float = 1e-6
) -> Float[Tensor, "*batch dim"]:
    """Y = N · w + b with N = (X − mean) r, r = 1 / √(variance + eps), the variance divided by dim."""
    normal, _ = _normalised(x, eps)
    return normal * weight + bias


def layer_norm_backward(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], grad: Float[Tensor, "*batch dim"], eps: float = 1e-6
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """With G = dY · w: dX = r (G − mean(G) − N mean(G · N)); dw = Σ dY · N and db = Σ dY over all rows."""
    normal, r = _normalised(x, eps)
    g = grad * weight
    d_x = r * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    return d_x, (grad * normal).reshape(-1, len(weight)).sum(0), grad.reshape(-1, len(weight)).sum(0)


def add_layer_norm(
    x: Float[Tensor, "*batch dim"],
    residual: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    bias: Float[Tensor, " dim"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """S = X + R and Y = layer_norm(S)."""
    return x + residual, layer_norm(x + residual, weight, bias, eps)


def add_layer_norm_backward(
    x: Float[Tensor, "*batch dim"],
    residual: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    grad_sum: Float[Tensor, "*batch dim"],
    grad: Float[Tensor, "*batch dim"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """dX = dR = `grad_sum` (by S) + what layer_norm's backward gives at S from `grad` (by Y); dw and db as there."""
    d_sum, d_weight, d_bias = layer_norm_backward(x + residual, weight, grad, eps)
    return grad_sum + d_sum, d_weight, d_bias


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    r = ((centred**2).mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r, r


def patch_embed(
    grid: Grid,
    weight: Tubelets,
    bias: Float[Tensor, " dim"],
    cls_token: Float[Tensor, "1 1 dim"],
    pos_embed: Float[Tensor, "1 tokens dim"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch tokens dim"]:
    """Z = [c; U Wᵀ + b] + p, U the rows of (grid − mean) / std that lie in one tubelet (arXiv 2010.11929, eq. 1)."""
    embedded = linear(_tubelet_rows(grid, weight, mean, std), weight.flatten(1), bias)
    return torch.cat([cls_token.expand(len(grid), 1, -1), embedded], 1) + pos_embed


def patch_embed_backward(
    grid: Grid, weight: Tubelets, mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"], grad: Float[Tensor, "batch tokens dim"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgrid, dW, db, dc, dp: dp = Σ dZ over examples, dc its first row; the linear layer's backward at the other rows; dgrid = dU / std."""
    rows = _tubelet_rows(grid, weight, mean, std)
    d_rows, d_weight, d_bias = linear_backward(rows, weight.flatten(1), grad[:, 1:])
    _, frames, height, width, _ = weight.shape
    pattern = "batch (F R C) (f r c channels) -> batch (F f) (R r) (C c) channels"
    counts = {"F": grid.shape[1] // frames, "R": grid.shape[2] // height, "f": frames, "r": height, "c": width}
    d_pos = grad.sum(0, keepdim=True)
    return rearrange(d_rows, pattern, **counts) / std, d_weight.view(weight.shape), d_bias, d_pos[:, :1], d_pos


def _tubelet_rows(grid: Tensor, weight: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`[batch, tubelets, elements of a tubelet]` of the normalised grid."""
    _, frames, height, width, _ = weight.shape
    pattern = "batch (F f) (R r) (C c) channels -> batch (F R C) (f r c channels)"
    return rearrange((grid.to(weight.dtype) - mean) / std, pattern, f=frames, r=height, c=width)


def sgd(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, lr: float, scale: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """(θ, m) after one update: g = scale · grad + λ θ; m ← μ m + g; θ ← θ − lr m."""
    momentum_buffer = momentum * momentum_buffer + scale * grad + weight_decay * param
    return param - lr * momentum_buffer, momentum_buffer


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: int,
    *,
    lr: float,
    scale: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(θ, m, v) after update number t = `count` ≥ 1 (arXiv 1711.05101, algorithm 2).

    g = scale · grad; m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; θ ← (1 − lr λ) θ − lr m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps).
    """
    g = scale * grad
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * g
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * g * g
    step = exp_avg / (1 - betas[0] ** count) / ((exp_avg_sq / (1 - betas[1] ** count)).sqrt() + eps)
    return (1 - lr * weight_decay) * param - lr * step, exp_avg, exp_avg_sq
