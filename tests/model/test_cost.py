from dataclasses import replace

import pytest
import torch
from grids import PAPER, SMALL, Clip, Picture, task

from polyvit_fast.config import MODELS, Model, Optim
from polyvit_fast.model.cost import activation_bytes, forward_flops, num_parameters, state_bytes
from polyvit_fast.model.polyvit import PolyViT
from polyvit_kernels import ops, reference

GRIDS = [PAPER["picture"], Picture(size=224), PAPER["clip"], Clip(tubelet_frames=2), PAPER["sound"]]
GMACS = {
    "Ti": ["4.68", "1.25", "20.6", "62.9", "2.93"],
    "S": ["15.5", "4.60", "57.9", "159", "10.1"],
    "B": ["55.5", "17.6", "182", "452", "37.3"],
    "L": ["191", "61.6", "600", "1436", "129"],
}
MODEL = Model(dim=64, depth=3, num_heads=4, mlp_dim=160)


@pytest.mark.parametrize("size", GMACS)
def test_forward_cost_of_the_paper_s_grids(size):
    # The table holds blocks and patch embedding, to three digits or whole numbers; a head of no classes adds nothing.
    gmacs = [forward_flops(MODELS[size], modality, 0) / 2e9 for modality in GRIDS]
    for value, expected in zip(gmacs, GMACS[size], strict=True):
        digits = len(expected.partition(".")[2])
        assert f"{value:.{digits}f}" == expected


@pytest.mark.parametrize("name", SMALL)
def test_flops_are_those_that_torch_counts(name, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    model = PolyViT(MODEL, SMALL, {"task": (name, 7)})
    # torch counts products and does not look into operations of ours; the reference is made of products.
    for operation in ("attention", "patch_embed"):
        monkeypatch.setattr(ops, operation, getattr(reference, operation))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SMALL[name].grid), "task")
    assert counter.get_total_flops() == forward_flops(MODEL, SMALL[name], 7)


def kept_bytes(model, grid, precision):
    """Storage that autograd really holds between forward and backward, parameters and the grid left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (grid, *model.parameters())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(grid, "task", 0.3)
        size = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in given)
    logits.float().sum().backward()
    return size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"num_adaptor_layers": 1}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_activation_bytes_are_those_that_autograd_keeps(name, changes, precision):
    config, modality = replace(MODEL, **changes), SMALL[name]
    model = PolyViT(config, SMALL, {"task": (name, 7)}).train()
    kept = kept_bytes(model, torch.zeros(8, *modality.grid, dtype=torch.uint8), precision)
    counted = activation_bytes(config, task(modality, 7, batch=24, micro_batches=3, drop_path_rate=0.3), precision)
    assert counted == pytest.approx(kept, rel=0.001)


def test_state_bytes_count_every_copy():
    model = torch.nn.Linear(9, 1)
    assert num_parameters(model) == 10
    assert state_bytes(model, Optim(name="sgd")) == 120
    assert state_bytes(model, Optim(name="adamw")) == 160
    assert state_bytes(model, Optim(name="adamw", ema_decay=0.99)) == 200
