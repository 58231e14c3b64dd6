"""The kernels on what flows through a trained model, forward and backward (tests/files/record_activations.py), batch 2.

Errors that random numbers hide show there. Gradients are scaled to an std of 1, so that the rule's absolute slack means nothing.
"""

from pathlib import Path

import pytest
import torch
from attention_cases import plain
from compare import DEVICE, assert_within_rule, one_thread
from safetensors.torch import load_file
from torch.nn import functional

import polyvit_kernels as ops
from polyvit_kernels import reference

FLOW = load_file(Path(__file__).parent.parent / "files" / "activations.safetensors", device=str(DEVICE))
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if DEVICE.type == "cuda" else [torch.float32]
NORM = ("norm1.weight", "norm1.bias")
MLP = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual):
    hidden = functional.gelu(functional.linear(x, fc1_weight, fc1_bias), approximate="tanh")
    return functional.linear(hidden, fc2_weight, fc2_bias) + residual


CALLS = {
    "attention": (ops.attention, plain, reference.attention, "qkv", (), (), "attention"),
    "layer_norm": (
        ops.layer_norm,
        lambda x, weight, bias: functional.layer_norm(x, weight.shape, weight, bias, 1e-6),
        reference.layer_norm,
        "norm1",
        NORM,
        (),
        "mlp",
    ),
    "mlp": (
        lambda *inputs: ops.mlp(*inputs[:5], "tanh", inputs[5]),
        plain_mlp,
        lambda *inputs: reference.mlp(*inputs[:5], "tanh") + inputs[5],
        "mlp",
        MLP,
        ("norm2",),
        "block",
    ),
}


def results(form, inputs, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = form(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output).view_as(output))
    return {"output": output.detach()} | {f"gradient {index}": gradient for index, gradient in enumerate(gradients)}


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task", ["shapes", "tones"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name, task, dtype):
    ours, baseline, truth, x, weights, others, out = CALLS[name]
    inputs = [FLOW[f"{task}.{x}"], *(FLOW[f"weight.{w}"] for w in weights), *(FLOW[f"{task}.{o}"] for o in others)]
    if name == "attention":
        inputs = [inputs[0].unflatten(-1, (3, 3, 32))]
    inputs = [tensor.to(dtype) for tensor in inputs]
    upstream = FLOW[f"{task}.{out}.grad"]
    upstream = (upstream / upstream.std()).to(dtype)
    found = results(ours, inputs, upstream)
    with one_thread():
        allowed = results(baseline, inputs, upstream)
    true = results(truth, [tensor.double() for tensor in inputs], upstream)
    assert_within_rule(found, allowed, true, dtype)
    for key, value in true.items():
        cosine = functional.cosine_similarity(found[key].double().flatten(), value.flatten(), 0).item()
        assert cosine > 1 - 4 * torch.finfo(dtype).eps, f"{key}: {cosine}"
        assert abs(found[key].double().norm() / value.norm() - 1) < 4 * torch.finfo(dtype).eps
