"""What only a GPU can show: every operation captured in a CUDA graph, without a word to the host, on more than 2³¹ elements, for long."""

import itertools

import pytest
import torch
from attention_cases import plain
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from samples import normal

import polyvit_kernels as ops
from polyvit_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(*shapes):
    return [normal(*shape, seed=seed) / shape[-1] ** 0.5 for seed, shape in enumerate(shapes)]


def patch_embed_inputs(batch):
    grid = torch.randint(0, 256, (batch, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [grid, *weights((96, 1, 16, 16, 3), (96,), (1, 1, 96), (1, 17, 96))]


CU_TOKENS = torch.tensor([0, 50, 51, 248], dtype=torch.int32, device=DEVICE)
CALLS = {
    "attention, 50 tokens": (ops.attention, lambda: [normal(4, 50, 3, 2, 64)]),
    "attention, 197 tokens": (ops.attention, lambda: [normal(4, 197, 3, 2, 64)]),
    "attention, 401 tokens": (ops.attention, lambda: [normal(2, 401, 3, 2, 64)]),
    "attention_varlen": (lambda qkv: ops.attention_varlen(qkv, CU_TOKENS, 197), lambda: [normal(248, 3, 2, 64)]),
    "linear_gelu": (lambda *x: ops.linear_gelu(*x, "erf"), lambda: [normal(100, 96), *weights((256, 96), (256,))]),
    "linear_add": (ops.linear_add, lambda: [normal(100, 96), *weights((256, 96), (256,)), normal(100, 256)]),
    "mlp": (lambda *x: ops.mlp(*x, "tanh"), lambda: [normal(100, 96), *weights((256, 96), (256,), (96, 256), (96,))]),
    "layer_norm": (ops.layer_norm, lambda: [normal(100, 96), normal(96), normal(96)]),
    "add_layer_norm": (
        lambda *x: torch.cat(ops.add_layer_norm(*x), 1),
        lambda: [normal(100, 96), normal(100, 96, seed=1), normal(96), normal(96)],
    ),
    "patch_embed": (
        lambda *x: ops.patch_embed(*x, torch.full((3,), 120.0, device=DEVICE), torch.full((3,), 60.0, device=DEVICE)),
        lambda: patch_embed_inputs(4),
    ),
}


def inputs_of(name, dtype):
    tensors = CALLS[name][1]()
    return {str(i): tensor.to(dtype) if tensor.is_floating_point() else tensor for i, tensor in enumerate(tensors)}


def call(name):
    return lambda **inputs: CALLS[name][0](*inputs.values())


CAPTURED = [(name, dtype) for name in CALLS for dtype in DTYPES if (name, dtype) != ("attention_varlen", torch.float32)]  # that one looks


@pytest.mark.parametrize(("name", "dtype"), CAPTURED, ids=str)
def test_a_captured_operation_gives_what_it_gives_eagerly(name, dtype):
    inputs = inputs_of(name, dtype)
    expected = outputs_and_gradients(call(name), inputs)
    leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    upstream = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(0)).to(expected["output"])

    def step():
        output = call(name)(**leaves)
        # A copy, for the gradient of a residual is that very tensor, which is overwritten below.
        return output, torch.autograd.grad(output, wanted, upstream.clone())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    for tensor in (output, *gradients):
        tensor.detach().fill_(float("nan"))
    graph.replay()
    for found, true in zip((output, *gradients), expected.values(), strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name):
    inputs = inputs_of(name, torch.bfloat16)
    leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    output = call(name)(**leaves)
    upstream = torch.ones_like(output)
    torch.autograd.grad(output, wanted, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(name)(**leaves), wanted, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_updates_are_captured(name):
    size = 10_000
    number = {k: torch.full((), v, device=DEVICE) for k, v in (("lr", 0.1), ("scale", 0.5))}
    ok, count = torch.ones((), dtype=torch.bool, device=DEVICE), torch.ones((), device=DEVICE)
    grad = normal(size, seed=7)

    def buffers():
        return [normal(size), torch.zeros(size, device=DEVICE), *torch.zeros(1 if name == "sgd" else 2, size, device=DEVICE)]

    def step(param, gradient, *moments):
        if name == "sgd":
            ops.sgd_(param, gradient, *moments, **number, ok=ok, momentum=0.9, weight_decay=0.1)
        else:
            ops.adamw_(param, gradient, *moments, count, **number, ok=ok, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)

    eager, captured = buffers(), buffers()
    step(*buffers())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    for good in (True, False, True):
        ok.fill_(good)
        for tensors in (eager, captured):
            tensors[1].copy_(grad)
        step(*eager)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [257, 401, 577, 1212, 3137])
def test_the_tables_backend_for_longer_rows(tokens, dtype):
    torch.use_deterministic_algorithms(False)  # cuDNN's attention stands aside where all must repeat
    forms = (ops.attention, plain, reference.attention)
    assert_as_exact_as_torch(*forms, {"qkv": normal(1, tokens, 3, 2, 64)}, dtype)


@pytest.mark.parametrize("tokens", [197, 300])
def test_more_than_two_billion_elements(tokens):
    heads, head_dim = 16, 64
    batch = 2**31 // (tokens * 3 * heads * head_dim) + 2
    qkv = torch.empty(batch, tokens, 3, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    qkv[:-1] = 0
    qkv[-1] = normal(tokens, 3, heads, head_dim)
    qkv.requires_grad_()
    out = torch.ops.polyvit.attention(qkv)[0]
    (gradient,) = torch.autograd.grad(out, qkv, out.detach())
    alone = qkv.detach()[-1:].clone().requires_grad_()
    expected = torch.ops.polyvit.attention(alone)[0]
    assert torch.equal(out[-1:], expected)
    assert torch.equal(gradient[-1:], torch.autograd.grad(expected, alone, expected.detach())[0])
    assert not out[0].any()


LAYERS = {"qkv": (64, 192), "proj": (64, 64), "fc1": (64, 128), "fc2": (128, 64)}


def test_ten_thousand_steps_with_large_scores_stay_finite():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in LAYERS.items()})
    model.to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        model["qkv"].weight.mul_(30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    norm = torch.ones(64, device=DEVICE, dtype=torch.bfloat16), torch.zeros(64, device=DEVICE, dtype=torch.bfloat16)
    x, target = normal(8, 197, 64).bfloat16(), normal(8, 197, 64, seed=1).bfloat16()

    def block(x):
        qkv = model["qkv"](ops.layer_norm(x, *norm)).unflatten(-1, (3, 2, 32))
        x = ops.linear_add(ops.attention(qkv).flatten(2), model["proj"].weight, model["proj"].bias, x)
        weights = (model["fc1"].weight, model["fc1"].bias, model["fc2"].weight, model["fc2"].bias)
        return ops.mlp(ops.layer_norm(x, *norm), *weights, "erf", residual=x)

    losses = []
    for step in range(10_000):
        loss = (block(block(x)).float() - target.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 1000 in (0, 999):
            losses.append(loss.item())
    assert all(loss == loss and loss < 1e4 for loss in losses)
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in itertools.chain(model.parameters()))
