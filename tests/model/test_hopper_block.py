"""A block on Hopper's kernels by the comparison rule, forward and backward, with what flows through one that learns from pictures.

Where there is no GPU the kernels are executed on the CPU (gluon_executor.py), and the norms are torch's.
"""

import pytest
import torch
from compare import DEVICE, assert_within_rule, one_thread
from interpreted import on_hopper as on_hopper  # a fixture
from plain_model import plain_block
from torch.nn import functional

from polyvit_fast.config import MODELS, Model, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.demo_files import DemoFiles
from polyvit_fast.data.stream import Loader
from polyvit_fast.model.polyvit import PolyViT

STEPS = 8
BATCH, EXAMPLES = (8, 8) if DEVICE.type == "cuda" else (4, 1)
"""On a GPU as many rows as the table wants for Hopper's linear layers."""


@pytest.fixture(scope="module", params=["Ti", pytest.param("B", marks=pytest.mark.long)])
def flow(request, tmp_path_factory):
    """(a block of a model that has learned for `STEPS` steps, its input `[examples, 197, dim]`, the gradient by its output)."""
    files = DemoFiles(kind="shapes", num_samples=64, root=str(tmp_path_factory.mktemp("files")))
    task = Task(modality=Image(size=224, patch=16), train=files, val=files, num_classes=6, batch=BATCH, steps=STEPS)
    size = MODELS[request.param]
    config = Train(tasks={"shapes": task}, model=Model(dim=size.dim, depth=2, num_heads=size.num_heads, mlp_dim=size.mlp_dim))
    torch.manual_seed(0)
    model, loader = PolyViT.from_config(config).to(DEVICE), Loader("shapes", config, train=True)
    optimizer, kept = torch.optim.AdamW(model.parameters(), 1e-3), {}

    def keep(block, inputs, output):
        output.retain_grad()
        kept.update(input=inputs[0].detach(), output=output)

    hook = model.blocks[0].register_forward_hook(keep)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = loader.load(step)
        functional.cross_entropy(model(batch.grid.to(DEVICE), "shapes"), batch.labels.to(DEVICE)).backward()
        if step < STEPS - 1:
            optimizer.step()
    hook.remove()
    return model.blocks[0], kept["input"][:EXAMPLES], kept["output"].grad[:EXAMPLES]


def results(run, x, weights, upstream, autocast=True):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in {"x": x, **weights}.items()}
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        output = run(leaves["x"], {name: leaves[name] for name in weights})
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("residual", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_output_and_gradients(residual, flow, on_hopper):
    block, x, upstream = flow
    x, upstream = x.to(residual), (upstream / upstream.std()).to(residual)
    weights = dict(block.named_parameters())

    def plain(x, weights):
        return plain_block(x, weights, block.attn.num_heads)

    found = results(lambda x, weights: torch.func.functional_call(block, weights, (x,)), x, weights, upstream)
    with one_thread():
        baseline = results(plain, x, weights, upstream)
    exact = {name: weight.double() for name, weight in weights.items()}
    true = results(plain, x.double(), exact, upstream, autocast=False)
    assert len(true) == 14
    assert_within_rule(found, baseline, true, torch.bfloat16)
