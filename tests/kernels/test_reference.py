"""The formulas of `reference.py`, forward against torch's own operators and backward against autograd, in fp64."""

import pytest
import torch
from samples import PLAIN_GELU
from torch.nn import functional

from polyvit_kernels import reference


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def assert_backward_is_autograd(forward, inputs, backward):
    """`forward(*inputs)` by torch's operators; `backward(grad)` must give the gradient of every input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = forward(*leaves)
    grad = normal(*output.shape)
    expected = torch.autograd.grad(output, leaves, grad)
    found = backward(grad)
    found = found if isinstance(found, tuple) else (found,)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 16, 65])
def test_attention(tokens):
    def by_torch(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    qkv = normal(2, tokens, 3, 2, 8) * 3
    torch.testing.assert_close(reference.attention(qkv), by_torch(qkv), rtol=1e-12, atol=1e-12)
    assert_backward_is_autograd(by_torch, [qkv], lambda grad: reference.attention_backward(qkv, grad))


def test_attention_with_scores_that_overflow_an_exponential():
    qkv = normal(1, 5, 3, 1, 4) * 1e3
    assert reference.attention(qkv).isfinite().all()
    assert reference.attention_backward(qkv, normal(1, 5, 1, 4)).isfinite().all()


@pytest.mark.parametrize("kind", ["tanh", "erf", "quick"])
def test_gelu_linear_gelu_and_mlp(kind):
    gelu = PLAIN_GELU[kind]

    x, hidden = normal(2, 7, 6) * 2, normal(5, 9) * 4
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = normal(9, 6), normal(9), normal(6, 9), normal(6)
    torch.testing.assert_close(reference.gelu(hidden, kind), gelu(hidden), rtol=1e-12, atol=1e-12)
    assert_backward_is_autograd(gelu, [hidden], lambda grad: reference.gelu_backward(hidden, kind, grad))

    def one(x, weight, bias):
        return gelu(functional.linear(x, weight, bias))

    first = [x, fc1_weight, fc1_bias]
    torch.testing.assert_close(reference.linear_gelu(*first, kind), one(*first))
    assert_backward_is_autograd(one, first, lambda grad: reference.linear_gelu_backward(*first, kind, grad))

    def both(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        return functional.linear(one(x, fc1_weight, fc1_bias), fc2_weight, fc2_bias)

    inputs = [*first, fc2_weight, fc2_bias]
    torch.testing.assert_close(reference.mlp(*inputs, kind), both(*inputs))
    assert_backward_is_autograd(both, inputs, lambda grad: reference.mlp_backward(*first, fc2_weight, kind, grad))


def test_layer_norm():
    def by_torch(x, weight, bias):
        return functional.layer_norm(x, (6,), weight, bias, 1e-3)

    x, weight, bias = normal(2, 5, 6) + 10, normal(6), normal(6)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-3), by_torch(x, weight, bias), rtol=1e-12, atol=1e-12)
    assert_backward_is_autograd(by_torch, [x, weight, bias], lambda grad: reference.layer_norm_backward(x, weight, grad, 1e-3))


@pytest.mark.parametrize("tubelet", [(1, 2, 4), (2, 4, 2)])
def test_patch_embed(tubelet):
    def by_convolution(grid, weight, bias, cls_token, pos_embed):
        channels_first = ((grid - mean) / std).permute(0, 4, 1, 2, 3)
        embedded = functional.conv3d(channels_first, weight.permute(0, 4, 1, 2, 3), bias, stride=tubelet).flatten(2).transpose(1, 2)
        return torch.cat([cls_token.repeat(len(grid), 1, 1), embedded], 1) + pos_embed

    num_tokens = 1 + 2 * 4 * 8 // (tubelet[0] * tubelet[1] * tubelet[2])
    mean, std = normal(3), normal(3).exp()
    inputs = [normal(2, 2, 4, 8, 3), normal(5, *tubelet, 3), normal(5), normal(1, 1, 5), normal(1, num_tokens, 5)]
    torch.testing.assert_close(reference.patch_embed(*inputs, mean, std), by_convolution(*inputs), rtol=1e-12, atol=1e-12)
    backward = reference.patch_embed_backward
    assert_backward_is_autograd(by_convolution, inputs, lambda grad: backward(inputs[0], inputs[1], mean, std, grad))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_torch_over_fifty_steps(weight_decay):
    start, sgd_param, adamw_param = normal(50), normal(50), normal(50)
    buffer, exp_avg, exp_avg_sq = torch.zeros(3, 50, dtype=torch.float64)
    theirs = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    betas, eps = (0.8, 0.95), 1e-6
    optimizers = [
        torch.optim.SGD([theirs[0]], lr=1.0, momentum=0.9, weight_decay=weight_decay),
        torch.optim.AdamW([theirs[1]], lr=1.0, betas=betas, eps=eps, weight_decay=weight_decay),
    ]
    for count in range(1, 51):
        grad, lr, scale = normal(50 + count)[:50], 0.3 / count, 1 / (1 + count % 3)
        common = {"lr": lr, "scale": scale, "weight_decay": weight_decay}
        sgd_param, buffer = reference.sgd(sgd_param, grad, buffer, momentum=0.9, **common)
        adamw_param, exp_avg, exp_avg_sq = reference.adamw(adamw_param, grad, exp_avg, exp_avg_sq, count, betas=betas, eps=eps, **common)
        for parameter, optimizer in zip(theirs, optimizers, strict=True):
            parameter.grad = grad * scale
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    torch.testing.assert_close(sgd_param, theirs[0].data, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adamw_param, theirs[1].data, rtol=1e-10, atol=1e-12)
