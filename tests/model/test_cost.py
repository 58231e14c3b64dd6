import math
import weakref
from dataclasses import replace

import pytest
import torch
from grids import PAPER, SMALL, Clip, Picture, task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyvit_fast.config import MODELS, Model, Optim
from polyvit_fast.model.cost import activation_bytes, forward_flops, num_parameters, state_bytes
from polyvit_fast.model.parameters import count_frozen_layers, freeze
from polyvit_fast.model.polyvit import PolyViT
from polyvit_kernels.layers import has_hooks

GRIDS = [PAPER["picture"], Picture(size=224), PAPER["clip"], Clip(tubelet_frames=2), PAPER["sound"]]
GMACS = {
    "Ti": ["4.68", "1.25", "20.6", "62.9", "2.93"],
    "S": ["15.5", "4.60", "57.9", "159", "10.1"],
    "B": ["55.5", "17.6", "182", "452", "37.3"],
    "L": ["191", "61.6", "600", "1436", "129"],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = Model(dim=64, depth=3, num_heads=4, mlp_dim=160)


@pytest.mark.parametrize("size", [pytest.param(size, marks=[] if size == "B" else pytest.mark.long) for size in GMACS])
def test_forward_cost_of_the_paper_s_grids(size):
    # The table holds blocks of all tokens, as adaptors are, and patch embedding, to three digits or whole numbers; no head.
    model = replace(MODELS[size], num_adaptor_layers=MODELS[size].depth)
    gmacs = [forward_flops(model, modality, 1) / 2e9 - model.dim / 1e9 for modality in GRIDS]
    for value, expected in zip(gmacs, GMACS[size], strict=True):
        digits = len(expected.partition(".")[2])
        assert f"{value:.{digits}f}" == expected


@pytest.mark.parametrize("num_adaptor_layers", [0, 1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_flops_are_those_of_all_matrix_products(name, num_adaptor_layers):
    config, modality = replace(MODEL, num_adaptor_layers=num_adaptor_layers), SMALL[name]
    tokens, dim, tubelet = modality.num_tokens, config.dim, math.prod(modality.tubelet) * modality.grid[3]
    matrices = dim * (4 * dim + 2 * config.mlp_dim)
    all_tokens = tokens * matrices + 2 * tokens**2 * dim  # queries with keys, and attention with values
    class_token = matrices + 2 * tokens * config.num_heads * dim  # of every head with the tokens themselves
    last = all_tokens if num_adaptor_layers == config.depth else class_token
    expected = (config.depth - 1) * all_tokens + last + (tokens - 1) * tubelet * dim + dim * 7
    assert forward_flops(config, modality, 7) == 2 * expected


def test_counting_leaves_no_hooks_behind():
    forward_flops(MODEL, SMALL["picture"], 5)
    assert not has_hooks(torch.nn.Linear(2, 3))


def test_the_last_block_costs_next_to_nothing():
    model, modality = MODELS["B"], Picture(size=224)
    without = replace(model, depth=11, num_adaptor_layers=11)
    assert forward_flops(without, modality, 1) < forward_flops(model, modality, 1) < 1.001 * forward_flops(without, modality, 1)


class LiveBytes(TorchDispatchMode):
    """Storage that operators made and that is still there: the most at any time."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return out


def peak_bytes(run):
    with LiveBytes() as mode:
        run()
    return mode.most


PRECISIONS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "fp32"), "bf16 with a bf16 residual": ("bf16", "bf16")}
each_precision = pytest.mark.parametrize(("precision", "residual"), PRECISIONS.values(), ids=PRECISIONS)


def kept_bytes(model, grid, precision, recompute=False, leaves=None):
    """Storage that autograd really holds between forward and backward, parameters and the grid left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (grid, *(leaves or model).parameters())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(grid, "task", 0.3, recompute)
        size = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in given)
    logits.float().sum().backward()
    return size


@each_precision
@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"num_adaptor_layers": 1}, marks=pytest.mark.long), {"num_adaptor_layers": 3}, {"dropout": 0.1}], ids=str
)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("registered")
def test_activation_bytes_are_those_that_autograd_keeps(name, changes, precision, residual):
    config, modality = replace(MODEL, **changes), SMALL[name]
    model = PolyViT(config, SMALL, {"task": (name, 7)}, residual=residual).train()
    kept = kept_bytes(model, torch.zeros(8, *modality.grid, dtype=torch.uint8), precision)
    counted = activation_bytes(config, task(modality, 7, batch=24, micro_batches=3, drop_path_rate=0.3), precision, residual=residual)
    assert counted == pytest.approx(kept, rel=0.001)


@each_precision
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"num_adaptor_layers": 1}, marks=pytest.mark.long), {"num_adaptor_layers": 3}, {"dropout": 0.1}, {"depth": 1}],
    ids=str,
)
@pytest.mark.usefixtures("registered")
def test_recomputing_keeps_the_input_of_each_block_and_then_one_block(changes, precision, residual):
    config, modality = replace(MODEL, **changes), SMALL["clip"]
    model, grid = PolyViT(config, SMALL, {"task": ("clip", 7)}, residual=residual), torch.zeros(8, *modality.grid, dtype=torch.uint8)
    blocks = [*model.tokenizers["clip"].blocks, *model.blocks]
    block = blocks[max(len(blocks) - 2, 0)]
    x = torch.randn(8, modality.num_tokens, config.dim, dtype=DTYPES[residual]).requires_grad_()
    one = kept_bytes(lambda grid, task, *_: block(grid, 0.3), x, precision, leaves=block)
    counted, whole = (activation_bytes(config, task(modality, 7, batch=8), precision, again, residual=residual) for again in (True, False))
    assert counted == pytest.approx(kept_bytes(model.train(), grid, precision, recompute=True) + one, rel=0.003)
    assert counted < whole or config.depth == 1


@pytest.mark.usefixtures("registered")
def test_recomputing_lowers_the_peak_as_counted():
    config, modality = replace(MODEL, depth=8), Picture(size=48, patch=8)
    model, grid = PolyViT(config, {"picture": modality}, {"task": ("picture", 7)}).train(), torch.zeros(8, *modality.grid)
    model(grid, "task").sum().backward()  # gradients have their memory from now on
    peaks = [peak_bytes(lambda again=again: model(grid, "task", 0.3, again).sum().backward()) for again in (False, True)]
    counted = [activation_bytes(config, task(modality, 7, batch=8), recompute=recompute) for recompute in (False, True)]
    one_block = counted[0] / 7
    assert all(low < peak < low + one_block for peak, low in zip(peaks, counted, strict=True))
    assert peaks[1] < 0.5 * peaks[0]


def test_state_bytes_count_every_copy():
    model = torch.nn.Linear(9, 1)
    assert num_parameters(model) == 10
    assert state_bytes(model, Optim(name="sgd")) == 120
    assert state_bytes(model, Optim(name="adamw")) == 160
    assert state_bytes(model, Optim(name="adamw", ema_decay=0.99)) == 200


FROZEN = {
    1: ("tokenizers.*",),
    2: ("tokenizers.clip.*", "blocks.0.*"),
    3: ("tokenizers.clip.*", "blocks.[0-1].*"),
    4: ("tokenizers.clip.*", "blocks.*"),
    5: ("tokenizers.clip.*", "blocks.*", "norm.*"),
    0: ("tokenizers.clip.bias", "blocks.*"),
}


@each_precision
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("num_frozen", FROZEN)
@pytest.mark.usefixtures("registered")
def test_before_the_first_layer_that_is_trained_nothing_is_kept(num_frozen, dropout, precision, residual):
    config, modality = replace(MODEL, dropout=dropout), SMALL["clip"]
    model = PolyViT(config, SMALL, {"task": ("clip", 7)}, residual=residual).train()
    freeze(model, FROZEN[num_frozen])
    assert count_frozen_layers(model, "task") == num_frozen
    kept = kept_bytes(model, torch.zeros(8, *modality.grid, dtype=torch.uint8), precision)
    of = task(modality, 7, batch=8, drop_path_rate=0.3)
    counted = activation_bytes(config, of, precision, residual=residual, num_frozen=num_frozen)
    assert counted == pytest.approx(kept, rel=0.01, abs=64)  # the last norm also keeps the mean and the std of each example
    assert activation_bytes(config, of, precision, True, residual=residual, num_frozen=num_frozen) <= counted
