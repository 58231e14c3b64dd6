"""What holds for all operations."""

import pytest
import torch
import torch._dynamo.testing
from samples import normal

import polyvit_kernels as ops

WEIGHTS = [normal(24, 16), normal(24), normal(16, 24), normal(16)]
GRID = [normal(2, 1, 8, 8, 3), normal(16, 1, 4, 4, 3), normal(16), normal(1, 1, 16), normal(1, 5, 16)]
STATISTICS = [torch.zeros_like(normal(3)), torch.ones_like(normal(3))]
CALLS = {
    "attention": (ops.attention, [normal(2, 5, 3, 2, 16)]),
    "attention_varlen": (
        lambda qkv: ops.attention_varlen(qkv, torch.tensor([0, 4, 10], dtype=torch.int32, device=qkv.device), 6),
        [normal(10, 3, 2, 16)],
    ),
    "linear_gelu": (lambda *x: ops.linear_gelu(*x, "erf"), [normal(5, 16), *WEIGHTS[:2]]),
    "linear_add": (ops.linear_add, [normal(5, 16), *WEIGHTS[:2], normal(5, 24)]),
    "mlp": (lambda *x: ops.mlp(*x, "tanh"), [normal(5, 16), *WEIGHTS]),
    "layer_norm": (ops.layer_norm, [normal(5, 16), normal(16), normal(16)]),
    "layer_norm_beside": (lambda *x: torch.cat(ops.layer_norm_beside(*x)), [normal(5, 16), normal(16), normal(16)]),
    "add_layer_norm": (lambda *x: torch.cat(ops.add_layer_norm(*x)), [normal(5, 16), normal(5, 16), normal(16), normal(16)]),
    "patch_embed": (lambda *x: ops.patch_embed(*x, *STATISTICS), GRID),
}


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *_):
        return None


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_that_is_not_defined_gives_none(name):
    call, inputs = CALLS[name]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    _Nothing.apply(call(*leaves)).sum().backward()
    assert [leaf.grad for leaf in leaves if leaf.grad is not None and leaf.grad.any()] == []


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention_varlen"])
def test_another_batch_is_not_compiled_again(name):
    call, inputs = CALLS[name]
    batched = [0] if name not in ("linear_add", "add_layer_norm") else [0, 3 if name == "linear_add" else 1]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch in (4, 5, 7, 9):
        example = [tensor[:1].expand(batch, *tensor.shape[1:]).clone() if i in batched else tensor for i, tensor in enumerate(inputs)]
        with torch.no_grad():
            assert torch.equal(compiled(*example), call(*example))
    assert counter.frame_count <= 2
