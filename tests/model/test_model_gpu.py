"""What only a GPU can show of the model: the last block and recomputation in bf16, in a CUDA graph, with less memory."""

from dataclasses import replace

import pytest
import torch
from grids import PAPER, SMALL, Picture
from torch.nn import functional

from polyvit_fast.config import Model
from polyvit_fast.model.class_token import ClassTokenBlock
from polyvit_fast.model.modules import Block
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loss import LOSSES, matches, mixed_loss

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]
MODEL = Model(dim=128, depth=4, num_heads=2, mlp_dim=256)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).cuda()


def gradients_of(loss, model):
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]


def captured(step):
    """The graph of `step`, and the tensors that it gives; like the training step, in a stream of its own and without cached casts."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors = step()
    return graph, tensors


@pytest.mark.parametrize("tokens", [5, 197, 1569])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_class_token_alone_is_that_of_all_tokens(tokens, autocast):
    torch.manual_seed(0)
    block, last = Block(128, 2, 256).cuda(), ClassTokenBlock(128, 2, 256).cuda()
    last.load_state_dict(block.state_dict())
    x = normal(3, tokens, 128).requires_grad_()

    def run(block, x):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = block(x)[:, :1]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]

    found, whole = run(last, x), run(block, x)
    exact = run(block.double().cpu(), x.detach().double().cpu().requires_grad_())
    for ours, theirs, true in zip(found, whole, (tensor.cuda() for tensor in exact), strict=True):
        assert ours.dtype == theirs.dtype
        scale = true.abs().max().item()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + (1e-2 if autocast else 1e-5) * scale


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_a_captured_forward_and_backward_is_the_eager_one(drop_path_rate, recompute):
    model = PolyViT(MODEL, SMALL, {"task": ("clip", 7)}).cuda().train()
    grid, labels = normal(8, *SMALL["clip"].grid), torch.arange(8, device="cuda") % 7

    def step():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(grid, "task", drop_path_rate, recompute)
        loss = functional.cross_entropy(logits.float(), labels)
        return [tensor for tensor in gradients_of(loss, model) if tensor is not None]

    graph, found = captured(step)
    for seed in (1, 2):
        grid.copy_(normal(8, *SMALL["clip"].grid) * seed)
        torch.manual_seed(seed)
        graph.replay()
        replayed = [tensor.clone() for tensor in found]
        torch.manual_seed(seed)
        expected = step()
        for ours, true in zip(replayed, expected, strict=True):
            torch.testing.assert_close(ours, true, rtol=2e-2, atol=2e-2 * true.abs().max().item() + 1e-6)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("num_adaptor_layers", [0, 2])
def test_recomputed_gradients_are_the_same_to_the_bit(num_adaptor_layers):
    model = PolyViT(replace(MODEL, num_adaptor_layers=num_adaptor_layers), SMALL, {"task": ("clip", 7)}).cuda().train()
    grid, runs = normal(8, *SMALL["clip"].grid), []
    for recompute in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(grid, "task", 0.4, recompute)
        runs.append(gradients_of(logits.float().square().sum(), model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True) if a is not None)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_device(recompute):
    model = PolyViT(MODEL, SMALL, {"task": ("clip", 7)}).cuda().train()
    grid, labels, ratio = normal(8, *SMALL["clip"].grid), torch.arange(8, device="cuda") % 7, torch.tensor(0.3, device="cuda")

    def step(loss):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(grid, "task", 0.3, recompute)
        mixed_loss(LOSSES[loss], logits, labels, labels.flip(0), ratio, 0.1).backward()
        return matches(logits.detach(), labels)

    for loss in LOSSES:
        step(loss)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_recomputing_takes_less_memory():
    model = PolyViT(Model(), {"picture": Picture(size=224)}, {"task": ("picture", 1000)}).cuda().train()
    grid, peaks = torch.zeros(64, *Picture(size=224).grid, dtype=torch.uint8, device="cuda"), []

    def step(recompute):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(grid, "task", 0.1, recompute)
        logits.float().sum().backward()

    step(False)  # the gradients have their memory from now on
    for recompute in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(recompute)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_long_clip_of_the_paper_is_recomputed():
    model = PolyViT(MODEL, PAPER, {"task": ("clip", 7)}).cuda().train()
    grid = torch.zeros(2, *PAPER["clip"].grid, dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(grid, "task", 0.1, True).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
