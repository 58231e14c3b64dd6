from dataclasses import replace

import pytest
import torch
from grids import SMALL
from sources import MODEL, as_source, draw

from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.weights import count_blocks, measure_model, shift_block

HEADS = {"pets": ("picture", 3), "motion": ("clip", 5)}


def small(**changes):
    return {name: replace(SMALL[name], **changes) for name in ("picture", "clip")}


@pytest.mark.parametrize("num_adaptor_layers", [0, 1, 3])
@pytest.mark.parametrize("changes", [{}, {"num_class_tokens": 2, "pool": "class_tokens"}, {"num_class_tokens": 0, "pool": "mean"}])
def test_a_model_built_of_its_weights_is_the_model(num_adaptor_layers, changes):
    model, modalities = replace(MODEL, num_adaptor_layers=num_adaptor_layers), small(**changes)
    polyvit = draw(PolyViT(model, modalities, HEADS, norm_heads=["motion"])).eval()
    built = as_source(polyvit, model, modalities).build()
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in polyvit.state_dict().items())
    for task, (name, _) in HEADS.items():
        grid = torch.randn(2, *modalities[name].grid, generator=torch.Generator().manual_seed(0))
        levels = grid * 127.5 + 127.5  # the built model has no mean and std
        torch.testing.assert_close(built(grid, task), polyvit(levels, task), rtol=1e-3, atol=1e-3)


def test_fixed_positions_are_not_among_the_weights():
    modalities = small(positions="sinusoidal")
    built = as_source(draw(PolyViT(MODEL, modalities, HEADS)), MODEL, modalities).build()
    assert not [name for name in built.state_dict() if "pos_embed" in name]


def test_blocks_are_counted_and_numbered():
    names = {f"blocks.{number}.norm1.{key}": torch.zeros(2) for number in (0, 1, 10) for key in ("weight", "bias")}
    assert count_blocks(names) == 3
    assert shift_block("blocks.10.norm1.weight", -3) == "blocks.7.norm1.weight"
    assert shift_block("norm.weight", 5) == "norm.weight"


def test_a_model_is_measured_by_its_blocks():
    polyvit = PolyViT(replace(MODEL, mlp_dim=48), {"picture": SMALL["picture"]}, {})
    blocks = {name: tensor for name, tensor in polyvit.state_dict().items() if name.startswith("blocks.")}
    assert measure_model(blocks, 4, gelu="erf") == replace(MODEL, mlp_dim=48, gelu="erf")
