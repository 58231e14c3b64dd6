"""What is computed in a foreign module, against the module itself."""

import pytest
import torch
from foreign_models import normal, timm_vit
from torch import nn

from polyvit_fast import fuse
from polyvit_fast.drop_in.adapters import adapter_of
from polyvit_fast.drop_in.fused import fused_adapter
from polyvit_fast.drop_in.parts import NormPart, accepts, add_attention, add_mlp, compute


def part_of(module):
    adapter = fused_adapter(module) or adapter_of(module)
    assert adapter
    return adapter.read(module)


@pytest.mark.parametrize("path", ["norm1", "attn", "mlp", ""])
def test_a_part_computes_what_its_module_returns(path):
    block = timm_vit()[0].blocks[0].eval()
    module, x = block.get_submodule(path), normal(2, 5, 64)
    expected = module(x)
    fuse(block)
    torch.testing.assert_close(compute(part_of(module), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [None, torch.tensor([2.0, 0.0])], ids=["plain", "scaled"])
@pytest.mark.parametrize(("path", "add"), [("attn", add_attention), ("mlp", add_mlp)])
def test_branches_are_added_to_a_residual(path, add, factors):
    module, x, residual = timm_vit()[0].blocks[0].eval().get_submodule(path), normal(2, 5, 64), normal(2, 5, 64, seed=1)
    expected = residual + (1 if factors is None else factors.view(2, 1, 1)) * module(x)
    torch.testing.assert_close(add(part_of(module), x, residual, factors), expected, rtol=1e-5, atol=1e-5)


def test_a_pair_is_given_where_the_module_gives_one():
    attention, x = nn.MultiheadAttention(64, 4, batch_first=True).eval(), normal(2, 5, 64)
    found, weights = compute(part_of(attention), x)
    torch.testing.assert_close(found, attention(x, x, x, need_weights=False)[0])
    assert weights is None


def test_what_each_part_accepts():
    block = timm_vit()[0].blocks[0]
    attention, mlp = part_of(block.attn), part_of(block.mlp)
    fuse(block)
    whole, x = part_of(block), normal(2, 5, 64)
    for part in (attention, whole):
        assert accepts(part, x)
        assert not accepts(part, x[0])
    assert accepts(mlp, x[0])
    assert not accepts(whole, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert accepts(whole, x.bfloat16())
        assert not accepts(whole, x.half())


def test_a_block_refuses_a_layer_scale_that_would_widen_its_tokens():
    block = timm_vit(init_values=0.1)[0].blocks[0]
    fuse(block)
    x = normal(2, 5, 64)
    assert accepts(part_of(block), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not accepts(part_of(block), x.bfloat16())  # the sum would be fp32


def test_heads_are_normalised_in_the_dtype_of_their_norms_or_under_autocast():
    attention = timm_vit(qk_norm=True)[0].blocks[0].attn
    fuse(attention)
    x = normal(2, 5, 64)
    assert accepts(part_of(attention), x)
    assert not accepts(part_of(attention), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert accepts(part_of(attention), x.bfloat16())


@pytest.mark.parametrize("factors", [None, torch.tensor([2.0, 0.0])], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("path", "add"), [("attn", add_attention), ("mlp", add_mlp)])
def test_branches_are_multiplied_by_layer_scale(path, add, dtype, factors):
    module = timm_vit()[0].blocks[0].eval().get_submodule(path).to(dtype)
    x, residual, scale = normal(2, 5, 64).to(dtype), normal(2, 5, 64, seed=1).to(dtype), normal(64, seed=2).to(dtype)
    expected = residual + (1 if factors is None else factors.view(2, 1, 1)) * (scale * module(x))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    found = add(part_of(module), x, residual, factors, scale)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_a_norm_accepts_what_needs_no_rule_for_mixed_dtypes():
    full, half = (NormPart(torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype), 1e-6) for dtype in (torch.float32, torch.bfloat16))
    x = normal(2, 8)
    assert accepts(full, x)
    assert accepts(half, x.bfloat16())
    assert not accepts(full, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert accepts(full, x)
        assert not accepts(half, x.bfloat16())


def test_factors_of_drop_path_are_drawn_by_the_module_first_and_second():
    model, _ = timm_vit(drop_path_rate=0.5)
    block, x = model.blocks[1], normal(40, 5, 64)
    fuse(block)
    part, ones = part_of(block), torch.ones(40, 1, 1)
    torch.manual_seed(1)
    found = compute(part, x)
    torch.manual_seed(1)
    first, second = (path(ones).flatten() for path in part.drop_paths)
    middle = add_attention(part.attention, compute(part.norm1, x), x, first)
    torch.testing.assert_close(found, add_mlp(part.mlp, compute(part.norm2, middle), middle, second), rtol=1e-5, atol=1e-5)
