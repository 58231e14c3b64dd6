"""What holds for all operations."""

import pytest
import torch
import torch._dynamo.testing
from capturable import META, check_capturable
from capturable import on_meta as on_meta  # a fixture
from compare import DEVICE, outputs_and_gradients
from long_forms import every
from samples import normal

from polyvit_kernels import ops
from polyvit_kernels.ops import dtypes

WEIGHTS = [normal(24, 16), normal(24), normal(16, 24), normal(16)]
GRID = [normal(2, 1, 8, 8, 3), normal(16, 1, 4, 4, 3), normal(16), normal(1, 1, 16), normal(1, 5, 16)]
DEVICES = (DEVICE, META)
STATISTICS = {device.type: [torch.zeros(3, device=device), torch.ones(3, device=device)] for device in DEVICES}
CU_TOKENS = {device.type: torch.tensor([0, 4, 10], dtype=torch.int32, device=device) for device in DEVICES}
CALLS = {
    "attention": (ops.attention, [normal(2, 5, 3, 2, 16)]),
    "attention_varlen": (lambda qkv: ops.attention_varlen(qkv, CU_TOKENS[qkv.device.type], 6), [normal(10, 3, 2, 16)]),
    "linear": (lambda *x: ops.linear(*x, (3, 2, -1)), [normal(5, 16), *WEIGHTS[:2]]),
    "linear_gelu": (lambda *x: ops.linear_gelu(*x, "erf"), [normal(5, 16), *WEIGHTS[:2]]),
    "linear_add": (ops.linear_add, [normal(5, 16), *WEIGHTS[:2], normal(5, 24)]),
    "mlp": (lambda *x: ops.mlp(*x, "tanh"), [normal(5, 16), *WEIGHTS]),
    "layer_norm": (ops.layer_norm, [normal(5, 16), normal(16), normal(16)]),
    "layer_norm_residual": (lambda *x: torch.cat(ops.layer_norm_residual(*x)), [normal(5, 16), normal(16), normal(16)]),
    "add_layer_norm": (lambda *x: torch.cat(ops.add_layer_norm(*x)), [normal(5, 16), normal(5, 16), normal(16), normal(16)]),
    "patch_embed": (lambda *x: ops.patch_embed(*x, *STATISTICS[x[0].device.type]), GRID),
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
@pytest.mark.parametrize("name", every(2, [name for name in CALLS if name != "attention_varlen"]))
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


ON_CPU = [name for name in CALLS if name not in ("attention_varlen", "patch_embed")]  # those two are always the registered ones
PRECISIONS = {
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


def on_both_paths(name, inputs, autocast, monkeypatch):
    """Outputs and gradients of the registered operation, and of torch's own operators."""
    runs = []
    for registered in (True, False):
        monkeypatch.setattr(dtypes, "runs_registered", lambda x, registered=registered: registered)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            runs.append(outputs_and_gradients(lambda **tensors: CALLS[name][0](*tensors.values()), inputs))
    return runs


@pytest.mark.skipif(DEVICE.type != "cpu", reason="torch's own operators are called on a CPU")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ON_CPU)
def test_torchs_own_operators_give_what_the_registered_ones_give(name, precision, monkeypatch):
    dtype, autocast = PRECISIONS[precision]
    inputs = {str(i): tensor.to(dtype) for i, tensor in enumerate(CALLS[name][1])}
    registered, own = on_both_paths(name, inputs, autocast, monkeypatch)
    assert {key: tensor.dtype for key, tensor in own.items()} == {key: tensor.dtype for key, tensor in registered.items()}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(own, registered, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="torch's own operators are called on a CPU")
@pytest.mark.parametrize("layout", ["transposed", "sliced", "repeated", "empty"])
@pytest.mark.parametrize("name", ON_CPU)
def test_torchs_own_operators_in_every_layout(name, layout, monkeypatch):
    views = {
        "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "repeated": lambda x: x[:1].expand_as(x),
        "empty": lambda x: x[:0],
    }
    tensors = CALLS[name][1]
    count = 2 if name == "add_layer_norm" else 1
    inputs = {str(i): tensor for i, tensor in enumerate(tensors)}
    inputs |= {str(i): views[layout](tensors[i]) for i in range(count)} | ({"3": views[layout](tensors[3])} if name == "linear_add" else {})
    registered, own = on_both_paths(name, inputs, False, monkeypatch)
    torch.testing.assert_close(own, registered, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11, the first time
@pytest.mark.parametrize("name", [name for name in CALLS if name != "linear"])  # which is made of torch's own
def test_the_registered_operation_is_what_runs_on_a_gpu_alone(name, monkeypatch):
    monkeypatch.undo()
    call, tensors = CALLS[name]
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # attention and MLP in fp32 are torch's on a GPU
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    with torch.profiler.profile() as profile:
        call(*leaves)
    calls = {event.key for event in profile.key_averages() if event.key.startswith("polyvit::")}
    assert bool(calls) == (DEVICE.type == "cuda" or name not in ON_CPU)


RECORDED = CALLS | {
    "attention of 197 tokens": (ops.attention, [normal(2, 197, 3, 2, 64)]),
    "attention of 300 tokens": (ops.attention, [normal(1, 300, 3, 2, 80)]),
    "attention of more examples than a launch takes": (ops.attention, [normal(1, 1, 3, 1, 16).expand(65_537, -1, -1, -1, -1)]),
    "mlp with a residual": (lambda *x: ops.mlp(*x[:-1], "erf", x[-1]), [normal(5, 16), *WEIGHTS, normal(5, 16)]),
    "patch_embed of bytes": (
        lambda *x: ops.patch_embed(torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8, device=x[0].device), *x, *STATISTICS[x[0].device.type]),
        GRID[1:],
    ),
}


@pytest.mark.usefixtures("on_meta", "unchecked_types")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RECORDED)
def test_an_operation_can_be_recorded(name, dtype):
    call, tensors = RECORDED[name]
    leaves = [tensor.to(META, dtype).requires_grad_() for tensor in tensors]
    with check_capturable():
        gradients = torch.autograd.grad(call(*leaves).sum(), leaves)
    assert all(gradient.is_meta for gradient in gradients)


@pytest.mark.usefixtures("on_meta", "unchecked_types")
@pytest.mark.parametrize("more", [(), ("ema",), ("ema", "copy")], ids=str)
def test_an_update_can_be_recorded(more):
    buffers = [torch.zeros(300, device=META) for _ in range(4)]
    extra = {name: torch.zeros(300, device=META, dtype=torch.bfloat16 if name == "copy" else None) for name in more}
    numbers = {name: torch.ones((), device=META, dtype=torch.bool if name == "ok" else None) for name in ("lr", "scale", "ok")}
    with check_capturable():
        ops.sgd_(*buffers[:3], **numbers, **extra, momentum=0.9, weight_decay=0.1, ema_decay=0.9)
        ops.adamw_(*buffers, numbers["lr"], **numbers, **extra, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, ema_decay=0.9)


def test_every_public_operation_is_recorded_above():
    assert set(ops.__all__) - {"Gelu", "AttentionBackend"} == {*CALLS, "sgd_", "adamw_"}
