"""The bf16 residual stream by the comparison rule: the baseline is a plain PyTorch model whose stream is bf16 too."""

from dataclasses import replace

import pytest
import torch
from compare import DEVICE, assert_within_rule, outputs_and_gradients
from grids import SMALL
from plain_model import plain_polyvit

from polyvit_fast.config import Model
from polyvit_fast.model.polyvit import PolyViT

MODEL = Model(dim=32, depth=3, num_heads=4, mlp_dim=64)
STREAMS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def polyvit(residual="bf16", name="picture", **changes):
    return PolyViT(replace(MODEL, **changes), SMALL, {"task": (name, 7)}, residual=residual).to(DEVICE)


def bytes_of(name):
    return torch.randint(0, 256, (6, *SMALL[name].grid), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("num_adaptor_layers", [0, 1, 3])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("registered")
def test_logits_and_gradients_are_as_exact_as_plain_pytorchs(name, num_adaptor_layers):
    model = polyvit(name=name, num_adaptor_layers=num_adaptor_layers).train()
    grid, own = bytes_of(name), (f"tokenizers.{name}.", "blocks.", "norm.", "heads.")
    weights = {key: 1.5 * value.detach() for key, value in model.named_parameters() if key.startswith(own)}
    keys = {key.replace(".", "_"): key for key in weights}

    def ours(**leaves):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return torch.func.functional_call(model, {keys[name]: leaf for name, leaf in leaves.items()}, (grid, "task"))

    def plain(stream, autocast=True, **leaves):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return plain_polyvit(grid, SMALL[name], {keys[name]: leaf for name, leaf in leaves.items()}, MODEL.num_heads, stream)

    inputs = {name: weights[key] for name, key in keys.items()}
    exact = {name: value.double() for name, value in inputs.items()}
    baseline = outputs_and_gradients(lambda **leaves: plain(torch.bfloat16, **leaves), inputs)
    true = outputs_and_gradients(lambda **leaves: plain(torch.float64, autocast=False, **leaves), exact)
    assert_within_rule(outputs_and_gradients(ours, inputs), baseline, true, torch.bfloat16)


@pytest.mark.parametrize("num_adaptor_layers", [0, 2])
def test_recomputed_gradients_are_the_same_to_the_bit(num_adaptor_layers):
    runs = []
    for recompute in (False, True):
        model = polyvit(num_adaptor_layers=num_adaptor_layers).train()
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(bytes_of("picture"), "task", 0.4, recompute)
        logits.float().square().sum().backward()
        runs.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert len(runs[0]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("residual", STREAMS)
def test_all_that_passes_from_block_to_block_has_its_dtype(residual):
    model, seen = polyvit(residual, num_adaptor_layers=1).train(), []
    blocks = [*model.tokenizers["picture"].blocks, *model.blocks]
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(bytes_of("picture"), "task", 0.3)
    logits.float().sum().backward()
    assert seen == [(STREAMS[residual],) * 2] * len(blocks)
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_without_autocast_a_residual_of_bf16_changes_no_bit():
    grid = bytes_of("picture")
    assert torch.equal(polyvit("bf16")(grid, "task"), polyvit("fp32")(grid, "task"))


def test_a_residual_of_fp32_is_what_there_is_without_the_option():
    grid, unnamed = bytes_of("picture"), PolyViT(MODEL, SMALL, {"task": ("picture", 7)}).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        wide, narrow, usual = (model(grid, "task") for model in (polyvit("fp32"), polyvit("bf16"), unnamed))
    assert torch.equal(wide, usual)
    assert not torch.equal(narrow, usual)
